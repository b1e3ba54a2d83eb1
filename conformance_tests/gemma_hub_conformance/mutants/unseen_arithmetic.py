"""Bugs of norms, MLP, weights and sizes that no list has: approximations, shards, tails, types."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from gemma_hub_conformance.mutants.bank import Bank, to_bfloat16
from gemma_hub_numpy.model import Array, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"


# -- norms ---------------------------------------------------------------------------------------


class _Norm(Reference):
    """A norm with another root mean square."""

    def root(self, x: Array) -> Array:
        raise NotImplementedError

    def rms_norm(self, x: Array, weight: Array) -> Array:
        return np.asarray(x / self.root(x) * self.norm_factor(weight))

    def mean_square(self, x: Array) -> Array:
        return np.asarray(np.mean(x * x, axis=-1, keepdims=True))


@bank.mutant(FORWARD, "A norm is over the features of one token.")
class NormOverTokens(_Norm):
    def root(self, x: Array) -> Array:
        return np.asarray(np.sqrt(np.mean(x * x, axis=1, keepdims=True) + self.config.rms_norm_eps))


@bank.mutant(FORWARD, "Epsilon is added to the mean, not to the sum.")
class NormEpsBeforeMean(_Norm):
    def root(self, x: Array) -> Array:
        eps = self.config.rms_norm_eps / self.config.hidden_size
        return np.asarray(np.sqrt(self.mean_square(x) + eps))


@bank.mutant(FORWARD, "Epsilon is added; it is no lower limit.")
class NormEpsAsFloor(_Norm):
    def root(self, x: Array) -> Array:
        return np.asarray(np.sqrt(np.maximum(self.mean_square(x), self.config.rms_norm_eps)))


@bank.mutant(FORWARD, "The mean is over hidden_size features, not over those of a padded row.")
class NormOfPaddedWidth(_Norm):
    def root(self, x: Array) -> Array:
        D = self.config.hidden_size
        padded = -(-D // 128) * 128
        return np.asarray(np.sqrt(self.mean_square(x) * D / padded + self.config.rms_norm_eps))


@bank.mutant(FORWARD, "The mean square is that of all shards together.")
class NormOfOwnShard(_Norm):
    def root(self, x: Array) -> Array:
        halves = [
            np.broadcast_to(self.mean_square(half), half.shape)
            for half in np.array_split(x, 2, axis=-1)
        ]
        return np.asarray(np.sqrt(np.concatenate(halves, axis=-1) + self.config.rms_norm_eps))


@bank.mutant(FORWARD, "A reciprocal root from Newton's method takes three steps, not two.")
class RootOfTwoSteps(_Norm):
    """Begins with the famous integer."""

    def root(self, x: Array) -> Array:
        y = np.asarray(self.mean_square(x) + self.config.rms_norm_eps, np.float32)
        guess = (0x5F3759DF - (y.view(np.int32) >> 1)).astype(np.int32).view(np.float32)
        inverse = guess.astype(np.float64)
        for _ in range(2):
            inverse = inverse * (1.5 - 0.5 * y * inverse * inverse)
        return np.asarray(1 / inverse)


@bank.mutant(FORWARD, "The sum of offset and weight is in float32.")
class NormFactorInBf16(Reference):
    def norm_factor(self, weight: Array) -> Array:
        return to_bfloat16(super().norm_factor(weight))


@bank.mutant(FORWARD, "Each norm has the root of its own input.")
class NormRootReused(Reference):
    """A fused kernel keeps the statistics of the first norm of a layer for the second."""

    def block(self, i: int, x: Array, *args: Any) -> Array:
        self._root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return super().block(i, x, *args)

    def mlp(self, i: int, x: Array) -> Array:
        weight = self.parameter(f"model.layers.{i}.post_attention_layernorm.weight")
        return super().mlp(i, self._middle / self._root * self.norm_factor(weight))

    def rms_norm(self, x: Array, weight: Array) -> Array:
        self._middle = x
        return super().rms_norm(x, weight)


# -- residual stream and layers ------------------------------------------------------------------


@bank.mutant(FORWARD, "The residual stream of a float32 model is in float32.")
class ResidualInBf16(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        return to_bfloat16(super().block(i, x, *args))


@bank.mutant(
    "L2.forward.gqa.left_padding", "What a layer adds is not rounded to float16 on its way."
)
class BranchInFloatSixteen(Reference):
    """Sums what shards have in a narrower type."""

    def mlp(self, i: int, x: Array) -> Array:
        return super().mlp(i, x).astype(np.float16).astype(np.float64)


@bank.mutant(FORWARD, "The last layer runs once.")
class LastLayerTwice(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        x = super().block(i, x, *args)
        return super().block(i, x, *args) if i == self.config.num_hidden_layers - 1 else x


@bank.mutant(FORWARD, "Every layer has an MLP of its own.")
class MlpOfFirstLayer(Reference):
    def mlp(self, i: int, x: Array) -> Array:
        return super().mlp(0, x)


@bank.mutant(FORWARD, "Attention of a layer and its MLP have the same index.")
class MlpOneLayerEarly(Reference):
    """A pipeline in which the prefetched weights are one step ahead."""

    def mlp(self, i: int, x: Array) -> Array:
        return super().mlp((i + 1) % self.config.num_hidden_layers, x)


# -- MLP -----------------------------------------------------------------------------------------


@bank.mutant(FORWARD, "GELU is computed, not looked up in a table of 32 steps per unit.")
class GeluTable(Reference):
    def activation(self, x: Array) -> Array:
        places = np.arange(-8, 8 + 1 / 32, 1 / 32)
        inside = np.interp(x, places, super().activation(places))
        return np.where(x > 8, x, np.where(x < -8, 0.0, inside))


@bank.mutant(FORWARD, "The hyperbolic tangent in GELU is no fraction of two polynomials.")
class TanhPade(Reference):
    def activation(self, x: Array) -> Array:
        inner = np.clip(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3), -3, 3)
        return np.asarray(0.5 * x * (1 + inner * (27 + inner**2) / (27 + 9 * inner**2)))


@bank.mutant(FORWARD, "GELU is smooth: it is 0 or x itself only far out.")
class GeluCutOff(Reference):
    def activation(self, x: Array) -> Array:
        return np.where(np.abs(x) < 3, super().activation(x), np.maximum(x, 0.0))


@bank.mutant(FORWARD, "Units that fill up a matrix to a multiple of 128 do nothing.")
class PaddedUnitsOfGarbage(Reference):
    def mlp(self, i: int, x: Array) -> Array:
        extra = -self.config.intermediate_size % 128
        rng = np.random.default_rng(i)
        left, right, down = 0.02 * rng.standard_normal((3, extra, x.shape[-1]))
        product = self.activation(x @ left.T) * (x @ right.T)
        return np.asarray(super().mlp(i, x) + product @ down)


@bank.mutant(FORWARD, "The result of the MLP is the sum over both shards.")
class MlpShardNotAdded(Reference):
    def mlp(self, i: int, x: Array) -> Array:
        at = f"model.layers.{i}.mlp"
        active = self.activation(self.linear(x, f"{at}.gate_proj"))
        product = active * self.linear(x, f"{at}.up_proj")
        product[..., self.config.intermediate_size // 2 :] = 0.0
        return self.linear(product, f"{at}.down_proj")


# -- weights -------------------------------------------------------------------------------------


def _in_steps(weight: Array, axis: int | None) -> Array:
    """`weight` in 8 bits with one scale, or one for each row."""
    scale = np.abs(weight).max(axis=axis, keepdims=True) / 127
    return np.asarray(np.round(weight / scale) * scale)


@bank.mutant(FORWARD, "Projections are not quantized unless that was asked for.")
class ProjectionsInInt8(Reference):
    def parameter(self, name: str) -> Array:
        value = super().parameter(name)
        return _in_steps(value, -1) if name.endswith("_proj.weight") else value


@bank.mutant(FORWARD, "The head is not in eight bits where the embedding is in 32.")
class HeadInFloat8(Reference):
    def head_rows(self) -> Iterator[Array]:
        for rows in super().head_rows():
            yield rows.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


@bank.mutant(FORWARD, "The embedding is not quantized unless that was asked for.")
class EmbeddingInInt8(Reference):
    def embed(self, ids: Array) -> Array:
        return np.asarray(_in_steps(self.parameter("model.embed_tokens.weight"), None)[ids])


@bank.mutant(FORWARD, "Round the embedding scale to the compute type, not to float16.")
class EmbScaleInFloatSixteen(Reference):
    def embedding_scale(self) -> float:
        return float(np.float16(self.config.embedding_scale))


@bank.mutant(FORWARD, "The embedding scale is no reciprocal of a rounded reciprocal.")
class EmbScaleOfRoundedInverse(Reference):
    def embedding_scale(self) -> float:
        return float(1 / to_bfloat16(np.asarray(1 / self.config.embedding_scale)))


@bank.mutant("L7.text.bos", "Ids are integers: bfloat16 ends at 256.")
class IdsInBf16(Reference):
    def embed(self, ids: Array) -> Array:
        rounded = to_bfloat16(ids).astype(np.int64)
        return super().embed(np.minimum(rounded, self.config.vocab_size - 1))


@bank.mutant(FORWARD, "An odd vocabulary is cut at one place for all.")
class VocabularyShardOffByOne(Reference):
    """Rows are cut at V / 2 rounded up, ids at V / 2 rounded down."""

    def embed(self, ids: Array) -> Array:
        V = self.config.vocab_size
        at_rows, at_ids = -(-V // 2), V // 2
        own = np.minimum(ids - at_ids + at_rows, V - 1)
        return super().embed(np.where(ids >= at_ids, own, ids))


@bank.mutant(FORWARD, "The last block of the vocabulary is shorter.")
class LastVocabularyBlockShifted(Reference):
    """Moves the last block of 64 rows back to fit, and its logits not with it."""

    def head(self, x: Array) -> Array:
        logits = super().head(x)
        V, first = logits.shape[-1], logits.shape[-1] // 64 * 64
        if V > 64 and first < V:
            logits[..., first:] = logits[..., V - 64 : V - 64 + V - first].copy()
        return logits


@bank.mutant(FORWARD, "A tied head reads the embedding, not a narrower copy of it.")
class TiedHeadRounded(Reference):
    """Keeps a second copy of the embedding for the head, in another type."""

    def head_rows(self) -> Iterator[Array]:
        for rows in super().head_rows():
            yield rows.astype(np.float16).astype(np.float64)


@bank.mutant(FORWARD, "Logits are returned as they are: no maximum is taken off.")
class LogitsCentred(Reference):
    def head(self, x: Array) -> Array:
        logits = super().head(x)
        return np.asarray(logits - logits.max(axis=-1, keepdims=True))


@bank.mutant(FORWARD, "Logits are scores, not logarithms of probabilities.")
class LogitsNormalized(Reference):
    def head(self, x: Array) -> Array:
        logits = super().head(x)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


# -- sizes that only differ elsewhere ------------------------------------------------------------


@bank.mutant("L2.forward.square.no_padding", "o_proj is [out, in]: do not transpose it.")
class OutputTransposedSquare(Reference):
    def parameter(self, name: str) -> Array:
        value = super().parameter(name)
        return value.T if "o_proj" in name and value.shape[0] == value.shape[-1] else value


@bank.mutant(
    "L2.forward.mha.no_padding", "Fused keys and values stand one after the other, not in turns."
)
class KvFusedInterleaved(Reference):
    """Splits fused keys and values head by head where they stand one after the other."""

    def project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(i, x)
        if k.shape[2] == 1 or k.shape[2] != q.shape[2]:
            return q, k, v
        fused = np.concatenate([k, v], axis=2)
        return q, fused[:, :, ::2], fused[:, :, 1::2]


@bank.mutant("L2.forward.untied.no_padding", "An untied embedding is not the head.")
class EmbedsWithTheHead(Reference):
    def embed(self, ids: Array) -> Array:
        return self.rows(self.head_name(), ids)
