"""Bugs of calls, batches and the cache that no list has: what one call leaves for the next."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from gemma_hub.backend import Cache
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank, StandInModel, to_bfloat16
from gemma_hub_numpy.model import Array, LayerCache, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"
PADDED = "L2.forward.gqa.left_padding"
DECODE = "L2.cache.gqa.no_padding"
ONE_BY_ONE = "L2.lengths.cache_one_by_one"
"""A cache that fills up past 128 slots."""


# -- batches -------------------------------------------------------------------------------------


def _in_order(inputs: ModelInputs, order: Array) -> ModelInputs:
    """The rows of `inputs` in another order."""
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    given = {name: getattr(inputs, name) for name in names}
    moved = {name: value[order] for name, value in given.items() if value is not None}
    return dataclasses.replace(inputs, **moved)


@bank.mutant("L2.laws.rows_repeated", "A row does not see the one before it.")
class PackedRowsSeeOneAnother(StandInModel):
    """Lays all rows into one, without a border between them in the mask."""

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        if self.native.task != "causal_lm" or inputs.input_ids is None or inputs.logits_to_keep:
            return super().forward(inputs)
        flat = {
            name: getattr(inputs, name).reshape(1, -1)
            for name in ("input_ids", "attention_mask", "position_ids")
        }
        packed = dataclasses.replace(inputs, output_hidden_states=False, labels=None, **flat)
        outputs, wrong = super().forward(inputs), super().forward(packed)
        return dataclasses.replace(outputs, logits=wrong.logits.reshape(outputs.logits.shape))


@bank.mutant(FORWARD, "An odd number of rows is a batch like any other.")
class OddRowRepeatsPrevious(StandInModel):
    """Takes rows two at a time, and for the one left over the one before it."""

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        B = inputs.shape[0]
        order = np.minimum(np.arange(B), B - 2) if B % 2 and B > 1 else np.arange(B)
        return super().forward(_in_order(inputs, order))


@bank.mutant(PADDED, "Rows come back in the order in which they came.")
class RowsLeftSorted(StandInModel):
    """Sorts rows by length, so that kernels are evenly loaded, and forgets to sort them back."""

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        lengths = inputs.attention_mask.sum(axis=1)
        return super().forward(_in_order(inputs, np.argsort(-lengths, kind="stable")))


@bank.mutant(PADDED, "Real tokens stay in their slots.")
class TokensLeftCompacted(Reference):
    """Drops padding before the layers, and lays the results out from slot 0 up."""

    def final_norm(self, x: Array) -> Array:
        x = super().final_norm(x)
        if self._mask.shape != x.shape[:2]:
            return x
        order = np.argsort(~self._mask, axis=1, kind="stable")
        return np.take_along_axis(x, order[..., None], axis=1)

    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        self._mask = inputs.attention_mask
        return super().run(inputs, *args, **kwargs)


@bank.mutant("L2.forward.gqa.both_sides", "The batch is as long as its longest row asks for.")
class TruncatedToTokens(Reference):
    """Cuts the batch to as many slots as its longest row has tokens."""

    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if not args:
            kept = int(inputs.attention_mask.sum(axis=1).max())
            mask = inputs.attention_mask & (np.arange(inputs.shape[1]) < max(kept, 1))
            inputs = dataclasses.replace(inputs, attention_mask=mask)
        return super().run(inputs, *args, **kwargs)


@bank.mutant(PADDED, "Positions count real tokens, also where they are looked up in a table.")
class PositionsOfPaddedRowsMoved(Reference):
    """The keys of a padded row have the positions of their slots, its queries do not."""

    def apply_positions(
        self, q: Array, k: Array, v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        slots = np.broadcast_to(np.arange(q.shape[1]), q.shape[:2])
        moved = self.angles(slots, 0) if q.shape[1] > 1 else angles
        return self.rotate(q, angles), self.rotate(k, moved), v


# -- what one call leaves for the next -----------------------------------------------------------


@bank.mutant("L2.lengths.around_64", "Rows begin where the length of this call says.")
class StrideOfFirstCall(StandInModel):
    """Finds row b of the flat ids at b times the length of the first call."""

    _stride: int = 0

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        B, T = inputs.shape
        self._stride = self._stride or T
        if inputs.input_ids is not None:
            places = np.arange(B)[:, None] * self._stride + np.arange(T)
            flat = inputs.input_ids.ravel()
            ids = flat[np.minimum(places, flat.size - 1)]
            inputs = dataclasses.replace(inputs, input_ids=ids)
        return super().forward(inputs)


@bank.mutant("L2.lengths.around_64", "A longer call gets longer buffers.")
class BufferOfFirstCall(Reference):
    """Keeps a buffer for the keys, and what does not fit into it is not seen."""

    _slots = 0

    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        self._slots = self._slots or valid.shape[1]
        kept = np.arange(valid.shape[1]) < self._slots
        return super().visible(valid, start, T, layer) & (kept if not start else True)


@bank.mutant("L5.causal.loss.no_padding", "Results are those of this call's labels.")
class LossOfFirstLabels(StandInModel):
    """Keeps the loss of a batch that it has seen, whatever the labels."""

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().forward(inputs)
        if inputs.labels is None or inputs.input_ids is None:
            return outputs
        if not hasattr(self, "_losses"):
            self._losses: dict[bytes, Array] = {}
        kept = self._losses.setdefault(inputs.input_ids.tobytes(), outputs.loss)
        return dataclasses.replace(outputs, loss=kept)


@bank.mutant("L1.contract.repeated_call", "A call leaves no trace in the parameters.")
class EmbeddingScaledInPlace(Reference):
    """Multiplies the looked-up rows where they stand, with a scale that is 1 only in theory."""

    _factor = 1.0

    def embed(self, ids: Array) -> Array:
        self._factor *= 1 + 2.0**-20
        return super().embed(ids) * self._factor


@bank.mutant("L2.inputs_embeds.unscaled", "Embeddings of the caller keep their digits.")
class InputsEmbedsInBf16(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if inputs.inputs_embeds is not None:
            rounded = to_bfloat16(inputs.inputs_embeds)
            inputs = dataclasses.replace(inputs, inputs_embeds=rounded)
        return super().run(inputs, *args, **kwargs)


@bank.mutant("L2.inputs_embeds.unscaled", "The mask counts for embeddings of the caller as well.")
class InputsEmbedsUnmasked(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if inputs.inputs_embeds is not None and not args:
            mask = np.ones_like(inputs.attention_mask)
            inputs = dataclasses.replace(inputs, attention_mask=mask)
        return super().run(inputs, *args, **kwargs)


# -- what else is returned -----------------------------------------------------------------------


class _States(Reference):
    """Returns other hidden states."""

    def changed(self, states: tuple[Array, ...]) -> tuple[Array, ...]:
        raise NotImplementedError

    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        outputs = super().run(inputs, *args, **kwargs)
        if outputs.hidden_states is None:
            return outputs
        return dataclasses.replace(outputs, hidden_states=self.changed(outputs.hidden_states))


@bank.mutant("L2.hidden_states.gqa", "Every hidden state has memory of its own.")
class HiddenStatesInOneBuffer(_States):
    def changed(self, states: tuple[Array, ...]) -> tuple[Array, ...]:
        return (states[-1],) * len(states)


@bank.mutant("L2.hidden_states.gqa", "Hidden states have the type of the model.")
class HiddenStatesInBf16(_States):
    def changed(self, states: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(to_bfloat16(state) for state in states)


@bank.mutant("L2.hidden_states.mha", "Hidden states are the stream, not what a layer adds to it.")
class HiddenStatesOfBranches(_States):
    def changed(self, states: tuple[Array, ...]) -> tuple[Array, ...]:
        added = (after - before for before, after in itertools.pairwise(states[:-1]))
        return (states[0], *added, states[-1])


@bank.mutant("L2.logits_to_keep.1", "Keeping one position keeps the slots' axis.")
class KeptAxisSqueezed(StandInModel):
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().forward(inputs)
        if inputs.logits_to_keep != 1:
            return outputs
        return dataclasses.replace(outputs, logits=outputs.logits[:, 0])


# -- cache ---------------------------------------------------------------------------------------


class _Remembers(Reference):
    """Gives the attention something else for the keys and values of the cache."""

    def recalled(self, i: int, array: Array, start: int, end: int) -> Array:
        """What is read of slots 0 to `end`; `start` is the first of this call."""
        raise NotImplementedError

    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        keys, values = super().remember(i, k, v, start, cache)
        end = start + k.shape[1]
        return (
            self.recalled(i, keys.copy(), start, end),
            self.recalled(i, values.copy(), start, end),
        )


@bank.mutant("L2.cache.capacity", "The last slot of a cache is a slot of its own.")
class RingOneShort(Reference):
    """Goes round one slot too early."""

    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        read = super().remember(i, k, v, start, cache)
        end, capacity = start + k.shape[1], cache[i][0].shape[1]
        if end < capacity:
            return read
        for array in cache[i]:
            array[:, 0] = array[:, -1]
        return cache[i]


@bank.mutant(ONE_BY_ONE, "Every page of the cache is found by its own entry in the table.")
class PageOfOtherRow(_Remembers):
    def recalled(self, i: int, array: Array, start: int, end: int) -> Array:
        array[:, 64:start] = np.roll(array, 1, axis=0)[:, 64:start]
        return array


@bank.mutant(ONE_BY_ONE, "Slots of a cache do not fit into eight bits with a sign.")
class SlotsInIntEight(_Remembers):
    def recalled(self, i: int, array: Array, start: int, end: int) -> Array:
        array[:, 128:start] = array[:, : max(start - 128, 0)]
        return array


@bank.mutant(DECODE, "The cache is not quantized unless that was asked for.")
class CacheInInt8(_Remembers):
    def recalled(self, i: int, array: Array, start: int, end: int) -> Array:
        scale = np.maximum(np.abs(array).max(axis=-1, keepdims=True), 1e-9) / 127
        return np.asarray(np.round(array / scale) * scale)


@bank.mutant(DECODE, "Keys are rotated once, when they go in.")
class CacheKeysRotatedAgain(Reference):
    def apply_positions(
        self, q: Array, k: Array, v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        self._now = angles
        return super().apply_positions(q, k, v, angles)

    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        keys, values = super().remember(i, k, v, start, cache)
        old = np.broadcast_to(self._now[:, :1], (len(k), start, self._now.shape[-1]))
        return np.concatenate([self.rotate(keys[:, :start], old), keys[:, start:]], axis=1), values


@bank.mutant("L2.cache.chunks_of_3", "A chunk begins after the last slot of the one before it.")
class ChunkBorderOverwritten(_Remembers):
    def recalled(self, i: int, array: Array, start: int, end: int) -> Array:
        if start and end - start > 1:
            array[:, start - 1] = array[:, start]
        return array


@bank.mutant("L2.cache.chunks_of_7_9_7", "A chunk longer than the first one fits as well.")
class ChunkCutToTheFirst(_Remembers):
    """Copies as many slots as the first chunk had."""

    _size = 0

    def recalled(self, i: int, array: Array, start: int, end: int) -> Array:
        self._size = self._size if start else end
        array[:, start + self._size : end] = 0.0
        return array


@bank.mutant("L2.cache.gqa.left_padding", "Tokens go to their slots, padding or not.")
class CacheCompacted(Reference):
    """Stores the real tokens of a prompt one after the other and masks as if they were not."""

    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        if not start:
            order = np.argsort(~self._valid[:, : k.shape[1]], axis=1, kind="stable")
            k, v = (np.take_along_axis(a, order[..., None, None], axis=1) for a in (k, v))
        return super().remember(i, k, v, start, cache)

    def block(
        self, i: int, x: Array, positions: Array, valid: Array, start: int,
        cache: list[LayerCache] | None,
    ) -> Array:  # fmt: skip
        self._valid = valid
        return super().block(i, x, positions, valid, start, cache)


@bank.mutant(DECODE, "Slots that are not filled yet are not keys.")
class DecodeCountsEmptySlots(Reference):
    """A zero key has the score 0, and its probability is taken from the others."""

    _empty = 0

    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        keys, values = super().remember(i, k, v, start, cache)
        self._empty = cache[i][0].shape[1] - keys.shape[1] if start else 0
        return keys, values

    def softmax(self, scores: Array, visible: Array) -> Array:
        more = np.zeros((*scores.shape[:-1], self._empty))
        seen = np.ones((*visible.shape[:-1], self._empty), np.bool_)
        scores = np.concatenate([scores, more], axis=-1)
        wide = super().softmax(scores, np.concatenate([visible, seen], axis=-1))
        return wide[..., : scores.shape[-1] - self._empty]


@bank.mutant("L2.cache.mha.left_padding", "All rows share a length, not a mask.")
class DecodeMaskOfFirstRow(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        shared = np.broadcast_to(valid[:1], valid.shape) if start else valid
        return super().visible(shared, start, T, layer)


@bank.mutant("L2.cache.interleaved", "The slot of a token is kept by the cache, not by the model.")
class LengthKeptByModel(StandInModel):
    """Counts slots by itself, over all caches, and goes by that count for the mask."""

    _count: int = 0

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        self._count = self._count if cache.length else 0
        outputs, after = super().extend(inputs, cache)
        behind, self._count = self._count - cache.length, self._count + inputs.shape[1]
        if behind:
            hidden = cache.valid.copy()
            hidden[:, max(0, cache.length - abs(behind)) : cache.length] = False
            outputs, _ = super().extend(inputs, dataclasses.replace(cache, valid=hidden))
        return outputs, after


@bank.mutant("L2.cache.idle_row", "A row that pauses keeps its position.")
class IdleRowMovesOn(StandInModel):
    """Positions go on in every row, whether it has a token or not."""

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        if cache.length:
            idle = (~cache.valid[:, : cache.length]).sum(axis=1)[:, None]
            leading = cache.valid[:, : cache.length].argmax(axis=1)[:, None]
            moved = inputs.position_ids + idle - leading
            inputs = dataclasses.replace(inputs, position_ids=moved)
        return super().extend(inputs, cache)


@bank.mutant("L2.cache.hidden_states", "Hidden states of a step are those of its own tokens.")
class StatesOfPrompt(StandInModel):
    """Returns hidden states of the first call again, cut to the length of the step."""

    _first: tuple[Array, ...] | None = None

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        outputs, after = super().extend(inputs, cache)
        if outputs.hidden_states is not None:
            if not cache.length or self._first is None:
                self._first = outputs.hidden_states
            cut = tuple(state[:, -inputs.shape[1] :] for state in self._first)
            outputs = dataclasses.replace(outputs, hidden_states=cut)
        return outputs, after
