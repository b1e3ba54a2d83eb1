"""What this distribution tells gemma_hub: its checkpoints. Imports no array framework."""

from pathlib import Path

from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import CheckpointSpec

_HERE = Path(__file__).resolve().parent


@hookimpl
def gemma_hub_checkpoints() -> list[CheckpointSpec]:
    return [
        CheckpointSpec(
            name="tiny",
            path=str(_HERE / "checkpoint"),
            summary="4 million parameters, trained on fairy tales by this project",
        ),
        CheckpointSpec(
            name="tiny-intents",
            path=str(_HERE / "intents"),
            summary="tiny, fine-tuned to classify queries to a voice assistant by 7 intents",
        ),
        CheckpointSpec(
            name="tiny-slots",
            path=str(_HERE / "slots"),
            summary="tiny, fine-tuned to tag the slots of such queries",
        ),
    ]
