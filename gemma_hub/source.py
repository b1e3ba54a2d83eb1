"""resolved: from what a user calls a checkpoint to its folder."""

import os
from pathlib import Path

from gemma_hub.config import GemmaConfig, read_json_object
from gemma_hub.errors import CheckpointNotFoundError, ConfigError
from gemma_hub.hub import Part, fetched, repository
from gemma_hub.plugins.registry import plugin_registry


def resolved(source: str | os.PathLike[str], part: Part = "model") -> Path:
    """The folder or file that `source` means; it need not exist where `source` is only a path.

    Args:
        source: a path; the name of an installed checkpoint; or a repository of the Hugging Face
            hub, `owner/name` or `owner/name@revision`, which is fetched. What is on this machine
            goes before any name.
        part: what of a repository to fetch.

    Raises:
        CheckpointNotFoundError: there is no such name or repository.
        ConfigError: the repository's model is of another kind; its weights were not fetched.
        CheckpointError: it cannot be fetched.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.exists() or isinstance(source, os.PathLike):
        return path
    if wanted := repository(name):
        return fetched(wanted, part, _check_kind)
    if name.startswith((".", "~")) or os.sep in name or (os.altsep or os.sep) in name:
        return path
    try:
        return Path(plugin_registry().checkpoint(name).path)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"{error} There is no folder of that name either.") from None


def _check_kind(path: Path) -> None:
    """Refuse the config.json of another kind of model; its other values are for who loads it."""
    raw = read_json_object(path, ConfigError)
    try:
        GemmaConfig.from_dict({"model_type": raw.get("model_type", "gemma")})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
