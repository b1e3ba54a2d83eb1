"""What a model has read so far: rows of tokens that grow, shrink and move.

Two kinds with one face: `CachedContext` keeps the tokens in the backend's cache; `WholeContext`,
for one without a cache, runs the whole sequence again at every step.
"""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from gemma_hub.backend import Model, SupportsCache, SupportsCacheRows, SupportsGreedySteps
from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs

CHUNK = 512
"""Tokens of a row that a cached model reads at once, so that a long prompt needs no more memory."""


class Context(Protocol):
    """The rows that a model has read. `forget` and `gather` are for a model that `can_edit`."""

    def extend(self, ids: np.ndarray, mask: np.ndarray, keep: int = 1) -> np.ndarray:
        """(B, keep, V) logits of the last `keep` of the (B, T) tokens, once they are added.

        Args:
            ids: (B, T) integers.
            mask: (B, T) bool, false at padding.
            keep: 1 to T; above 1 only where T is at most `CHUNK`.
        """
        ...

    def forget(self, counts: np.ndarray) -> None:
        """Take the latest `counts[row]` tokens of each row back."""
        ...

    def gather(self, rows: Sequence[tuple[int, int]], max_length: int, *others: Self) -> Self:
        """A new context made of rows of this one and others; all of them can go on.

        Args:
            rows: for each new row the index of its context, 0 for this one, and of its row there.
            max_length: tokens that a row may come to have.
            others: contexts of the same model.
        """
        ...


def open_context(model: Model, config: GemmaConfig, batch_size: int, max_length: int) -> Context:
    """A context of `batch_size` empty rows, each for `max_length` tokens, padding included."""
    if isinstance(model, SupportsCache):
        return CachedContext(model, config, batch_size, max_length)
    return WholeContext(model, config, batch_size)


def can_edit(model: Model) -> bool:
    """Whether rows can be taken back, repeated and moved in a context of `model`."""
    return isinstance(model, SupportsCacheRows) or not isinstance(model, SupportsCache)


class _CachedModel(Model, SupportsCache, Protocol):
    """A model with the "cache" feature."""


class CachedContext:
    """The tokens so far are in the backend's cache."""

    def __init__(
        self, model: _CachedModel, config: GemmaConfig, batch_size: int, max_length: int
    ) -> None:
        self._model, self._config = model, config
        self._cache = model.init_cache(batch_size, max_length)

    def extend(self, ids: np.ndarray, mask: np.ndarray, keep: int = 1) -> np.ndarray:
        for start in range(0, ids.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            inputs = ModelInputs.prepare(
                self._config,
                ids[:, part],
                mask[:, part],
                logits_to_keep=keep,
                next_position=self._cache.next_position,
            )
            outputs, self._cache = self._model.extend(inputs, self._cache)
        return self._model.to_numpy(outputs.logits)

    @property
    def takes_greedy_steps(self) -> bool:
        """Whether `greedy_steps` can be called."""
        return isinstance(self._model, SupportsGreedySteps)

    def greedy_steps(
        self, ids: np.ndarray, running: np.ndarray, num_steps: int, stops: Sequence[int]
    ) -> np.ndarray:
        """(B, n) ids that the model chose; as `SupportsGreedySteps.greedy_steps`."""
        assert isinstance(self._model, SupportsGreedySteps)
        ids = ids.astype(np.int64)
        chosen, self._cache = self._model.greedy_steps(ids, running, self._cache, num_steps, stops)
        return chosen

    def forget(self, counts: np.ndarray) -> None:
        self._cache = self._cache.shortened(counts)

    def gather(self, rows: Sequence[tuple[int, int]], max_length: int, *others: Self) -> Self:
        assert isinstance(self._model, SupportsCacheRows)
        made = object.__new__(type(self))
        made._model, made._config = self._model, self._config
        caches = [each._cache for each in (self, *others)]
        made._cache = self._model.gather_rows(caches, rows, max_length)
        return made


class WholeContext:
    """For a backend without a cache: the whole sequence runs again at every step."""

    def __init__(self, model: Model, config: GemmaConfig, batch_size: int) -> None:
        self._model, self._config = model, config
        self._rows = [np.empty(0, np.int64) for _ in range(batch_size)]

    def extend(self, ids: np.ndarray, mask: np.ndarray, keep: int = 1) -> np.ndarray:
        self._rows = [
            np.concatenate([old, new[real]])
            for old, new, real in zip(self._rows, ids, mask, strict=True)
        ]
        inputs = ModelInputs.prepare(
            self._config,
            *left_padded(self._rows, self._config.pad_token_id or 0),
            logits_to_keep=min(keep, max(map(len, self._rows))),  # padding of the call is gone
        )
        return self._model.to_numpy(self._model.forward(inputs).logits)

    def forget(self, counts: np.ndarray) -> None:
        self._rows = [
            row[: len(row) - count] for row, count in zip(self._rows, counts, strict=True)
        ]

    def gather(self, rows: Sequence[tuple[int, int]], max_length: int, *others: Self) -> Self:
        made = type(self)(self._model, self._config, 0)
        contexts = (self, *others)
        made._rows = [contexts[place]._rows[row] for place, row in rows]
        return made


def left_padded(rows: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) int64 ids and bool mask with every row at the right end; at least one has a token."""
    length = max(map(len, rows))
    ids = np.full((len(rows), length), pad, np.int64)
    mask = np.zeros((len(rows), length), np.bool_)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = True
    return ids, mask
