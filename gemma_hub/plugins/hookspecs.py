"""The hooks that a plug-in may implement. Entry-point group: `gemma_hub`.

A plug-in is a light module: it imports no array framework and loads in under 50 ms.
"""

from collections.abc import Sequence
from typing import Any

import pluggy

from gemma_hub.plugins.spec import BackendSpec, CheckpointSpec, FormatSpec

PROJECT = "gemma_hub"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def gemma_hub_backends() -> Sequence[BackendSpec]:  # type: ignore[empty-body]
    """Backends that this plug-in offers."""


@hookspec
def gemma_hub_checkpoints() -> Sequence[CheckpointSpec]:  # type: ignore[empty-body]
    """Checkpoints that this plug-in ships, by name."""


@hookspec
def gemma_hub_checkpoint_formats() -> Sequence[FormatSpec]:  # type: ignore[empty-body]
    """Checkpoint formats that this plug-in reads and writes."""


@hookspec
def gemma_hub_cli(app: Any) -> None:
    """Add commands to `app`, the typer.Typer of `gemma-hub`."""
