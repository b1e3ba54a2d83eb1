"""Where gemma_hub keeps files that it can make again."""

import os
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
