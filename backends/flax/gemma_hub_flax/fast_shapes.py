"""Padding of calls to a few lengths, so that few programs are compiled.

XLA compiles a program for fixed shapes, which takes seconds; a length that differs by a token would
have it compiled again. The padding stands behind the real tokens and is masked, so that it changes
nothing before it: slots, positions and results are those of the call as it was made.
Axes: B batch, T tokens, S key slots.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from gemma_hub.backend import Cache
from gemma_hub.inputs import ModelInputs

_IGNORED = -100  # a label that does not count


def padded_length(length: int, room: int | None = None) -> int:
    """The length that a program is compiled for, `length` or more.

    1, powers of two from 8 to 64, then four lengths to each doubling; or `length` itself where
    that would need more than `room`.
    """
    if length <= 64:
        padded = 1 if length == 1 else max(8, 1 << (length - 1).bit_length())
    else:
        step = 1 << ((length - 1).bit_length() - 3)
        padded = -(-length // step) * step
    return padded if room is None or padded <= room else length


def whole_length(inputs: ModelInputs) -> int:
    """`padded_length` of a call without a cache, or its own where a query sees nothing.

    Such a query, in the padding before a row's tokens, averages over all slots, so that more of
    them change its result; and a loss may count it.
    """
    length = inputs.shape[1]
    return padded_length(length) if inputs.attention_mask[:, 0].all() else length


def padded_inputs(inputs: ModelInputs, length: int) -> ModelInputs:
    """The inputs with masked tokens behind the (B, T) given ones, (B, length)."""
    more = length - inputs.shape[1]
    if more == 0:
        return inputs
    labels = inputs.labels
    if labels is not None and labels.shape == inputs.shape and inputs.pooled_positions is None:
        labels = _widened(labels, more, _IGNORED)  # one label a token, not one a row
    return dataclasses.replace(
        inputs,
        input_ids=_widened(inputs.input_ids, more),
        inputs_embeds=_widened(inputs.inputs_embeds, more),
        attention_mask=_widened(inputs.attention_mask, more),
        position_ids=_widened(inputs.position_ids, more),
        labels=labels,
    )


def _widened(array: Any, more: int, value: int = 0) -> Any:
    """(B, T, ...) NumPy array with `more` tokens of `value` behind; None stays None."""
    if array is None:
        return None
    width = [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, width, constant_values=value)


def widened_valid(valid: np.ndarray, length: int) -> np.ndarray:
    """(B, S) valid slots of a cache that has `length` in its arrays; the others are empty."""
    wide: np.ndarray = _widened(valid, length - valid.shape[1])
    return wide


def widened_slots(slots: np.ndarray, caches: Sequence[Cache]) -> np.ndarray:
    """(B, S) slots of `Cache.gathered`, counted over the arrays, which are longer than the books.

    S is a padded length too; -1 stands where a slot stays empty.
    """
    sizes = [(*cache.valid.shape, num_slots(cache)) for cache in caches]
    places = [
        first + np.arange(rows)[:, None] * wide + np.arange(capacity)
        for first, (rows, capacity, wide) in zip(
            np.cumsum([0, *(rows * wide for rows, _, wide in sizes)]), sizes, strict=False
        )
    ]
    counted = np.concatenate([*(each.ravel() for each in places), [-1]])
    more = padded_length(slots.shape[1]) - slots.shape[1]
    wide: np.ndarray = _widened(counted[slots], more, -1)
    return wide


def num_slots(cache: Cache) -> int:
    """Number of slots in the arrays of a cache, the padding included."""
    return int(cache.arrays.layers[0].keys.shape[1])


def unpadded(out: Any, num_tokens: int, capacity: int) -> Any:
    """The part of a padded call's outputs that the call as it was made has.

    Args:
        out: a `BaseModelOutput` or a `HeadOutput`.
        num_tokens: T.
        capacity: S of the attention probabilities.
    """
    changes: dict[str, Any] = {}
    for name in ("logits", "last_hidden_state"):
        array = getattr(out, name, None)
        if array is not None and array.ndim == 3:  # of each token
            changes[name] = _cut(array, num_tokens)
    if out.hidden_states is not None:
        changes["hidden_states"] = tuple(_cut(x, num_tokens) for x in out.hidden_states)
    if out.attentions is not None:
        changes["attentions"] = tuple(_cut(p, num_tokens, capacity) for p in out.attentions)
    return out._replace(**changes)


def _cut(array: Array, num_tokens: int, capacity: int | None = None) -> Array:
    """(B, T, D), or (B, N, T, S) where `capacity` is given; itself where that is its shape."""
    if capacity is not None:
        fits = array.shape[2:] == (num_tokens, capacity)
        return array if fits else array[:, :, :num_tokens, :capacity]
    return array if array.shape[1] <= num_tokens else array[:, :num_tokens]


class LastTokens:
    """A decoder whose last hidden states are those of a padded call's last real tokens.

    Stands in for the decoder in a model with a head, so that the head need not know of padding.
    """

    def __init__(self, decoder: Any, num_tokens: Any, count: int) -> None:
        """The last `count` of the first `num_tokens` positions, which may be traced."""
        self.embed_tokens = decoder.embed_tokens  # which a tied head reads
        self._decoder, self._num_tokens, self._count = decoder, num_tokens, count

    def __call__(self, *arguments: Any) -> Any:
        out = self._decoder(*arguments)
        last = jax.lax.dynamic_slice_in_dim(
            out.last_hidden_state, self._num_tokens - self._count, self._count, axis=1
        )
        return out._replace(last_hidden_state=last)
