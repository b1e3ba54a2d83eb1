"""Where the numbers of the reference come from: parameters, sums and rounding.

`Arithmetic` is all that a witness changes. The operations of Gemma are built on it, and know
nothing of types.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import Weights, number_of_parameters, parameter_shapes

Array = np.ndarray

_KEEP_BYTES = 10**9  # parameters stay in float64 between calls if all of them fit in this


class Arithmetic:
    """Parameters in the compute type, and the sums and the rounding that everything goes through.

    Every array is float64, also in subclasses that round: they round to values that a narrower
    type can hold.

    Attributes:
        config: the model's configuration.
        weights: its parameters, read when they are needed.
        task: a key of `gemma_hub.config.ARCHITECTURES`.
        shapes: {name: shape} of every parameter.
        dtype: name of the compute type that this model stands for.
    """

    dtype = "float64"

    def __init__(self, config: GemmaConfig, weights: Weights, task: str = "causal_lm") -> None:
        self.config = config
        self.weights = weights
        self.task = task
        self.shapes = parameter_shapes(config, task)
        self._small = number_of_parameters(config, task) * 8 <= _KEEP_BYTES
        self._read: dict[str, Array] = {}
        self._tape: dict[str, Array] | None = None

    def to_compute(self, x: Array) -> Array:
        """A parameter or an input in the compute type, rounded to nearest."""
        return np.asarray(x).astype(np.float64)

    def parameter(self, name: str) -> Array:
        """One whole parameter in the compute type."""
        if name in self._read:
            return self._read[name]
        value = self.to_compute(self.weights.read(name))
        if self._small:
            self._read[name] = value
        return value

    def rows(self, name: str, index: Array | slice) -> Array:
        """Rows of one parameter; of a large model without reading or converting the others."""
        if self._small:
            return self.parameter(name)[index]
        if isinstance(index, slice):
            return self.to_compute(self.weights.read(name, index))
        distinct, places = np.unique(index, return_inverse=True)
        found = np.stack([self.weights.read(name, int(row)) for row in distinct])
        return self.to_compute(found)[places.reshape(index.shape)]

    def contract(self, subscripts: str, a: Array, b: Array) -> Array:
        """`numpy.einsum(subscripts, a, b)`: the only way in which anything is summed."""
        return np.asarray(np.einsum(subscripts, a, b, optimize=True))

    def store(self, x: Array) -> Array:
        """`x` rounded to the compute type."""
        return x

    def single(self, x: Array) -> Array:
        """`x` rounded to float32, where the rules ask for float32 whatever the compute type."""
        return x

    def keep(self, name: str, value: Array) -> Array:
        """`value`, noted under `name` if this call needs intermediate results afterwards."""
        if self._tape is not None:
            self._tape[name] = value
        return value

    @contextmanager
    def taping(self) -> Iterator[dict[str, Array]]:
        """Within it `keep` notes; gives the notes, the same ones to whoever asks within it."""
        before = self._tape
        self._tape = {} if before is None else before
        try:
            yield self._tape
        finally:
            self._tape = before
