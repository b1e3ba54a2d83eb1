"""Writing a folder whole or not at all: into a hidden one beside it, renamed when complete."""

import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gemma_hub.errors import CheckpointError, first_ten

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `target` when the block ends well.

    What is at `target` stays until then, and is replaced as a whole; after a failure it is still
    there, and the hidden folder is not.

    Args:
        target: a resolved path, so that both are on the same disk also where it was a link.
    """
    hidden = _hidden(target)
    try:
        with _locked(hidden):
            yield hidden
            sync_folder(hidden)
            _move(hidden, target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def whole_file(target: Path, name: str) -> Iterator[Path]:
    """A hidden folder to write the file `name` into, which becomes `target` when the block ends.

    What is at `target` is replaced at once then, or kept.
    """
    hidden = _hidden(target)
    try:
        with _locked(hidden):
            yield hidden
            (hidden / name).replace(target)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def check_target(target: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Refuse a target that is there already, or that holds what no checkpoint holds.

    Args:
        target: where a checkpoint shall go.
        overwrite: whether a checkpoint that is there may be replaced.
        is_ours: whether a folder is a checkpoint, so that nothing is lost with it.

    Raises:
        CheckpointError: it is a file, is there without `overwrite`, or is no checkpoint only.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file. Choose another path for the checkpoint.")
    entries = sorted(target.iterdir())
    if entries and not overwrite:
        raise CheckpointError(
            f"{target} exists already. Choose another path, or pass overwrite=True to replace it."
        )
    strange = [entry.name for entry in entries if not entry.is_file()]
    if entries and (strange or not is_ours(target)):
        what = f"it holds folders ({first_ten(strange)})" if strange else "it has no config.json"
        raise CheckpointError(f"{target} is not replaced: {what}, so it is not a checkpoint only.")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, flushed to disk; keys in order."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        flush(file)


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file's content, flushed to disk."""
    with source.open("rb") as reader, destination.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        flush(writer)


def flush(file: IO[Any]) -> None:
    """Have the system write what the file holds to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder last through a power cut, where the system has a way."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(target: Path) -> Path:
    """A new name beside `target`. What killed processes left under such names is removed."""
    if target.parent.is_dir():
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
            _remove_unless_used(left)
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold a lock on it, by which others see that its writer lives."""
    folder.mkdir(parents=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_used(folder: Path) -> None:
    """Remove a folder that no living process holds the lock of; leave it where that is unknown."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its writer lives
    finally:
        os.close(descriptor)


def _move(hidden: Path, target: Path) -> None:
    """Rename `hidden` to `target`; what was there is removed once the new one is in its place."""
    old = hidden.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        hidden.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
