"""The norms of a GGUF, which holds w + 1 in float32 where a checkpoint holds w.

The sum cannot always be undone: a small w, or nearly any w that is a float32, loses its last bits.
Where that happens the file gets the norms as they were in addition, under a key of our own that
other programs ignore; they count only as long as they are what the stored sums were made of.
"""

from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from gemma_hub.checkpoints.formats.gguf_file import GgufFile
from gemma_hub.checkpoints.formats.layout import Layout, StoredWeights, places, stored_weights
from gemma_hub.checkpoints.safetensors_file import FORMAT_DTYPES
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import DTYPES, Index, Shape, Weights

NORMS_KEY = "gemma_hub.norms"
"""Its value is an array of bytes, a safetensors file of all norms by canonical name."""

_GIVEN_TYPES = ("float32", "bfloat16", "float16")
_MAX_ENTRY = 1000  # bytes of a safetensors header for one tensor; far more than a name takes


class WithNorms:
    """`Weights` with some of its tensors replaced by arrays."""

    def __init__(self, weights: Weights, norms: Mapping[str, np.ndarray]) -> None:
        self._weights, self._norms = weights, norms

    def names(self) -> tuple[str, ...]:
        return self._weights.names()

    def shape(self, name: str) -> Shape:
        return self._weights.shape(name)

    def dtype(self, name: str) -> str:
        return self._norms[name].dtype.name if name in self._norms else self._weights.dtype(name)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        if name not in self._norms:
            return self._weights.read(name, index)
        array = self._norms[name]
        return array if index is None else np.asarray(array[index])


def norm_names(weights: Weights, layout: Layout) -> list[str]:
    """The parameters that are stored as a sum."""
    return [name for name in weights.names() if any(p.plus for p in places(layout, name))]


@np.errstate(invalid="ignore")  # a NaN of a damaged file stays one, without a warning
def with_norms(
    canonical: Weights, file: GgufFile, layout: Layout, config: GemmaConfig, task: str
) -> tuple[WithNorms, tuple[str, ...]]:
    """The weights of a GGUF with its norms as they were, and notes on what was ignored.

    The norms are read here, a few hundred kilobytes, as their type depends on their values.

    Args:
        canonical: the weights by the layout alone, the norms as float32 differences.
        file: where they are from.
        layout: of a GGUF.
        config: the model's.
        task: what it is for.
    """
    names = norm_names(canonical, layout)
    differences = {name: canonical.read(name) for name in names}
    weights = WithNorms(canonical, unfolded_norms(differences, matrix_dtype(canonical, names)))
    if NORMS_KEY not in file.metadata:
        return weights, ()
    kept = _kept(file, differences)
    if kept is not None:
        candidate = WithNorms(canonical, kept)
        folded = stored_weights(candidate, layout, config, task)
        if all(
            file.dtype(name) == "float32" and same_bits(folded.read(name), file.read(name))
            for name in folded.names()
            if folded.parameters(name)[0] in kept
        ):
            return candidate, ()
    return weights, (
        f"Its {NORMS_KEY} does not belong to its norms, which another program changed; it was "
        "ignored.",
    )


def _kept(file: GgufFile, expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The norms under our key, if they have the names, the shapes and a type that norms have."""
    value = file.metadata[NORMS_KEY]
    most = sum(array.nbytes + _MAX_ENTRY for array in expected.values())
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.size > most:
        return None
    try:
        entries = dict(safetensors.deserialize(value.tobytes()))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    kept: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        dtype = FORMAT_DTYPES.get(entry["dtype"], "")
        shape = tuple(entry["shape"])
        if name not in expected or shape != expected[name].shape or dtype not in _GIVEN_TYPES:
            return None
        kept[name] = np.frombuffer(bytearray(entry["data"]), DTYPES[dtype]).reshape(shape)
    return kept if kept.keys() == expected.keys() else None


@np.errstate(invalid="ignore")
def norms_to_keep(weights: Weights, stored: StoredWeights, layout: Layout) -> bytes | None:
    """The norms for `NORMS_KEY`; None where the stored sums give them back bit for bit."""
    norms = {name: weights.read(name) for name in norm_names(weights, layout)}
    differences: dict[str, np.ndarray] = {}
    for name in stored.names():
        parameter = stored.parameters(name)[0]
        if parameter in norms:
            differences[parameter] = stored.read(name) - np.float32(1)
    read = unfolded_norms(differences, matrix_dtype(weights, list(norms)))
    if all(read[name].dtype == norms[name].dtype for name in norms) and all(
        same_bits(read[name], norms[name]) for name in norms
    ):
        return None
    return safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in norms.items()}
    )


@np.errstate(invalid="ignore")
def values_changed(weights: Weights, layout: Layout) -> int:
    """How many values of the norms are others after + 1 and - 1 in float32."""
    count = 0
    for name in norm_names(weights, layout):
        norm = weights.read(name).astype(np.float32)
        back = norm + np.float32(1) - np.float32(1)
        count += int(np.count_nonzero(back.view(np.uint32) != norm.view(np.uint32)))
    return count


def matrix_dtype(weights: Weights, norms: list[str]) -> str:
    """The type of all matrices; float32 where they have several."""
    dtypes = {weights.dtype(name) for name in set(weights.names()).difference(norms)}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def unfolded_norms(differences: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The norms in the type of the matrices, if that holds all of them exactly."""
    with np.errstate(all="ignore"):  # what does not fit is found by the comparison
        cast = {name: array.astype(DTYPES[dtype]) for name, array in differences.items()}
        exact = all(
            same_bits(array, differences[name].astype(DTYPES[dtype]).astype(np.float32))
            for name, array in differences.items()
        )
    return cast if exact else dict(differences)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal, zeros by their sign and NaNs too."""
    return bool(one.tobytes() == other.tobytes())
