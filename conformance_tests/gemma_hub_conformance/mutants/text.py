"""Bugs that random ids of a small vocabulary do not show, and texts do."""

import dataclasses

import numpy as np

from gemma_hub.backend import Cache
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank, StandInModel
from gemma_hub_numpy.model import Array, LayerCache, Reference

bank = Bank()


class _ReadsIds(StandInModel):
    """Takes from the ids what only the other inputs say."""

    def reread(self, inputs: ModelInputs, ids: Array) -> ModelInputs:
        raise NotImplementedError

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        return super().forward(self._reread(inputs))

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        return super().extend(self._reread(inputs), cache)

    def _reread(self, inputs: ModelInputs) -> ModelInputs:
        return inputs if inputs.input_ids is None else self.reread(inputs, inputs.input_ids)


@bank.mutant("L7.text.bos", "A <bos> is a token that every later one sees.")
class BosUnseen(_ReadsIds):
    def reread(self, inputs: ModelInputs, ids: Array) -> ModelInputs:
        mask = inputs.attention_mask & (ids != self.native.config.bos_token_id)
        return dataclasses.replace(inputs, attention_mask=mask)


@bank.mutant("L7.text.padded", "The mask says where the padding is: it may be on either side.")
class PaddingTakenAsRight(_ReadsIds):
    def reread(self, inputs: ModelInputs, ids: Array) -> ModelInputs:
        lengths = inputs.attention_mask.sum(axis=1, keepdims=True)
        mask = np.arange(ids.shape[1]) < lengths
        return dataclasses.replace(inputs, attention_mask=mask)


@bank.mutant("L7.text.special", "The mask says what is padding; a <pad> in a text is a token.")
class PadIdIsPadding(_ReadsIds):
    def reread(self, inputs: ModelInputs, ids: Array) -> ModelInputs:
        mask = inputs.attention_mask & (ids != self.native.config.pad_token_id)
        return dataclasses.replace(inputs, attention_mask=mask)


@bank.mutant("L7.text.special", "A <bos> inside of a text does not start the positions anew.")
class BosRestartsPositions(_ReadsIds):
    def reread(self, inputs: ModelInputs, ids: Array) -> ModelInputs:
        starts = np.where(ids == self.native.config.bos_token_id, inputs.position_ids, 0)
        positions = inputs.position_ids - np.maximum.accumulate(starts, axis=1)
        return dataclasses.replace(inputs, position_ids=positions)


@bank.mutant("L7.text.special", "An <eos> inside of a text hides nothing before it.")
class EosHidesWhatIsBefore(Reference):
    def embed(self, ids: Array) -> Array:
        # Number of the piece of text that each token is in: an <eos> is the end of its own.
        ends = np.isin(ids, self.config.eos_token_ids)
        self._piece: Array = np.cumsum(ends, axis=1) - ends
        return super().embed(ids)

    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        seen = super().visible(valid, start, T, layer)
        if start or valid.shape[1] != T:
            return seen
        return np.asarray(seen & (self._piece[:, :, None] == self._piece[:, None, :]))


@bank.mutant("L7.text.bytes", "A token that repeats the one before it is a token too.")
class RepeatedIdUnseen(_ReadsIds):
    def reread(self, inputs: ModelInputs, ids: Array) -> ModelInputs:
        repeats = np.zeros_like(inputs.attention_mask)
        repeats[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & inputs.attention_mask[:, :-1]
        return dataclasses.replace(inputs, attention_mask=inputs.attention_mask & ~repeats)


@bank.mutant(
    "L7.text.generated", "A generated id takes more than one byte, as that of a prompt does."
)
class NewIdsInOneByte(Reference):
    def embed(self, ids: Array) -> Array:
        return super().embed(ids % 256 if ids.shape[1] == 1 else ids)


@bank.mutant("L7.text.streams", "Each stream has a cache of its own.")
class StreamsShareCache(Reference):
    """Keeps one cache for each shape."""

    def new_cache(self, batch_size: int, max_length: int) -> list[LayerCache]:
        kept: dict[tuple[int, int], list[LayerCache]] = self.__dict__.setdefault("_kept", {})
        shape = (batch_size, max_length)
        if shape not in kept:
            kept[shape] = super().new_cache(*shape)
        return kept[shape]
