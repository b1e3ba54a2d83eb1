"""Bugs that only the cache shows."""

import dataclasses

import numpy as np

from gemma_hub.backend import Cache
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank, StandInModel, to_bfloat16
from gemma_hub_numpy.model import Array, LayerCache, Reference

bank = Bank()
DECODE = "L2.cache.gqa.no_padding"
PADDED = "L2.cache.gqa.left_padding"


@bank.mutant(DECODE, "Keys go into the cache with their positions in them.")
class CacheKUnrotated(Reference):
    def apply_positions(
        self, q: Array, k: Array, v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        self._plain = k
        return super().apply_positions(q, k, v, angles)

    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        keys, values = super().remember(i, self._plain, v, start, cache)
        keys = keys.copy()
        keys[:, start:] = k
        return keys, values


@bank.mutant(DECODE, "The cache keeps the compute type.")
class CacheDtype(Reference):
    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        return super().remember(i, to_bfloat16(k), to_bfloat16(v), start, cache)


@bank.mutant(DECODE, "The last token of a call goes into the cache as well.")
class CacheLastTokenMissing(Reference):
    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        keys, values = (array.copy() for array in super().remember(i, k, v, start, cache))
        end = start + k.shape[1]
        cache[i][0][:, end - 1] = 0.0
        cache[i][1][:, end - 1] = 0.0
        return keys, values


@bank.mutant(DECODE, "Values go to the slot of their own token.")
class CacheValuesOneLate(Reference):
    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        keys, values = super().remember(i, k, v, start, cache)
        return keys, np.roll(values, 1, axis=1) if start else values


@bank.mutant(DECODE, "Every layer has a cache of its own.")
class CacheSharedByLayers(Reference):
    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        keys, values = super().remember(i, k, v, start, cache)
        first_keys, first_values = cache[0][0][:, :start], cache[0][1][:, :start]
        return (
            np.concatenate([first_keys, keys[:, start:]], axis=1),
            np.concatenate([first_values, values[:, start:]], axis=1),
        )


@bank.mutant("L2.cache.interleaved", "init_cache makes a new cache every time.")
class CacheNotNew(Reference):
    def new_cache(self, batch_size: int, max_length: int) -> list[LayerCache]:
        if not hasattr(self, "_only"):
            self._only = super().new_cache(batch_size, max_length)
        return self._only


@bank.mutant("L2.cache.two_sequences", "A new cache has no slots of an earlier sequence.")
class CacheNotReset(StandInModel):
    """Forgets to forget which slots were valid."""

    _used: int = 0

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        if cache.length == 0 and not inputs.attention_mask.all():
            mask = inputs.attention_mask.copy()
            mask[:, : self._used] = True
            inputs = dataclasses.replace(inputs, attention_mask=mask)
        outputs, cache = super().extend(inputs, cache)
        self._used = cache.length
        return outputs, cache


@bank.mutant("L2.cache.capacity", "A token past the capacity is a CapacityError.")
class CacheOverflowClamp(StandInModel):
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        start = min(cache.length, cache.capacity - inputs.shape[1])
        return super().extend(inputs, dataclasses.replace(cache, length=start))


@bank.mutant(DECODE, "The last slot of a cache is as good as the others.")
class CacheLastPromptTokenTwice(StandInModel):
    """Feeds the prompt's last token again before the first new one."""

    _last: ModelInputs | None = None

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        if inputs.shape[1] == 1 and self._last is not None:
            _, cache = super().extend(self._last, cache)
            self._last = None
        elif inputs.shape[1] > 1 and inputs.input_ids is not None:
            self._last = dataclasses.replace(
                inputs,
                input_ids=inputs.input_ids[:, -1:],
                attention_mask=inputs.attention_mask[:, -1:],
                position_ids=inputs.position_ids[:, -1:] + 1,
            )
        return super().extend(inputs, cache)


@bank.mutant("L2.cache.batch_size", "Rows of the inputs and of the cache must be as many.")
class CacheBatchBroadcast(StandInModel):
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        rows = inputs.shape[0]
        if len(cache.valid) != rows:
            cache = self.init_cache(rows, cache.capacity)
        return super().extend(inputs, cache)


class _MovedPositions(StandInModel):
    """Changes the positions of every call after the first."""

    def moved(self, inputs: ModelInputs, cache: Cache) -> Array:
        raise NotImplementedError

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        if cache.length:
            positions = self.moved(inputs, cache)
            outputs, after = super().extend(
                dataclasses.replace(inputs, position_ids=positions), cache
            )
            return outputs, dataclasses.replace(
                after, next_position=cache.advanced(inputs, cache.arrays).next_position
            )
        return super().extend(inputs, cache)


@bank.mutant(DECODE, "The token after n tokens has position n.")
class PosDecodePlusOne(_MovedPositions):
    def moved(self, inputs: ModelInputs, cache: Cache) -> Array:
        return np.asarray(inputs.position_ids + 1)


@bank.mutant(PADDED, "A position counts real tokens; it is not the slot.")
class PosDecodeSlot(_MovedPositions):
    def moved(self, inputs: ModelInputs, cache: Cache) -> Array:
        slots = np.arange(cache.length, cache.length + inputs.shape[1])
        return np.broadcast_to(slots, inputs.shape)


@bank.mutant(DECODE, "Positions go on after the prompt.")
class PosFrozenAfterPrompt(_MovedPositions):
    def moved(self, inputs: ModelInputs, cache: Cache) -> Array:
        return np.asarray(np.minimum(inputs.position_ids, 7))


@bank.mutant("L2.cache.positions", "Use the position_ids of the call in a cached step too.")
class PosDecodeIgnored(_MovedPositions):
    def moved(self, inputs: ModelInputs, cache: Cache) -> Array:
        counted = np.cumsum(cache.valid, axis=1)[:, -1:] + np.arange(inputs.shape[1])
        return np.asarray(counted + 100)


@bank.mutant("L2.cache.idle_row", "A row without a token in this step stores nothing that counts.")
class IdleRowCounted(StandInModel):
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        if cache.length:
            inputs = dataclasses.replace(inputs, attention_mask=np.ones_like(inputs.attention_mask))
        return super().extend(inputs, cache)


@bank.mutant("L2.cache.hidden_states", "extend returns hidden states on request, as forward does.")
class CacheWithoutStates(StandInModel):
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        outputs, cache = super().extend(inputs, cache)
        return dataclasses.replace(outputs, hidden_states=None), cache


@bank.mutant("L2.cache.logits_to_keep", "logits_to_keep works in extend too.")
class CacheIgnoresKeep(StandInModel):
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        return super().extend(dataclasses.replace(inputs, logits_to_keep=0), cache)


@bank.mutant("L4.generation.greedy", "The next token follows the last one of the row.")
class GreedySecondLast(StandInModel):
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        keep = inputs.logits_to_keep
        if keep == 1 and inputs.shape[1] > 1:
            outputs, cache = super().extend(dataclasses.replace(inputs, logits_to_keep=2), cache)
            return dataclasses.replace(outputs, logits=outputs.logits[:, :1]), cache
        return super().extend(inputs, cache)


@bank.mutant("L4.generation.row_alone", "A batch of one row is a batch like any other.")
class SingleRowForgets(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        seen = super().visible(valid, start, T, layer)
        return seen & (np.arange(valid.shape[1]) >= start) if len(valid) == 1 else seen


@bank.mutant("L4.generation.sampled", "Sampling starts from logits, not from something flatter.")
class LogitsFlattened(Reference):
    def head(self, x: Array) -> Array:
        return super().head(x) * 0.8


@bank.mutant("L4.generation.stop", "The stop id's logit is one like any other.")
class StopNeverChosen(Reference):
    def head(self, x: Array) -> Array:
        logits = super().head(x)
        best = logits.argmax(axis=-1)
        np.put_along_axis(logits, best[..., None], logits.min(), axis=-1)
        return logits
