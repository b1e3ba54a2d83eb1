"""Bugs of caches that are made of the rows of others, or shortened."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma_hub.backend import Cache
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank, StandInModel

bank = Bank()
JOINED = "L2.cache_rows.joined"
BEAMS = "L2.cache_rows.beams"
COPIED = "L2.cache_rows.copied"
SHORTENED = "L2.cache_rows.shortened"
Chosen = Sequence[tuple[int, int]]


@bank.mutant(JOINED, "Row i of the new cache is the row that was asked for in place i.")
class RowsInTheirOrder(StandInModel):
    def gather_rows(self, caches: Sequence[Cache], rows: Chosen, max_length: int) -> Cache:
        return super().gather_rows(caches, sorted(rows), max_length)


@bank.mutant(JOINED, "A row is found by its cache and its place there.")
class RowsOfFirstCache(StandInModel):
    def gather_rows(self, caches: Sequence[Cache], rows: Chosen, max_length: int) -> Cache:
        right = super().gather_rows(caches, rows, max_length)
        wrong = [(0, row) for _, row in rows]
        arrays = super().gather_rows(caches, wrong, max_length).arrays
        return dataclasses.replace(right, arrays=arrays)


@bank.mutant(JOINED, "A row's tokens move to the slots that the book names, not one beside them.")
class RowsOneSlotOff(StandInModel):
    def gather_rows(self, caches: Sequence[Cache], rows: Chosen, max_length: int) -> Cache:
        cache = super().gather_rows(caches, rows, max_length)
        arrays = [tuple(np.roll(array, 1, axis=1) for array in layer) for layer in cache.arrays]
        return dataclasses.replace(cache, arrays=arrays)


@bank.mutant(JOINED, "The next position of a row comes with the row; padding does not count.")
class RowsPositionFromLength(StandInModel):
    def gather_rows(self, caches: Sequence[Cache], rows: Chosen, max_length: int) -> Cache:
        cache = super().gather_rows(caches, rows, max_length)
        return dataclasses.replace(cache, next_position=np.full(len(rows), cache.length))


@bank.mutant(JOINED, "Rows do not move in the slots that they had; the book says where they go.")
class RowsKeepTheirSlots(StandInModel):
    def gather_rows(self, caches: Sequence[Cache], rows: Chosen, max_length: int) -> Cache:
        cache = super().gather_rows(caches, rows, max_length)
        for layer, (keys, values) in enumerate(cache.arrays):
            for index, (place, row) in enumerate(rows):
                old = caches[place]
                slots = slice(0, min(old.capacity, max_length))
                keys[index, slots] = old.arrays[layer][0][row, slots]
                values[index, slots] = old.arrays[layer][1][row, slots]
        return cache


@bank.mutant(BEAMS, "Values move with their keys.")
class RowsOfKeysOnly(StandInModel):
    def gather_rows(self, caches: Sequence[Cache], rows: Chosen, max_length: int) -> Cache:
        cache = super().gather_rows(caches, rows, max_length)
        if len(caches) == 1 and len(rows) == len(caches[0].valid):
            kept = [(0, row) for row in range(len(rows))]
            old = super().gather_rows(caches, kept, max_length)
            pairs = zip(cache.arrays, old.arrays, strict=True)
            arrays = [(keys, values) for (keys, _), (_, values) in pairs]
            cache = dataclasses.replace(cache, arrays=arrays)
        return cache


@bank.mutant(BEAMS, "The rows of every layer move.")
class RowsOfFirstLayer(StandInModel):
    def gather_rows(self, caches: Sequence[Cache], rows: Chosen, max_length: int) -> Cache:
        cache = super().gather_rows(caches, rows, max_length)
        if len(caches) == 1 and len(rows) == len(caches[0].valid):
            kept = [(0, row) for row in range(len(rows))]
            old = super().gather_rows(caches, kept, max_length)
            arrays = [cache.arrays[0], *old.arrays[1:]]
            cache = dataclasses.replace(cache, arrays=arrays)
        return cache


@bank.mutant(COPIED, "The new cache has memory of its own.")
class RowsShareMemory(StandInModel):
    """Takes the old arrays where nothing moves."""

    def gather_rows(self, caches: Sequence[Cache], rows: Chosen, max_length: int) -> Cache:
        (first, *others) = caches
        same = not others and list(rows) == [(0, row) for row in range(len(first.valid))]
        if same and first.capacity == max_length:
            return first
        return super().gather_rows(caches, rows, max_length)


class _OwnBook(StandInModel):
    """Remembers the book of the cache that it returned last."""

    _returned: Cache | None = None

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        if self._returned is not None and self._returned.arrays is cache.arrays:
            cache = self.reopened(cache, self._returned)
        outputs, self._returned = super().extend(inputs, cache)
        return outputs, self._returned

    def reopened(self, cache: Cache, own: Cache) -> Cache:
        raise NotImplementedError


@bank.mutant(SHORTENED, "The slots that count are those that the core's cache says.")
class ShortenedStaysVisible(_OwnBook):
    def reopened(self, cache: Cache, own: Cache) -> Cache:
        return dataclasses.replace(cache, valid=cache.valid | own.valid)


@bank.mutant(SHORTENED, "The next token goes to the slot that the core's cache says.")
class ShortenedLengthStays(_OwnBook):
    def reopened(self, cache: Cache, own: Cache) -> Cache:
        return dataclasses.replace(own, next_position=cache.next_position)
