"""Files that a command writes when all is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from gemma_hub.errors import InputError


def checked_file(path: Path | None) -> Path | None:
    """A file that can be written once the work is done, as far as one can tell before."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}.")
    return path


def write_text(path: Path, content: str) -> None:
    """Write a file; an InputError says why it cannot be."""
    try:
        path.write_text(content, "utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


@contextmanager
def whole_text(path: Path) -> Iterator[Callable[[str], object]]:
    """A function that writes text to a file, which is at `path` once the block has ended well.

    What is there stays until then. An InputError says why the file cannot be written.
    """
    from gemma_hub.checkpoints.output import flush, whole_file

    target = path.resolve()
    try:
        with (
            whole_file(target, target.name) as folder,
            (folder / target.name).open("w", encoding="utf-8", newline="\n") as file,
        ):
            yield file.write
            flush(file)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error
