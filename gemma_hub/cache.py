"""Files that gemma_hub can make again, some of which are machine code.

Whoever can write such a file can have it executed, so that it is only taken from a folder that
nobody but the user can write into.
"""

import os
import platform
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder of one kind of file, in GEMMA_HUB_CACHE or else where the user's caches are.

    It may not be there yet.

    Raises:
        RuntimeError: the user has no home folder.
    """
    given = os.environ.get("GEMMA_HUB_CACHE")
    if given:
        return Path(given).expanduser() / name
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(home).expanduser() / "gemma_hub" / name


def is_private(folder: Path) -> bool:
    """Whether only this user can put files there."""
    if not hasattr(os, "getuid"):
        return folder.is_dir()
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that nobody sees a part of it.

    Raises:
        OSError: it cannot be written; then nothing is left of it.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix="new.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@cache
def processor() -> str:
    """The processor of this machine with what it can do; machine code may use all of that."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"
