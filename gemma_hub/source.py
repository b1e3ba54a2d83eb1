"""resolved: from what a user calls a checkpoint to its folder."""

import os
import re
from pathlib import Path

from gemma_hub.errors import CheckpointNotFoundError
from gemma_hub.plugins.registry import plugin_registry

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolved(source: str | os.PathLike[str]) -> Path:
    """The folder that `source` means; it need not exist where `source` can only be a path."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.exists() or isinstance(source, os.PathLike):
        return path
    if _REPO_ID.fullmatch(name):
        folder = name.rpartition("/")[2]
        raise CheckpointNotFoundError(
            f"There is no folder {name!r}. If it is a repository of the Hugging Face hub: this "
            "version does not fetch from there. Download it with 'pip install huggingface_hub' "
            f"and 'hf download {name} --local-dir {folder}', then load {folder!r}."
        )
    if name.startswith((".", "~")) or os.sep in name or (os.altsep or os.sep) in name:
        return path
    try:
        return Path(plugin_registry().checkpoint(name).path)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"{error} There is no folder of that name either.") from None
