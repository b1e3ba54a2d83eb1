"""Bugs of the catalogue that no other module has: reshapes, caps, paths without a cache."""

import dataclasses
from typing import Any

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank, to_bfloat16
from gemma_hub_numpy.model import Array, LayerCache, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"


# -- attention -----------------------------------------------------------------------------------


@bank.mutant(FORWARD, "Repeat key heads along the axis of the heads.")
class AttnRepeatWrongAxis(Reference):
    """Repeats along the slots and takes the memory for (B, S, N, H)."""

    def scores(self, q: Array, k: Array) -> Array:
        B, S, K, H = k.shape
        group = q.shape[2] // K
        wrong = np.repeat(k, group, axis=1).reshape(B, S, K * group, H)
        products = self.contract("btnh,bsnh->bnts", q, wrong)
        return self.soft_cap(products * self.attention_scale(), self.config.attn_logit_softcapping)


@bank.mutant("L2.forward.softcap", "Cap the scores and then mask them.")
class AttnSoftcapAfterMask(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        cap = self.config.attn_logit_softcapping
        if cap is None:
            return super().softmax(scores, visible)
        return super().softmax(np.where(visible[:, None], scores, -cap), np.ones_like(visible))


@bank.mutant("L2.forward.softcap", "Cap the score of the first key too.")
class AttnSoftcapFlashFirst(Reference):
    def scores(self, q: Array, k: Array) -> Array:
        capped = super().scores(q, k)
        products = self.contract("btnh,bsnh->bnts", q, k[:, :1, self.kv_heads()])
        capped[..., :1] = products * self.attention_scale()
        return capped


@bank.mutant("L2.forward.sliding_window", "The window is there on every path.")
class SwaMissingOnFlash(Reference):
    """A fast kernel that has only a causal mask."""

    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        causal = np.arange(valid.shape[1]) <= np.arange(start, start + T)[:, None]
        return valid[:, None, :] & causal


# -- head ----------------------------------------------------------------------------------------


@bank.mutant("L2.forward.softcap", "Cap the logits in float32.")
class HeadSoftcapLowPrecision(Reference):
    def soft_cap(self, x: Array, cap: float | None) -> Array:
        if cap is None or cap != self.config.final_logit_softcapping:
            return super().soft_cap(x, cap)
        return cap * to_bfloat16(np.tanh(to_bfloat16(x / cap)))


@bank.mutant("L2.forward.gqa.left_padding", "A row that fills up the vocabulary has no logit.")
class HeadVocabPadding(Reference):
    def head(self, x: Array) -> Array:
        logits = super().head(x)
        extra = -logits.shape[-1] % 64
        return np.concatenate([logits, np.zeros((*logits.shape[:-1], extra))], axis=-1)


# -- cache ---------------------------------------------------------------------------------------


@bank.mutant("L2.cache.gqa.no_padding", "A cache that grows keeps every slot where it was.")
class CacheResizeScrambles(Reference):
    """Grows at 16 slots: the same memory, read with the longer stride."""

    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        if start == 16:
            for array in cache[i]:
                flat = array[:, :16].copy().ravel()
                array[:] = np.resize(np.pad(flat, (0, array.size - flat.size)), array.shape)
        return super().remember(i, k, v, start, cache)


@bank.mutant(FORWARD, "Without a cache the model is the same.")
class CacheNonePath(Reference):
    """Without one it takes keys for one position older than they are."""

    _cached = False

    def attention(
        self,
        i: int,
        x: Array,
        positions: Array,
        valid: Array,
        start: int,
        cache: list[LayerCache] | None,
    ) -> Array:
        self._cached = cache is not None
        return super().attention(i, x, positions, valid, start, cache)

    def apply_positions(
        self, q: Array, k: Array, v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        behind = 0.0 if self._cached else self.frequencies(0)
        return self.rotate(q, angles), self.rotate(k, angles - behind), v


# -- checkpoints and heads -----------------------------------------------------------------------


@bank.mutant(FORWARD, "A stored gate is transposed, not reshaped.")
class MlpGatingReshape(Reference):
    def parameter(self, name: str) -> Array:
        value = super().parameter(name)
        return value.T.reshape(value.shape) if "gate_proj" in name else value


@bank.mutant(FORWARD, "Split a stored projection into heads, then turn its axes.")
class CkptQkvPermute(Reference):
    def parameter(self, name: str) -> Array:
        value = super().parameter(name)
        if not name.endswith("q_proj.weight"):
            return value
        N, H = self.config.num_attention_heads, self.config.head_dim
        wrong = value.T.reshape(N, -1, H)  # (N, D, H) of memory that is (D, N, H)
        return wrong.swapaxes(1, 2).reshape(value.shape)


@bank.mutant("L5.sequence.logits.no_padding", "A row without padding ends in its last slot.")
class ClsPoolNoPad(Reference):
    """One before the first padding; without any that is slot 0."""

    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if inputs.pooled_positions is not None and inputs.attention_mask.all(axis=1).any():
            whole = inputs.attention_mask.all(axis=1)
            pooled = np.where(whole, 0, inputs.pooled_positions)
            inputs = dataclasses.replace(inputs, pooled_positions=pooled)
        return super().run(inputs, *args, **kwargs)
