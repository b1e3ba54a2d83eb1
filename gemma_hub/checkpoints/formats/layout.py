"""Places: where another format keeps a canonical parameter, and how to get it there and back.

A place is a stored tensor's name and its axes in words. The letters are those of the shapes: V
vocabulary, D hidden size, F feed-forward, N query heads, K key/value heads, H head size, L layers,
P padded rows. An axis is a product of letters ("NH": heads, head-major), a number ("2": so many
parameters stacked), "L" (one parameter of every layer stacked) or a sum ("NH+KH+KH": parameters one
after another, "V+P": rows that belong to none). Reading and writing both follow from it: the
canonical "(NH) D" and a place's "N D H" say which axes to split, swap and merge.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.checkpoints.folder import listing
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, first_ten, nearest
from gemma_hub.parameters import (
    DTYPES,
    Index,
    Shape,
    Weights,
    parameter_axes,
    parameter_shapes,
)

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one parameter is in another format.

    Attributes:
        name: of the stored tensor; "{i}" is the number of the layer, "{_i}" is "" for layer 0 and
            "_1", "_2", ... for the others.
        axes: of the stored tensor, in words (see above).
        part: which of the parameters on an axis that holds several.
        plus: added to the parameter when it is written; such a tensor is float32.
        only: which models are written this way, as in `CONDITIONS`; all are read.
    """

    name: str
    axes: str
    part: int = 0
    plus: float = 0.0
    only: str = ""


CONDITIONS: dict[str, Callable[[GemmaConfig], bool]] = {
    "": lambda config: True,
    "N = K": lambda config: config.num_attention_heads == config.num_key_value_heads,
    "N > K": lambda config: config.num_attention_heads > config.num_key_value_heads,
    "never": lambda config: False,
}
"""Which models a place is for, by the words that the table has for it."""

Layout = Mapping[str, Sequence[Place]]
"""{canonical name, without "model.layers.N." for a layer's: places, the first that fits counts}."""


@dataclass(frozen=True, slots=True)
class _Spot:
    """A place of one parameter of one model, with numbers for the letters.

    Attributes:
        stored: name of the stored tensor.
        shape: of the whole stored tensor.
        index: the part of it that is this parameter.
        sizes: of the part's factors, in the order they have there.
        order: where each factor of the canonical parameter is among them.
        plus: see `Place`.
    """

    stored: str
    shape: Shape
    index: tuple[slice | int, ...]
    sizes: Shape
    order: tuple[int, ...]
    plus: float


def _spot(
    config: GemmaConfig, name: str, axes: Sequence[str], place: Place, padded_rows: int
) -> _Spot:
    """A place of a parameter, whose canonical axes are `axes`, in one model."""
    layer = _LAYER.fullmatch(name)
    i = int(layer[1]) if layer else 0
    size = {
        "V": config.vocab_size, "D": config.hidden_size, "F": config.intermediate_size,
        "N": config.num_attention_heads, "K": config.num_key_value_heads, "H": config.head_dim,
        "L": config.num_hidden_layers, "C": config.num_labels, "P": padded_rows,
    }  # fmt: skip

    def product(letters: str) -> int:
        return math.prod(size[letter] for letter in letters)

    shape: list[int] = []
    index: list[slice | int] = []
    factors = ""
    for axis in place.axes.split():
        if axis == "L" or axis.isdigit():
            shape.append(size["L"] if axis == "L" else int(axis))
            index.append(i if axis == "L" else place.part)
            continue
        summands = axis.split("+")
        start = sum(map(product, summands[: place.part])) if len(summands) > 1 else 0
        own = summands[place.part] if len(summands) > 1 else axis
        shape.append(sum(map(product, summands)))
        index.append(slice(start, start + product(own)))
        factors += own
    return _Spot(
        stored=place.name.format(i=i, _i=f"_{i}" if i else ""),
        shape=tuple(shape),
        index=tuple(index),
        sizes=tuple(size[letter] for letter in factors),
        order=tuple(factors.index(letter) for letter in "".join(axes)),
        plus=place.plus,
    )


def places(layout: Layout, name: str) -> Sequence[Place]:
    """The places of a canonical parameter in a layout; none if the layout cannot hold it."""
    layer = _LAYER.fullmatch(name)
    return layout.get(layer[2] if layer else name, ())


def homeless(layout: Layout, config: GemmaConfig, task: str) -> tuple[str, ...]:
    """Names of the parameters of a model that a layout has no place for."""
    return tuple(
        name
        for name in parameter_shapes(config, task)
        if not any(CONDITIONS[place.only](config) for place in places(layout, name))
    )


# -- reading ---------------------------------------------------------------------------------------


class CanonicalWeights:
    """Canonical `Weights` over the tensors of another format. Use `canonical_weights`."""

    def __init__(self, stored: Weights, spots: Mapping[str, _Spot], shapes: Mapping[str, Shape]):
        self._stored, self._spots, self._shapes = stored, dict(spots), shapes

    def names(self) -> tuple[str, ...]:
        return tuple(self._spots)

    def shape(self, name: str) -> Shape:
        self._spot(name)
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        spot = self._spot(name)
        return "float32" if spot.plus else self._stored.dtype(spot.stored)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        spot = self._spot(name)
        part = self._stored.read(spot.stored, spot.index).reshape(spot.sizes)
        array = part.transpose(spot.order).reshape(self._shapes[name])
        if spot.plus:
            array = array.astype(np.float32) - np.float32(spot.plus)
        array = array if index is None else array[index]
        # Whole rows, as every backend wants them; a view where the file has them like that.
        return np.ascontiguousarray(array).reshape(array.shape)

    def _spot(self, name: str) -> _Spot:
        if name not in self._spots:
            hint = nearest(name, self._spots)
            raise CheckpointError(f"There is no parameter {name!r}. {hint}".rstrip())
        return self._spots[name]


def canonical_weights(
    what: str,
    stored: Weights,
    layout: Layout,
    config: GemmaConfig,
    task: str = "causal_lm",
    *,
    dropped: Mapping[str, str] | None = None,
    advice: str = "Check that the config and the weights belong to the same model.",
) -> tuple[CanonicalWeights, dict[str, str]]:
    """The parameters of a model out of another format's tensors, all of which are accounted for.

    Args:
        what: path of the checkpoint, for messages.
        stored: the tensors, under the names that `layout` has for them.
        layout: where it keeps what.
        config: the model's.
        task: what it is for, a key of `gemma_hub.config.ARCHITECTURES`.
        dropped: {stored name: why it is not needed} of what is no parameter, such as constants.
        advice: what to do about tensors that do not fit.

    Returns:
        The weights, and `dropped` with the padded rows of each embedding added.

    Raises:
        CheckpointError: listing the tensors that are missing, unexpected, misshapen, of another
            type, or stored in a way that leaves two readings.
    """
    there, left_out = set(stored.names()), dict(dropped or {})
    shapes, axes = parameter_shapes(config, task), parameter_axes(config, task)
    spots: dict[str, _Spot] = {}
    missing: dict[str, None] = {}
    misshapen: dict[str, None] = {}
    ambiguous: dict[str, None] = {}
    for name in shapes:
        candidates = [
            _spot(config, name, axes[name], place, _padded_rows(config, place, stored, there))
            for place in places(layout, name)
        ]
        found = [spot for spot in candidates if spot.stored in there]
        fitting = [spot for spot in found if spot.shape == stored.shape(spot.stored)]
        if len(fitting) > 1:
            ambiguous[f"{fitting[0].stored} could hold {name} in two ways"] = None
        if fitting:
            spots[name] = fitting[0]
        elif found:
            expected = " or ".join(str(spot.shape) for spot in found)
            tensor = found[0].stored
            misshapen[f"{tensor} is {stored.shape(tensor)}, expected {expected}"] = None
        else:
            missing[candidates[0].stored if candidates else f"a place for {name}"] = None
    used = {spot.stored for spot in spots.values()}
    known = {*used, *left_out} | _misfits(misshapen)
    problems: dict[str, list[str]] = {
        "Missing": list(missing),
        "Unexpected": [name for name in stored.names() if name not in known],
        "Misshapen": list(misshapen),
        "Not of a type that is read": [
            f"{name} is {stored.dtype(name)}" for name in used if stored.dtype(name) not in DTYPES
        ],
        "Ambiguous": list(ambiguous),
    }
    if any(problems.values()):
        raise CheckpointError(
            f"{what}: the tensors are not those that the config calls for.\n"
            + listing(problems)
            + f"  {advice}"
        )
    left_out |= _dropped_rows(spots, config)
    return CanonicalWeights(stored, spots, shapes), left_out


def _misfits(misshapen: Mapping[str, None]) -> set[str]:
    return {text.partition(" is ")[0] for text in misshapen}


def _padded_rows(config: GemmaConfig, place: Place, stored: Weights, there: set[str]) -> int:
    """Rows past the vocabulary in a stored embedding; 0 for everything else."""
    if not place.axes.startswith("V+P") or place.name not in there:
        return 0
    return max(stored.shape(place.name)[0] - config.vocab_size, 0)


def _dropped_rows(spots: Mapping[str, _Spot], config: GemmaConfig) -> dict[str, str]:
    return {
        f"{spot.stored}[{config.vocab_size}:{spot.shape[0]}]": "rows past vocab_size, for padding"
        for spot in spots.values()
        if len(spot.index) == 2
        and spot.index[0] == slice(0, config.vocab_size)
        and spot.shape[0] > config.vocab_size
    }


# -- writing ---------------------------------------------------------------------------------------


class StoredWeights:
    """The tensors of another format, made out of canonical weights one at a time.

    Padded rows are zero. See `stored_weights`.
    """

    def __init__(self, weights: Weights, parts: Mapping[str, Mapping[str, _Spot]]) -> None:
        self._weights, self._parts = weights, {name: dict(part) for name, part in parts.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(self._parts)

    def shape(self, name: str) -> Shape:
        return next(iter(self._parts[name].values())).shape

    def dtype(self, name: str) -> str:
        parameter, spot = next(iter(self._parts[name].items()))
        return "float32" if spot.plus else self._weights.dtype(parameter)

    def parameters(self, name: str) -> tuple[str, ...]:
        """Canonical names of what one stored tensor holds."""
        return tuple(self._parts[name])

    def read(self, name: str, index: Index = None) -> np.ndarray:
        parts = self._parts[name]
        if len(parts) == 1:
            ((parameter, spot),) = parts.items()
            array = self._rearranged(parameter, spot)
            if array.shape != spot.shape:  # padded rows, or a stack of one
                whole = np.zeros(spot.shape, array.dtype)
                whole[spot.index] = array
                array = whole
        else:
            array = np.zeros(self.shape(name), DTYPES[self.dtype(name)])
            for parameter, spot in parts.items():
                array[spot.index] = self._rearranged(parameter, spot)
        return array if index is None else np.asarray(array[index])

    def _rearranged(self, parameter: str, spot: _Spot) -> np.ndarray:
        array = self._weights.read(parameter)
        if spot.plus:
            array = array.astype(np.float32) + np.float32(spot.plus)
        factors = array.reshape([spot.sizes[k] for k in spot.order])
        stored = factors.transpose(np.argsort(spot.order))
        kept = [entry.stop - entry.start for entry in spot.index if isinstance(entry, slice)]
        return stored.reshape(kept)


def stored_weights(
    weights: Weights,
    layout: Layout,
    config: GemmaConfig,
    task: str = "causal_lm",
    *,
    pad_vocab_to: int | None = None,
) -> StoredWeights:
    """The tensors of another format that hold the parameters of a model, each of them once.

    Args:
        weights: the parameters, under their canonical names.
        layout: where the format keeps what.
        config: the model's.
        task: what the weights are for.
        pad_vocab_to: rows of a padded embedding; None for as many as the vocabulary has.

    Raises:
        CheckpointError: the layout has no place for a parameter, pad_vocab_to is less than the
            vocabulary or nothing can be padded, or two parts of one tensor differ in type.
    """
    if lacking := homeless(layout, config, task):
        raise CheckpointError(f"This format has no place for {first_ten(lacking)}.")
    padded = 0 if pad_vocab_to is None else pad_vocab_to - config.vocab_size
    if padded < 0:
        raise CheckpointError(
            f"pad_vocab_to is {pad_vocab_to} and the vocabulary has {config.vocab_size} entries; "
            "expected at least as many."
        )
    parts: dict[str, dict[str, _Spot]] = {}
    for name, spot in _written_spots(layout, config, task, padded):
        parts.setdefault(spot.stored, {})[name] = spot
    for stored, spots in parts.items():
        dtypes = {weights.dtype(name) for name in spots}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{stored} would hold {', '.join(spots)}, which are of several types "
                f"({', '.join(sorted(dtypes))}). Pass a dtype to make them one."
            )
    return StoredWeights(weights, parts)


def _written_spots(
    layout: Layout, config: GemmaConfig, task: str, padded: int
) -> Iterator[tuple[str, _Spot]]:
    for name, axes in parameter_axes(config, task).items():
        place = next(p for p in places(layout, name) if CONDITIONS[p.only](config))
        yield name, _spot(config, name, axes, place, padded)
