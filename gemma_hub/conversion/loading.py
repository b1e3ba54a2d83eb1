"""open_for_task: what `Gemma.load` builds a model from, out of a checkpoint of any format."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gemma_hub.checkpoints import Checkpoint, open_checkpoint
from gemma_hub.checkpoints.folder import is_weight_file
from gemma_hub.checkpoints.formats.interface import Opened
from gemma_hub.checkpoints.formats.stated import companions
from gemma_hub.checkpoints.new_head import with_new_head
from gemma_hub.checkpoints.reader import EMBEDDING, check_arguments
from gemma_hub.config import CLASSIFICATIONS
from gemma_hub.conversion.opening import detect_format
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import Index, Shape, Weights, parameter_shapes
from gemma_hub.plugins.registry import plugin_registry

_ORDINARY = "huggingface"


def open_for_task(
    path: Path,
    task: str,
    allow_unknown: Sequence[str] = (),
    num_labels: int | None = None,
    seed: int = 0,
) -> tuple[Checkpoint, Mapping[str, Path]]:
    """A checkpoint of any format for one task, and the files beside its weights.

    Arguments, errors and warnings are those of `open_checkpoint`; unknown keys and tensors are
    ignored in a Hugging Face folder only.
    """
    name = _format_of(path)
    if name == _ORDINARY:
        checkpoint = open_checkpoint(path, task, allow_unknown, num_labels=num_labels, seed=seed)
        return checkpoint, companions(checkpoint.path)
    check_arguments(task, num_labels, seed)
    opened = plugin_registry().load_format(name).open(path)
    return _checkpoint(opened, task, num_labels, seed), opened.files


def _format_of(path: Path) -> str:
    """The format at `path`; the ordinary one where none is recognised, for its error messages."""
    is_ordinary = path.is_dir() and any(is_weight_file(entry.name) for entry in path.iterdir())
    if is_ordinary or not path.exists():
        return _ORDINARY
    try:
        return detect_format(path)
    except CheckpointError:
        return _ORDINARY


def _checkpoint(opened: Opened, task: str, num_labels: int | None, seed: int) -> Checkpoint:
    config, weights = opened.config, opened.weights
    needs_head = task in CLASSIFICATIONS and task != opened.task
    if needs_head and num_labels is None:
        raise CheckpointError(
            f"{opened.path} has no score head, which {task} needs. Pass num_labels to get a new "
            "one, and train it; or open a checkpoint that was trained for this task."
        )
    if num_labels is not None and num_labels != config.num_labels:
        if not needs_head:
            raise CheckpointError(
                f"{opened.path} has a score head of {config.num_labels} labels, and num_labels is "
                f"{num_labels}. Leave num_labels out to use that head."
            )
        config = config.with_labels(num_labels)
    wanted = tuple(parameter_shapes(config, "base" if needs_head else task))
    if lacking := sorted(set(wanted) - set(weights.names())):
        raise CheckpointError(f"{opened.path} has no {', '.join(lacking)}, which {task} needs.")
    weights = _Selected(weights, wanted)
    return Checkpoint(
        path=opened.path,
        config=config,
        weights=with_new_head(weights, config, task, seed) if needs_head else weights,
        eos_token_ids=config.eos_token_ids,
        dtype=weights.dtype(EMBEDDING),
    )


class _Selected:
    """Those of a model's parameters that a task calls for."""

    def __init__(self, weights: Weights, names: tuple[str, ...]) -> None:
        self._weights, self._names = weights, names

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> Shape:
        return self._weights.shape(name)

    def dtype(self, name: str) -> str:
        return self._weights.dtype(name)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        return self._weights.read(name, index)
