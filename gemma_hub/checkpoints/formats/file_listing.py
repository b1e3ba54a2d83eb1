"""All files of a checkpoint folder and their sizes, none of which is elsewhere."""

import os
from pathlib import Path

from gemma_hub.errors import CheckpointError

# No Gemma comes near these; the limits keep a hostile folder from taking the time or the memory.
_MOST_FILES = 100_000
_DEEPEST = 24  # folders within one another


def list_files(folder: Path) -> dict[str, int]:
    """{path within the folder, with "/": size} of all its files; nothing is opened.

    Raises:
        CheckpointError: there is a link out of the folder, to a folder or to nothing, what is
            neither a file nor a folder, or more than any checkpoint has.
    """
    roots = _roots(folder)
    files: dict[str, int] = {}
    waiting = [("", 0)]
    while waiting:
        inner, depth = waiting.pop()
        try:
            with os.scandir(folder / inner) as entries:
                for entry in entries:
                    path = f"{inner}{entry.name}"
                    if entry.is_dir(follow_symlinks=False) and depth < _DEEPEST:
                        waiting.append((f"{path}/", depth + 1))
                    else:
                        files[path] = _size(entry, roots)
                    if len(files) + len(waiting) > _MOST_FILES:
                        raise CheckpointError(f"{folder} holds more than {_MOST_FILES:,} files.")
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error}.") from error
    return files


def read_file(path: Path) -> bytes:
    """The content of a small file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error


def _roots(folder: Path) -> tuple[Path, ...]:
    """Where links may lead: into the folder, and to the blobs of a cache of Hugging Face's hub."""
    here = folder.resolve()
    caches = [p.parent.parent for p in (here, *here.parents) if p.parent.name == "snapshots"]
    return (here, *(cache / "blobs" for cache in caches))


def _size(entry: os.DirEntry[str], roots: tuple[Path, ...]) -> int:
    path = Path(entry.path)
    if not entry.name.isprintable():
        raise CheckpointError(f"{entry.path!r} is not the name of a checkpoint's file.")
    if entry.is_symlink():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} is a link that leads nowhere.") from error
        if not any(target.is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{path} is a link to {target}. Nothing outside the folder is opened; put the file "
                "itself there."
            )
    if not entry.is_file():
        raise CheckpointError(
            f"{path} is neither a file nor a folder within reach. Get the checkpoint again."
        )
    return entry.stat().st_size
