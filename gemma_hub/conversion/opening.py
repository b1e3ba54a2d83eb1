"""open_source: a checkpoint of whatever format, by asking each format whether it is its own."""

import os
from pathlib import Path

from gemma_hub.checkpoints.formats.interface import CheckpointFormat, Opened
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.plugins.registry import plugin_registry
from gemma_hub.source import resolved


def detect_format(path: Path) -> str:
    """The name of the format that a file or a folder has, the first that claims it.

    Raises:
        CheckpointNotFoundError: there is nothing at `path`.
        CheckpointError: no format knows it.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"There is no checkpoint at {path}.")
    registry = plugin_registry()
    names = list(registry.formats())
    for name in names:
        try:
            found = registry.load_format(name).detect(path)
        except Exception:  # noqa: BLE001  # a plug-in's fault, which the doctor shows
            continue
        if found:
            return name
    raise CheckpointError(
        f"{path} is in no format that is known here: {', '.join(names)}. If it is in one of them, "
        "name it (--from FORMAT); a folder of another kind must hold the checkpoint itself."
    )


def open_source(
    source: str | os.PathLike[str],
    format_name: str | None = None,
    config: GemmaConfig | None = None,
) -> tuple[CheckpointFormat, Opened]:
    """The checkpoint that `source` means, and its format. No tensor is read.

    Args:
        source: a file or a folder, the name of an installed checkpoint, or a repository id.
        format_name: its format, where it is known; None to find out.
        config: the model's, instead of what the checkpoint says.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CheckpointError: its format is unknown, or it is damaged.
    """
    path = resolved(source)
    if not path.exists():
        raise CheckpointNotFoundError(f"There is no checkpoint at {path}.")
    form = plugin_registry().load_format(format_name or detect_format(path))
    return form, form.open(path, config)
