"""Files that users write by hand, or got from others: read whole, if they are small."""

from pathlib import Path

from gemma_hub.errors import InputError

_MAX_BYTES = 1 << 20


def small_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read, is no UTF-8, or has more than a megabyte.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} has more than {_MAX_BYTES:,} bytes, far more than is needed.")
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}.") from error
