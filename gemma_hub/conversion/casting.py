"""Weights in another type, with a count of the values that it changes."""

from collections.abc import Mapping

import numpy as np

from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, Index, Shape, Weights

_AT_ONCE = 4 << 20  # values


class CastWeights:
    """`Weights` in one type, rounded to nearest when they are read.

    Attributes:
        changed: {name: how many values the type cannot hold exactly}, of the tensors read so far.
    """

    def __init__(self, weights: Weights, dtype: str) -> None:
        self._weights, self._dtype = weights, dtype
        self._changed: dict[str, int] = {}

    @property
    def changed(self) -> Mapping[str, int]:
        return {name: count for name, count in self._changed.items() if count}

    def names(self) -> tuple[str, ...]:
        return self._weights.names()

    def shape(self, name: str) -> Shape:
        return self._weights.shape(name)

    def dtype(self, name: str) -> str:
        self._weights.dtype(name)  # so that an unknown name is an error
        return self._dtype

    def read(self, name: str, index: Index = None) -> np.ndarray:
        if self._weights.dtype(name) == self._dtype:
            return self._weights.read(name, index)
        # Part by part, so that what is compared is never as large as the tensor.
        source = self._weights.read(name, index)
        flat = source.reshape(-1)
        result = np.empty(flat.size, DTYPES[self._dtype])
        changed = 0
        for start in range(0, flat.size, _AT_ONCE):
            part = flat[start : start + _AT_ONCE]
            with np.errstate(over="ignore"):  # reported below, with the tensor's name
                cast = part.astype(DTYPES[self._dtype])
            if (np.isinf(cast) & np.isfinite(part)).any():
                raise CheckpointError(
                    f"{name} holds {np.abs(part).max():g}, which is infinite in {self._dtype}. "
                    "Choose a type with a wider range: bfloat16 or float32."
                )
            changed += int(np.count_nonzero((cast.astype(part.dtype) != part) & (part == part)))
            result[start : start + part.size] = cast
        if index is None:
            self._changed[name] = changed
        return result.reshape(source.shape)
