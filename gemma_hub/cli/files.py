"""Files that a command writes when all is done."""

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
