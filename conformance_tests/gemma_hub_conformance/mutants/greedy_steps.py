"""Bugs of a decoding loop that the backend runs by itself."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma_hub.backend import Cache
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank, StandInModel

bank = Bank()
TOKENS = "L4.greedy_steps.tokens"
STOPS = "L4.greedy_steps.stops"
BOOK = "L4.greedy_steps.book"
Found = tuple[np.ndarray, Cache]


class _Changed(StandInModel):
    """Changes what a call gets, or the cache that it returns."""

    def cache_before(self, cache: Cache) -> Cache:
        return cache

    def cache_after(self, cache: Cache, before: Cache) -> Cache:
        return cache

    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> Found:
        given = self.cache_before(cache)
        found, after = super().greedy_steps(token_ids, running, given, num_steps, stops)
        return found, self.cache_after(after, cache)


@bank.mutant(TOKENS, "A position counts the row's own tokens; it is not the slot.")
class GreedyPositionFromSlot(_Changed):
    def cache_before(self, cache: Cache) -> Cache:
        return dataclasses.replace(cache, next_position=np.full(len(cache.valid), cache.length))


@bank.mutant(TOKENS, "Padding of the prompt stays unseen.")
class GreedyPaddingSeen(_Changed):
    def cache_before(self, cache: Cache) -> Cache:
        valid = np.broadcast_to(np.arange(cache.capacity) < cache.length, cache.valid.shape)
        return dataclasses.replace(cache, valid=valid)


@bank.mutant(TOKENS, "Each step feeds the token that the last one chose.")
class GreedyFeedsTheFirst(StandInModel):
    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> Found:
        parts = []
        for _ in range(num_steps):
            part, cache = super().greedy_steps(token_ids, running, cache, 1, stops)
            parts.append(part)
        return np.concatenate(parts, axis=1), cache


@bank.mutant(STOPS, "Every stop id stops, however many there are.")
class GreedyEightStops(StandInModel):
    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> Found:
        return super().greedy_steps(token_ids, running, cache, num_steps, stops[:8])


@bank.mutant(STOPS, "One row that stops is enough to end the call.")
class GreedyStopsWithTheLastRow(StandInModel):
    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> Found:
        parts: list[np.ndarray] = []
        ids, stopped = token_ids, ~running
        while len(parts) < num_steps and not stopped.all():
            part, cache = super().greedy_steps(ids, running, cache, 1, ())
            parts.append(part)
            ids = np.where(running, part[:, -1], token_ids)
            stopped |= np.isin(ids, stops)
        return np.concatenate(parts, axis=1), cache


@bank.mutant(BOOK, "The last token of a call is not fed.")
class GreedyLastTokenFed(StandInModel):
    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> Found:
        found, cache = super().greedy_steps(token_ids, running, cache, num_steps, stops)
        last = np.where(running, found[:, -1], token_ids)
        return found, super().greedy_steps(last, running, cache, 1, ())[1]


@bank.mutant(BOOK, "What rows that do not run are fed is padding.")
class GreedyIdleRowsCounted(_Changed):
    def cache_after(self, cache: Cache, before: Cache) -> Cache:
        valid = cache.valid.copy()
        valid[:, before.length : cache.length] = True
        return dataclasses.replace(cache, valid=valid)


@bank.mutant(BOOK, "The book is true of the arrays that come with it.")
class GreedyKeysOfLastStepMissing(_Changed):
    def cache_after(self, cache: Cache, before: Cache) -> Cache:
        for keys, _ in cache.arrays:
            keys[:, cache.length - 1] = 0.0
        return cache


class _OtherLogits(StandInModel):
    def other(self, logits: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        outputs, cache = super().extend(inputs, cache)
        return dataclasses.replace(outputs, logits=self.other(outputs.logits)), cache


class _NotANumberSmallest(_OtherLogits):
    def other(self, logits: np.ndarray) -> np.ndarray:
        return np.asarray(np.nan_to_num(logits, nan=-9e9))


class _Rising(_OtherLogits):
    def other(self, logits: np.ndarray) -> np.ndarray:
        return np.asarray(logits + 1e-12 * np.arange(logits.shape[-1], dtype=np.float32))


@bank.mutant("L4.greedy_steps.bad_logits", "Logits that are NaN choose nothing.")
class GreedyChoosesFromNotANumber(StandInModel):
    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> Found:
        inner = _NotANumberSmallest(self.native)
        return inner.greedy_steps(token_ids, running, cache, num_steps, stops)


@bank.mutant("L4.greedy_steps.ties", "Of equal logits the lowest id wins, as in the core.")
class GreedyLastOfEqual(StandInModel):
    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> Found:
        return _Rising(self.native).greedy_steps(token_ids, running, cache, num_steps, stops)


@bank.mutant("L4.greedy_steps.capacity", "A step past the capacity is a CapacityError.")
class GreedyTakesWhatFits(StandInModel):
    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> Found:
        room = max(1, cache.capacity - cache.length)
        return super().greedy_steps(token_ids, running, cache, min(num_steps, room), stops)
