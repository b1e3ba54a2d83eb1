"""Rows of a context that are at places of their own: they gain and lose unequal numbers of tokens.

In a cache all rows fill the same slots, so that a row which gains less than another leaves some
empty. They are given back by making the context anew, once none are left.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.generation.context import Context, left_padded
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.prompts import read_prompts

SPARE_CALLS = 8
"""Calls that leave all their slots empty before the context is made anew, at least."""


class RaggedContext:
    """A context, and how many of its slots are used. The model must be one that `can_edit`."""

    def __init__(
        self, context: Context, lengths: np.ndarray, capacity: int, widest: int, pad: int
    ) -> None:
        """The rows of `context`.

        Args:
            context: whose rows end in one slot, and begin in the first at the earliest.
            lengths: (B,) tokens of each row.
            capacity: slots, `widest` more than a row has tokens at least.
            widest: tokens that a row gains in a call, at most.
            pad: id at padding.
        """
        self._context = context
        self._lengths = lengths
        self._ends = np.full(len(lengths), lengths.max())  # the slot behind each row's last token
        self._capacity, self._widest, self._pad = capacity, widest, pad

    @classmethod
    def read(
        cls,
        model: Model,
        config: GemmaConfig,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        widest: int,
        prefix: Prefix | None = None,
    ) -> tuple[Self, np.ndarray]:
        """A context that has read `prompts`, and the (B, V) logits after each.

        Args:
            model: one that `can_edit`.
            config: the model's.
            prompts: (T,) ids of each row, that begin with those of `prefix`.
            max_new_tokens: that a row may come to have.
            widest: tokens that a row gains in a call, at most.
            prefix: what the model has read already.
        """
        lengths = np.array([len(ids) for ids in prompts])
        capacity = int(lengths.max()) + max_new_tokens + SPARE_CALLS * widest
        read = read_prompts(model, config, prompts, capacity, prefix)
        context = read.contexts[0]
        if not read.is_one_context:
            context = context.gather(read.places, capacity, *read.contexts[1:])
        pad = config.pad_token_id or 0
        return cls(context, lengths, capacity, widest, pad), read.logits

    def extend(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """(B, T, V) logits of the last slots; a row's n tokens are its last n.

        Args:
            tokens: what each row gains, if anything; one gains some.
        """
        longest = max(map(len, tokens))
        # Powers of two, so that a backend which compiles has few shapes to compile.
        width = min(1 << (longest - 1).bit_length(), self._widest)
        if self._ends.max() + width > self._capacity:
            self.select(range(len(tokens)))
        filled = [np.asarray(row, np.int64) for row in tokens]
        ids, mask = left_padded(filled, self._pad)
        ids, mask = (np.pad(array, ((0, 0), (width - longest, 0))) for array in (ids, mask))
        end = self._ends.max() + width
        logits = self._context.extend(ids, mask, keep=width)
        gained = mask.sum(axis=1)
        self._lengths = self._lengths + gained
        self._ends = np.where(gained > 0, end, self._ends)
        return logits

    def forget(self, counts: np.ndarray) -> None:
        """Take the latest `counts[row]` tokens of each row back."""
        self._context.forget(counts)
        self._lengths = self._lengths - counts
        self._ends = self._ends - counts

    def select(self, places: Sequence[int]) -> None:
        """Keep these rows, in this order, without empty slots between their tokens."""
        self._context = self._context.gather([(0, place) for place in places], self._capacity)
        self._lengths = self._lengths[list(places)]
        self._ends = np.full(len(places), self._lengths.max())
