"""Sizes that a port took for granted.

How many layers, heads and tokens there are, how large a number may be, and where a block of a
kernel ends.
"""

import dataclasses

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank
from gemma_hub_numpy.model import Array, LayerCache, Reference

bank = Bank()
BLOCK = 64
"""Rows of a block, in the kernels here that have one."""


# -- shapes ----------------------------------------------------------------------------------------


@bank.mutant("L2.liveness.num_hidden_layers", "Layers are sorted by number: 2 comes before 10.")
class LayersSortedAsTexts(Reference):
    def block(
        self,
        i: int,
        x: Array,
        positions: Array,
        valid: Array,
        start: int,
        cache: list[LayerCache] | None,
    ) -> Array:
        order = sorted(range(self.config.num_hidden_layers), key=str)
        return super().block(order[i], x, positions, valid, start, cache)


@bank.mutant("L2.liveness.vocab_size", "Ids need more than one byte.")
class IdsInOneByte(Reference):
    def embed(self, ids: Array) -> Array:
        return super().embed(ids.astype(np.uint8))


@bank.mutant("L2.liveness.num_attention_heads", "Ten heads are not eight and two left over.")
class HeadsInGroupsOfEight(Reference):
    def mix(self, probs: Array, v: Array) -> Array:
        mixed = super().mix(probs, v)
        full = mixed.shape[2] // 8 * 8 or mixed.shape[2]
        return np.where(np.arange(mixed.shape[2])[:, None] < full, mixed, 0.0)


@bank.mutant("L2.liveness.head_dim", "A head whose size is no power of two has its last features.")
class HeadCutToPowerOfTwo(Reference):
    def scores(self, q: Array, k: Array) -> Array:
        size = q.shape[-1]
        kept = np.arange(size) < max(2 ** (size.bit_length() - 1), 16)
        return super().scores(np.where(kept, q, 0.0), k)


@bank.mutant("L2.liveness.intermediate_size", "The last unit of the MLP is in no whole block.")
class LastUnitsLeftOut(Reference):
    def linear(self, x: Array, name: str) -> Array:
        result = super().linear(x, name)
        if name.endswith("up_proj") and result.shape[-1] % 128 == 1:
            result[..., -1] = 0.0
        return result


@bank.mutant("L2.liveness.hidden_size", "The mean square is of all features, the last one too.")
class NormOfWholeBlocks(Reference):
    def rms_norm(self, x: Array, weight: Array) -> Array:
        size = x.shape[-1]
        whole = x if size % BLOCK != 1 else np.where(np.arange(size) < size - 1, x, 0.0)
        mean_square = np.mean(whole**2, axis=-1, keepdims=True)
        return np.asarray(
            x / np.sqrt(mean_square + self.config.rms_norm_eps) * self.norm_factor(weight)
        )


# -- lengths ---------------------------------------------------------------------------------------


@bank.mutant("L2.lengths.around_64", "The last key of a sequence is in a block too.")
class LastKeyBlockLeftOut(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        seen = super().visible(valid, start, T, layer)
        slots = seen.shape[-1]
        if slots > BLOCK and slots % BLOCK == 1:
            seen = seen & (np.arange(slots) < slots - 1)
        return seen


@bank.mutant("L2.lengths.around_128", "A later block rescales what the earlier ones have added.")
class BlocksNotRescaled(Reference):
    """A kernel that takes the keys block by block, each with a maximum of its own."""

    def softmax(self, scores: Array, visible: Array) -> Array:
        if scores.shape[-1] <= 2 * BLOCK:
            return super().softmax(scores, visible)
        seen = np.where(visible[:, None], scores, -1e30)
        parts = np.split(seen, range(BLOCK, seen.shape[-1], BLOCK), axis=-1)
        powers = [np.exp(part - part.max(axis=-1, keepdims=True)) for part in parts]
        whole = np.where(visible[:, None], np.concatenate(powers, axis=-1), 0.0)
        return np.asarray(whole / np.maximum(whole.sum(axis=-1, keepdims=True), 1e-30))


@bank.mutant("L2.lengths.cache_one_by_one", "A slot past a block is not one of the first block's.")
class CacheWrapsAtABlock(Reference):
    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        found = super().remember(i, k, v, start, cache)
        if start >= BLOCK and k.shape[1] == 1:
            for part, new in zip(cache[i], (k, v), strict=True):
                part[:, start - BLOCK] = new[:, 0]
                part[:, start] = 0.0
        return found


@bank.mutant("L2.lengths.cache_in_chunks", "A chunk may lie across two blocks of the cache.")
class ChunkCutAtABlock(Reference):
    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        found = super().remember(i, k, v, start, cache)
        border = (start // BLOCK + 1) * BLOCK
        for part in cache[i]:
            part[:, border : start + k.shape[1]] = 0.0
        return found


# -- what must not matter --------------------------------------------------------------------------


@bank.mutant("L2.laws.up_scaled", "Nothing in a float32 model ends at 65 504.")
class ProductsClipped(Reference):
    def linear(self, x: Array, name: str) -> Array:
        result = super().linear(x, name)
        return np.clip(result, -65504, 65504) if name.endswith("up_proj") else result


@bank.mutant("L2.laws.values_scaled", "Values of 1e-7 are numbers.")
class SmallValuesFlushed(Reference):
    def project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(i, x)
        return q, k, np.where(np.abs(v) < 6e-5, 0.0, v)


@bank.mutant("L2.laws.rows_repeated", "Rows with the same tokens are rows each.")
class EqualRowsOnce(Reference):
    def forward(
        self, inputs: ModelInputs, valid: Array | None, start: int, cache: list[LayerCache] | None
    ) -> ModelOutputs:
        outputs = super().forward(inputs, valid, start, cache)
        if inputs.input_ids is None or outputs.logits is None:
            return outputs
        _, first = np.unique(inputs.input_ids, axis=0, return_index=True)
        logits = np.zeros_like(outputs.logits)
        logits[first] = outputs.logits[first]
        return dataclasses.replace(outputs, logits=logits)


@bank.mutant("L2.laws.padding_split", "Padding may be in the middle of a row.")
class PaddingAtTheEndsOnly(Reference):
    def forward(
        self, inputs: ModelInputs, valid: Array | None, start: int, cache: list[LayerCache] | None
    ) -> ModelOutputs:
        if valid is None and cache is None:
            mask = inputs.attention_mask
            before = np.maximum.accumulate(mask, axis=1)
            after = np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
            valid = before & after
        return super().forward(inputs, valid, start, cache)
