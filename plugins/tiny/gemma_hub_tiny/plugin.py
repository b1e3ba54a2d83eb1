"""What this distribution tells gemma_hub: one checkpoint. Imports no array framework."""

from pathlib import Path

from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import CheckpointSpec


@hookimpl
def gemma_hub_checkpoints() -> list[CheckpointSpec]:
    return [
        CheckpointSpec(
            name="tiny",
            path=str(Path(__file__).resolve().parent / "checkpoint"),
            summary="4 million parameters, trained on fairy tales by this project",
        )
    ]
