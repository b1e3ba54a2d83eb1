"""A classification head for a checkpoint that has none: drawn from a seed, and never in silence."""

import hashlib
import inspect
import warnings

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import NewHeadWarning
from gemma_hub.parameters import (
    SCORE_BIAS,
    SCORE_WEIGHT,
    ArrayWeights,
    Index,
    Shape,
    Weights,
    parameter_shapes,
)

HEAD = (SCORE_WEIGHT, SCORE_BIAS)


class WeightsWithHead:
    """The `Weights` of a checkpoint and those of a head that it does not have."""

    def __init__(self, body: Weights, head: Weights) -> None:
        self._body, self._head = body, head

    def names(self) -> tuple[str, ...]:
        return (*self._body.names(), *self._head.names())

    def shape(self, name: str) -> Shape:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> str:
        return self._of(name).dtype(name)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        return self._of(name).read(name, index)

    def _of(self, name: str) -> Weights:
        return self._head if name in self._head.names() else self._body


def with_new_head(body: Weights, config: GemmaConfig, task: str, seed: int) -> WeightsWithHead:
    """`body` with a new head of `config.num_labels` rows, announced with a `NewHeadWarning`.

    Weights are normal with the config's initializer_range, a bias is zero, as in Transformers. They
    depend on the seed and on their name only, so that every backend starts from the same head.
    """
    shapes = parameter_shapes(config, task)
    head = {name: _drawn(name, shapes[name], config, seed) for name in HEAD if name in shapes}
    warnings.warn(
        f"The checkpoint has no head for {task}: {' and '.join(head)} with num_labels="
        f"{config.num_labels} are new, drawn with seed {seed}. Train the model before you use "
        "what it says.",
        NewHeadWarning,
        stacklevel=_frames_of_ours(),
    )
    return WeightsWithHead(body, ArrayWeights(head))


def _frames_of_ours() -> int:
    """Level at which a warning of the caller names the line outside this package."""
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] == "gemma_hub":
        frame, level = frame.f_back, level + 1
    return level


def _drawn(name: str, shape: Shape, config: GemmaConfig, seed: int) -> np.ndarray:
    if name == SCORE_BIAS:
        return np.zeros(shape, np.float32)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    normal = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)
    return (config.initializer_range * normal).astype(np.float32)
