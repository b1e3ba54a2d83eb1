"""Rows of ids to a batch: pairs, truncation, padding, and arrays of a framework."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np

from gemma_hub.errors import InputError
from gemma_hub.tokenizers.engine import Span
from gemma_hub.tokenizers.settings import Side, TokenizerSettings

Padding = bool | Literal["longest", "max_length", "do_not_pad"]
Truncation = bool | Literal["longest_first", "only_first", "only_second", "do_not_truncate"]

_PADDINGS = {True: "longest", False: "do_not_pad"}
_TRUNCATIONS = {True: "longest_first", False: "do_not_truncate"}
# What `return_tensors` takes: the module that makes the arrays, which is imported when it is asked
# for, the function, and the type of integers there.
_ARRAYS = {
    "np": ("numpy", "asarray", np.int64),
    "pt": ("torch", "from_numpy", np.int64),
    "jax": ("jax.numpy", "asarray", np.int32),
}
FILLING: dict[str, Any] = {
    "input_ids": None,
    "token_type_ids": 0,
    "attention_mask": 0,
    "special_tokens_mask": 1,
    "offset_mapping": (0, 0),
    "labels": -100,
}
"""What stands at padding, by the name of an entry; at input_ids it is the tokenizer's pad token."""


class BatchEncoding(dict[str, Any]):
    """What a tokenizer's call returns: a dict whose entries are attributes too.

    Entries: input_ids, attention_mask (1 at tokens, 0 at padding), and those that were asked for:
    token_type_ids, special_tokens_mask, offset_mapping, length. Each is a list for one text, a
    list of lists for several, or one array of shape (B, T).
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"This encoding has no {name!r}; it has {', '.join(self)}. Ask the call for it, as "
                "in return_offsets_mapping=True."
            ) from None

    def to(self, device: Any) -> "BatchEncoding":
        """The encoding with its arrays on a device, where they have a `to` method (torch)."""
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()}
        return BatchEncoding(moved)


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one text; `spans` is empty where nobody asked for it."""

    ids: Sequence[int]
    spans: Sequence[Span] = ()

    def cut(self, length: int, side: Side) -> "Part":
        """The first `length` tokens, or with side "left" the last."""
        kept = slice(0, length) if side == "right" else slice(len(self.ids) - length, None)
        return Part(self.ids[kept], self.spans[kept])


class Row:
    """One text, or a pair of texts, with the tokens around each.

    Attributes:
        ids: token ids.
    """

    __slots__ = ("_around", "_parts", "ids")

    def __init__(self, parts: Sequence[Part], bos: Sequence[int], eos: Sequence[int]) -> None:
        """A row of `parts`, with `bos` before and `eos` after each."""
        self._parts = parts
        self._around = len(bos), len(eos)
        self.ids = [token_id for part in parts for token_id in (*bos, *part.ids, *eos)]

    @property
    def spans(self) -> list[Span]:
        """Of each token in its own text; (0, 0) for those around."""
        before, after = ([(0, 0)] * count for count in self._around)
        return [span for part in self._parts for span in (*before, *part.spans, *after)]

    @property
    def types(self) -> list[int]:
        """0 for the tokens of the first text and those around it, and 1 for the second."""
        around = sum(self._around)
        return [
            kind for kind, part in enumerate(self._parts) for _ in range(len(part.ids) + around)
        ]

    @property
    def added(self) -> list[int]:
        """1 for the tokens that were put around the texts."""
        before, after = ([1] * count for count in self._around)
        return [one for p in self._parts for one in (*before, *[0] * len(p.ids), *after)]


@dataclass(frozen=True, slots=True)
class Limits:
    """How a call pads and truncates, with every default resolved.

    Attributes:
        padding: "longest", "max_length" or "do_not_pad".
        truncation: "longest_first", "only_first", "only_second" or "do_not_truncate".
        max_length: tokens, special ones included; None where nothing needs it.
        pad_to_multiple_of: rows are padded to a multiple of it; None for any length.
        padding_side: where rows are filled up.
        truncation_side: which end is cut off.
    """

    padding: str
    truncation: str
    max_length: int | None
    pad_to_multiple_of: int | None
    padding_side: Side
    truncation_side: Side

    @classmethod
    def resolved(
        cls,
        settings: TokenizerSettings,
        padding: Padding = False,
        truncation: Truncation = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
    ) -> "Limits":
        """The limits of a call.

        Raises:
            InputError: an argument is none of those it may be, or a length is needed and missing.
        """
        strategy = _choice("padding", padding, _PADDINGS, ("longest", "max_length", "do_not_pad"))
        truncating = _choice(
            "truncation",
            truncation,
            _TRUNCATIONS,
            ("longest_first", "only_first", "only_second", "do_not_truncate"),
        )
        _check_count("max_length", max_length)
        _check_count("pad_to_multiple_of", pad_to_multiple_of)
        side = settings.padding_side if padding_side is None else padding_side
        if side not in ("left", "right"):
            raise InputError(f"padding_side is {side!r}; expected 'left' or 'right'.")
        length = settings.model_max_length if max_length is None else max_length
        if length is None and (strategy == "max_length" or truncating != "do_not_truncate"):
            raise InputError(
                f"padding={padding!r} and truncation={truncation!r} need a length, and this "
                "tokenizer has no model_max_length. Pass max_length=."
            )
        return cls(strategy, truncating, length, pad_to_multiple_of, side, settings.truncation_side)


def _choice(name: str, value: Any, aliases: Mapping[Any, str], known: Sequence[str]) -> str:
    chosen = aliases[value] if isinstance(value, bool) else value
    if chosen not in known:
        expected = ", ".join(map(repr, known))
        raise InputError(f"{name} is {value!r}; expected True, False, {expected}.")
    return str(chosen)


def _check_count(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and not (is_number and value >= 1):
        raise InputError(f"{name} is {value!r}; expected an integer from 1 up.")


def truncated(parts: Sequence[Part], around: int, limits: Limits) -> Sequence[Part]:
    """One text, or two, cut so that with `around` tokens more they have at most `max_length`.

    Of two texts the longer one is cut first, and of equal ones the second.

    Raises:
        InputError: there is no room, or the text that may be cut is too short for it.
    """
    if limits.truncation == "do_not_truncate" or limits.max_length is None:
        return parts
    lengths = [len(part.ids) for part in parts]
    excess = sum(lengths) + around - limits.max_length
    if excess <= 0:
        return parts
    room = limits.max_length - around
    if room < 0:
        raise InputError(
            f"max_length is {limits.max_length}, and the tokens around the texts alone are "
            f"{around}. Pass a larger max_length, or add_special_tokens=False."
        )
    kept = _kept(lengths, room, limits.truncation)
    return [part.cut(n, limits.truncation_side) for part, n in zip(parts, kept, strict=True)]


def _kept(lengths: Sequence[int], room: int, strategy: str) -> list[int]:
    if len(lengths) == 1 or strategy in ("only_first", "only_second"):
        place = 1 if strategy == "only_second" else 0
        if place >= len(lengths):
            raise InputError("truncation='only_second' needs a second text; give text_pair.")
        kept = list(lengths)
        kept[place] = room - (sum(lengths) - lengths[place])
        if kept[place] < 0:
            raise InputError(
                f"truncation={strategy!r} cannot make the texts short enough: the other one alone "
                f"has more than the {room} tokens of room. Use truncation=True."
            )
        return kept
    first, second = lengths
    if first >= second:
        first = max(room - second, (room + 1) // 2)
        return [first, room - first]
    second = max(room - first, room // 2)
    return [room - second, second]


def padded(columns: dict[str, list[list[Any]]], pad_id: int, limits: Limits) -> None:
    """Fill the rows of every column up, in place, to one length or to `max_length`."""
    if limits.padding == "do_not_pad":
        return
    longest = max(map(len, columns["input_ids"]), default=0)
    length = limits.max_length if limits.padding == "max_length" else longest
    assert length is not None  # Limits.resolved saw to it
    multiple = limits.pad_to_multiple_of or 1
    length = -(-length // multiple) * multiple
    for name, rows in columns.items():
        value = pad_id if name == "input_ids" else FILLING[name]
        for i, row in enumerate(rows):
            filling = [value] * (length - len(row))
            rows[i] = filling + row if limits.padding_side == "left" else row + filling


def as_arrays(columns: Mapping[str, Sequence[Any]], framework: str) -> dict[str, Any]:
    """Every column as one array of a framework: "np", "pt" (torch) or "jax".

    Integers are int64, and int32 in JAX, which has no other unless told.

    Raises:
        InputError: there is no such framework here, or the rows have unequal lengths.
    """
    if framework not in list(_ARRAYS):
        known = ", ".join(map(repr, _ARRAYS))
        raise InputError(f"return_tensors is {framework!r}; expected {known}.")
    module_name, function, dtype = _ARRAYS[framework]
    lengths = sorted({len(row) for row in columns["input_ids"]})
    if len(lengths) > 1:
        raise InputError(
            f"The rows have {lengths[0]} to {lengths[-1]} tokens, and an array needs rows of one "
            "length. Pass padding=True, or truncation=True with max_length."
        )
    try:
        make = getattr(import_module(module_name), function)
    except ImportError as error:
        raise InputError(
            f"return_tensors={framework!r} needs {module_name.partition('.')[0]}, which cannot be "
            f"imported ({error}). Install it, or use return_tensors='np'."
        ) from error
    shape = (len(columns["input_ids"]), *lengths) if lengths else (0, 0)
    shapes = {"length": shape[:1], "offset_mapping": (*shape, 2)}  # of no row, or no token, too
    return {
        name: make(np.asarray(rows, dtype).reshape(shapes.get(name, shape)))
        for name, rows in columns.items()
    }
