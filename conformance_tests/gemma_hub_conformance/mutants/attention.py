"""Bugs in attention: scales, heads, masks, softmax."""

import dataclasses
from typing import Any

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.checkpoints import PAD_ID
from gemma_hub_conformance.mutants.bank import Bank, to_bfloat16
from gemma_hub_numpy.model import Array, LayerCache, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"


@bank.mutant(FORWARD, "Scale by head_dim, not by hidden_size / heads.")
class AttnScaleHidden(Reference):
    def attention_scale(self) -> float:
        return float((self.config.hidden_size / self.config.num_attention_heads) ** -0.5)


@bank.mutant(FORWARD, "Scale the scores.")
class AttnScaleMissing(Reference):
    def attention_scale(self) -> float:
        return 1.0


@bank.mutant(FORWARD, "Scale the scores once.")
class AttnScaleTwice(Reference):
    def attention_scale(self) -> float:
        return self.config.attention_scale**2


@bank.mutant("L2.liveness.query_pre_attn_scalar", "Use the config's attention scale.")
class AttnScaleHardcoded(Reference):
    def attention_scale(self) -> float:
        return float(self.config.head_dim**-0.5)


@bank.mutant(FORWARD, "Every group of query heads has its own kv head.")
class AttnGqaFirstHead(Reference):
    def kv_heads(self) -> Array:
        return np.zeros(self.config.num_attention_heads, np.int64)


@bank.mutant(FORWARD, "Query head n uses kv head n // (heads / kv heads).")
class AttnGqaOrder(Reference):
    def kv_heads(self) -> Array:
        return np.arange(self.config.num_attention_heads) % self.config.num_key_value_heads


@bank.mutant(FORWARD, "Split the projection into heads first, then head size.")
class AttnHeadLayoutQ(Reference):
    def project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(i, x)
        B, T, N, H = q.shape
        return q.reshape(B, T, H, N).transpose(0, 1, 3, 2), k, v


@bank.mutant(FORWARD, "Join heads first, then head size, before o_proj.")
class AttnHeadLayoutO(Reference):
    def mix(self, probs: Array, v: Array) -> Array:
        mixed = super().mix(probs, v)
        return mixed.transpose(0, 1, 3, 2).reshape(mixed.shape)


@bank.mutant(FORWARD, "k_proj gives keys and v_proj values.")
class AttnKvSwapped(Reference):
    def project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(i, x)
        return q, v, k


@bank.mutant("L2.forward.square.no_padding", "Projections are [out, in]: do not transpose them.")
class CkptTransposedSquare(Reference):
    def parameter(self, name: str) -> Array:
        value = super().parameter(name)
        return value.T if "q_proj" in name and value.shape[0] == value.shape[-1] else value


@bank.mutant("L2.forward.square.no_padding", "q_proj gives queries and k_proj keys.")
class AttnQkSwapped(Reference):
    def project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(i, x)
        return (k, q, v) if q.shape == k.shape else (q, k, v)


@bank.mutant("L2.forward.mha.no_padding", "kv heads are in order also where none is shared.")
class CacheKvOffsetMha(Reference):
    def kv_heads(self) -> Array:
        heads = super().kv_heads()
        return heads[::-1] if len(set(heads.tolist())) == len(heads) else heads


@bank.mutant("L2.forward.mqa.no_padding", "Keys and values of MQA are one head of head_dim.")
class AttnMqaHalves(Reference):
    def project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(i, x)
        return (q, k, np.roll(v, 1, axis=-1)) if k.shape[2] == 1 else (q, k, v)


@bank.mutant("L2.forward.bias.no_padding", "Load the attention biases.")
class AttnBiasDropped(Reference):
    def linear(self, x: Array, name: str) -> Array:
        return self.contract("bti,oi->bto", x, self.parameter(f"{name}.weight"))


@bank.mutant("L2.forward.bias.no_padding", "o_proj has a bias as well.")
class AttnOutputBiasDropped(Reference):
    def linear(self, x: Array, name: str) -> Array:
        y = super().linear(x, name)
        biased = self.config.attention_bias and "o_proj" in name
        return y - self.parameter(f"{name}.bias") if biased else y


@bank.mutant("L2.masks.future", "A token does not see later ones.")
class AttnCausalMissing(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        return np.repeat(valid[:, None, :], T, axis=1)


@bank.mutant("L2.masks.future", "A token does not see the next one.")
class AttnCausalOffByOne(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        slots = np.arange(valid.shape[1])
        return valid[:, None, :] & (slots <= np.arange(start, start + T)[:, None] + 1)


@bank.mutant(FORWARD, "A token sees itself.")
class AttnCausalStrict(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        slots = np.arange(valid.shape[1])
        return valid[:, None, :] & (slots < np.arange(start, start + T)[:, None])


@bank.mutant("L2.masks.past", "A token sees all earlier ones: there is no window.")
class AttnWindowExtra(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        slots = np.arange(valid.shape[1])
        recent = slots > np.arange(start, start + T)[:, None] - 8
        return super().visible(valid, start, T, layer) & recent


@bank.mutant("L2.forward.gqa.left_padding", "Padding is not seen.")
class PadAttendedPrefill(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        return super().visible(np.ones_like(valid), start, T, layer)


@bank.mutant(
    "L2.forward.gqa.left_padding", "The mask is not the number of tokens: pads may be left."
)
class MaskAsLengths(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        count = valid.sum(axis=1)[:, None]
        return super().visible(np.arange(valid.shape[1]) < count, start, T, layer)


@bank.mutant("L2.masks.hole", "Padding may stand anywhere in a row.")
class MaskAsFirstToken(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        from_first = np.maximum.accumulate(valid, axis=1)
        return super().visible(from_first, start, T, layer)


@bank.mutant("L2.masks.pad_id_as_token", "The mask says what is padding, not the pad id.")
class PadIdUsedAsMask(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if inputs.input_ids is not None and not args:
            mask = inputs.attention_mask & (inputs.input_ids != PAD_ID)
            inputs = dataclasses.replace(inputs, attention_mask=mask)
        return super().run(inputs, *args, **kwargs)


@bank.mutant("L2.masks.fully_masked_row", "Mask with a large finite number, not with infinity.")
class AttnMaskInfinite(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        with np.errstate(invalid="ignore"):
            scores = np.where(visible[:, None], scores, -np.inf)
            powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
            return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@bank.mutant(FORWARD, "The mask removes scores; adding 0 or 1 does not.")
class AttnBoolMaskAdded(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        return super().softmax(scores + visible[:, None], np.ones_like(visible))


@bank.mutant(FORWARD, "The masking number must be far below every score.")
class AttnMaskFiniteTooSmall(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        scores = np.where(visible[:, None], scores, -10.0)
        return super().softmax(scores, np.ones_like(visible))


@bank.mutant(FORWARD, "Compute the softmax in float32.")
class AttnSoftmaxInBf16(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        return to_bfloat16(super().softmax(scores, visible))


@bank.mutant(FORWARD, "The softmax runs over the keys.")
class AttnSoftmaxOverQueries(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        weights = super().softmax(scores, visible)
        total = weights.sum(axis=2, keepdims=True)
        return np.asarray(weights / np.where(total > 0, total, 1.0))


@bank.mutant(FORWARD, "First-generation Gemma has no cap on scores.")
class AttnSoftcapExtra(Reference):
    def scores(self, q: Array, k: Array) -> Array:
        return 50.0 * np.tanh(super().scores(q, k) / 50.0)


@bank.mutant("L2.forward.softcap", "Cap the scores where the config says so.")
class AttnSoftcapMissing(Reference):
    def scores(self, q: Array, k: Array) -> Array:
        products = self.contract("btnh,bsnh->bnts", q, k[:, :, self.kv_heads()])
        return products * self.attention_scale()


@bank.mutant(
    "L2.forward.sliding_window", "A window of w holds the token itself and w - 1 before it."
)
class SwaOffByOne(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        config = self.config
        if config.sliding_window is not None:
            self.config = dataclasses.replace(config, sliding_window=config.sliding_window + 1)
        try:
            return super().visible(valid, start, T, layer)
        finally:
            self.config = config


@bank.mutant("L2.forward.sliding_window", "layer_types says which layers have a window.")
class SwaWrongLayerParity(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        return super().visible(valid, start, T, (layer + 1) % self.config.num_hidden_layers)


@bank.mutant("L2.liveness.attention_dropout", "Inference drops nothing.")
class AttnDropoutInEval(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        probs = super().softmax(scores, visible)
        rate = self.config.attention_dropout
        kept = np.random.default_rng(0).random(probs.shape) >= rate
        return np.asarray(probs * kept / (1 - rate))


@bank.mutant("L2.forward.single_row", "A batch of one row is causal too.")
class SingleRowUncausal(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        if len(valid) == 1:
            return np.repeat(valid[:, None, :], T, axis=1)
        return super().visible(valid, start, T, layer)


@bank.mutant("L2.cache.chunks_of_3", "A chunk is causal inside too.")
class AttnCausalOffInChunk(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        if start and T > 1:
            return np.repeat(valid[:, None, :], T, axis=1)
        return super().visible(valid, start, T, layer)


@bank.mutant("L2.cache.chunks_of_3", "A chunk's first query stands at its own slot, not at slot 0.")
class AttnCausalTopLeft(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        return super().visible(valid, start if T == 1 else 0, T, layer)


@bank.mutant("L2.cache.chunks_of_7_9_7", "A chunk sees the cache, not only itself.")
class CacheMaskLength(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        own = np.arange(valid.shape[1]) >= (start if T > 1 else 0)
        return super().visible(valid & own, start, T, layer)


@bank.mutant("L2.cache.gqa.left_padding", "Decoding does not see the prompt's padding either.")
class PadAttendedDecode(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        seen = np.ones_like(valid) if start else valid
        return super().visible(seen, start, T, layer)


@bank.mutant("L2.cache.mqa.left_padding", "One-token steps use every head's own scores.")
class DecodeGqaFirstHead(Reference):
    def attention(
        self, i: int, x: Array, positions: Array, valid: Array, start: int,
        cache: list[LayerCache] | None,
    ) -> Array:  # fmt: skip
        self._decoding = cache is not None and x.shape[1] == 1
        return super().attention(i, x, positions, valid, start, cache)

    def scores(self, q: Array, k: Array) -> Array:
        scores = super().scores(q, k)
        return np.repeat(scores[:, :1], scores.shape[1], axis=1) if self._decoding else scores
