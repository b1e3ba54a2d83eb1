"""Bugs of attention that no list has: kernels in tiles, rotations, heads and caps."""

import dataclasses
import math

import numpy as np

from gemma_hub_conformance.mutants.bank import Bank
from gemma_hub_numpy.model import Array, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"
TILES = "L2.lengths.around_64"
"""Sequences of 64 and 65 tokens: the second has one key more than whole tiles hold."""
MASKED = -1e30


# -- softmax in tiles ----------------------------------------------------------------------------


class _Tiled(Reference):
    """Takes the keys a tile at a time, as a fused kernel does, with a running maximum."""

    tile = 32

    def softmax(self, scores: Array, visible: Array) -> Array:
        scores = np.where(visible[:, None], scores, MASKED)
        highest = np.full((*scores.shape[:-1], 1), -np.inf)
        total = np.zeros(highest.shape)
        powers: list[Array] = []
        for first in range(0, scores.shape[-1], self.tile):
            tile = scores[..., first : first + self.tile]
            before, highest = highest, np.maximum(highest, tile.max(axis=-1, keepdims=True))
            factor = self.factor(before, highest)
            powers = [each * self.of_powers(factor) for each in powers]
            powers.append(np.exp(tile - highest))
            total = total * self.of_total(factor) + powers[-1].sum(axis=-1, keepdims=True)
        return np.asarray(np.concatenate(powers, axis=-1) / total)

    def factor(self, before: Array, highest: Array) -> Array:
        """What earlier tiles are multiplied by when the maximum rises."""
        return np.asarray(np.exp(before - highest))

    def of_powers(self, factor: Array) -> Array:
        return factor

    def of_total(self, factor: Array) -> Array:
        return factor


@bank.mutant(TILES, "When the maximum rises, what was added up before is scaled down.")
class TilesNotRescaled(_Tiled):
    def of_powers(self, factor: Array) -> Array:
        return np.ones_like(factor)


@bank.mutant(TILES, "When the maximum rises, the total is scaled down too.")
class TileTotalNotRescaled(_Tiled):
    def of_total(self, factor: Array) -> Array:
        return np.ones_like(factor)


@bank.mutant(TILES, "A tile in which nothing is visible adds nothing.")
class EmptyTileCounts(_Tiled):
    """Guards exp(-inf - -inf) with a factor of 1 and so keeps the tile of padding."""

    tile = 16

    def factor(self, before: Array, highest: Array) -> Array:
        return np.where(before <= MASKED, 1.0, super().factor(before, highest))


@bank.mutant(TILES, "The total begins at 0 for every tile of queries.")
class TotalNotReset(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        scores = np.where(visible[:, None], scores, MASKED)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        total = powers.sum(axis=-1, keepdims=True)
        total[:, :, 32:] += total[:, :, :-32].copy() if total.shape[2] > 32 else 0.0
        return np.asarray(powers / total)


@bank.mutant(TILES, "The causal mask is there in every tile of keys.")
class MaskInFirstTileOnly(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        later = np.arange(valid.shape[1]) >= 64
        return super().visible(valid, start, T, layer) | (valid & later)[:, None]


@bank.mutant(TILES, "A length without a remainder is causal too.")
class WholeTilesUncausal(Reference):
    """The kernel for whole tiles has no mask."""

    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        if T % 32 == 0:
            return np.repeat(valid[:, None, :], T, axis=1)
        return super().visible(valid, start, T, layer)


@bank.mutant("L2.laws.rows_permuted", "Which tiles are only padding differs from row to row.")
class SkipsTilesOfFirstRow(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        skipped = int(valid[0].argmax()) // 8 * 8
        return super().visible(valid, start, T, layer) & (np.arange(valid.shape[1]) >= skipped)


@bank.mutant(FORWARD, "Keys that fill up a tile are not keys.")
class PaddedKeysCounted(Reference):
    """Pads the keys with zeros to whole tiles; a zero key has the score 0."""

    def softmax(self, scores: Array, visible: Array) -> Array:
        extra = -scores.shape[-1] % 32
        more = np.zeros((*scores.shape[:-1], extra))
        seen = np.ones((*visible.shape[:-1], extra), np.bool_)
        wide = super().softmax(
            np.concatenate([scores, more], axis=-1), np.concatenate([visible, seen], axis=-1)
        )
        return wide[..., : scores.shape[-1]]


@bank.mutant(FORWARD, "A small probability is not 0.")
class SmallProbsFlushed(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        probs = super().softmax(scores, visible)
        return np.where(probs < 2.0**-14, 0.0, probs)


@bank.mutant(FORWARD, "The exponential is good to float32.")
class FastExp(Reference):
    """2**x by the bits of the exponent and a cubic for the rest: four digits."""

    def softmax(self, scores: Array, visible: Array) -> Array:
        scores = np.where(visible[:, None], scores, MASKED)
        x = np.maximum((scores - scores.max(axis=-1, keepdims=True)) / math.log(2), -1000.0)
        whole = np.floor(x)
        rest = x - whole
        cubic = 1 + rest * (0.695976 + rest * (0.224943 + rest * 0.079081))
        powers = np.ldexp(cubic, whole.astype(np.int64))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@bank.mutant(FORWARD, "The division by the total is good to float32.")
class ReciprocalOfTwelveBits(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        scores = np.where(visible[:, None], scores, MASKED)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mantissa, exponent = np.frexp(1 / powers.sum(axis=-1, keepdims=True))
        return np.asarray(powers * np.ldexp(np.round(mantissa * 2**12) / 2**12, exponent))


# -- heads ---------------------------------------------------------------------------------------


@bank.mutant(FORWARD, "Heads go into o_proj as they came out of q_proj, group by group.")
class MixedHeadsAcrossGroups(Reference):
    def mix(self, probs: Array, v: Array) -> Array:
        mixed = super().mix(probs, v)
        B, T, N, H = mixed.shape
        K = self.config.num_key_value_heads
        return mixed.reshape(B, T, K, N // K, H).swapaxes(2, 3).reshape(B, T, N, H)


@bank.mutant(FORWARD, "Split the keys into heads first, then head size.")
class KeyLayoutTransposed(Reference):
    def project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(i, x)
        B, T, K, H = k.shape
        return q, k.reshape(B, T, H, K).swapaxes(2, 3), v


@bank.mutant("L2.liveness.num_key_value_heads", "The number of key/value heads may be odd.")
class OddKvHeadMissing(Reference):
    """Takes them two at a time, and for the last one left over the one before it."""

    def kv_heads(self) -> Array:
        heads, K = super().kv_heads(), self.config.num_key_value_heads
        return np.minimum(heads, K - 2) if K % 2 and K > 1 else heads


@bank.mutant("L2.forward.bias.no_padding", "k_proj and v_proj have each a bias of its own.")
class KvBiasesExchanged(Reference):
    def parameter(self, name: str) -> Array:
        if name.endswith("k_proj.bias"):
            return super().parameter(name.replace("k_proj", "v_proj"))
        if name.endswith("v_proj.bias"):
            return super().parameter(name.replace("v_proj", "k_proj"))
        return super().parameter(name)


@bank.mutant("L2.forward.bias.no_padding", "One of several shards adds the bias, not each.")
class BiasOfEveryShard(Reference):
    def linear(self, x: Array, name: str) -> Array:
        y = super().linear(x, name)
        return y + self.parameter(f"{name}.bias") if f"{name}.bias" in self.shapes else y


# -- rotary positions ----------------------------------------------------------------------------


@bank.mutant(FORWARD, "A head is rotated within itself.")
class RopeAcrossHeads(Reference):
    """Splits the projection into halves before it is split into heads."""

    def rotate(self, x: Array, angles: Array) -> Array:
        B, T, heads, _ = x.shape
        first, second = np.split(x.reshape(B, T, -1), 2, axis=-1)
        cos = np.tile(np.cos(angles), heads)
        sin = np.tile(np.sin(angles), heads)
        return np.concatenate(
            [first * cos - second * sin, second * cos + first * sin], axis=-1
        ).reshape(x.shape)


@bank.mutant(FORWARD, "Entries j and j + head_dim/2 are a pair, not the first and the last.")
class RopeMirrored(Reference):
    def rotate(self, x: Array, angles: Array) -> Array:
        first, second = np.split(x, 2, axis=-1)
        turned = super().rotate(np.concatenate([first, second[..., ::-1]], axis=-1), angles)
        first, second = np.split(turned, 2, axis=-1)
        return np.concatenate([first, second[..., ::-1]], axis=-1)


@bank.mutant(FORWARD, "The first pair turns fastest.")
class RopeSlowestFirst(Reference):
    def frequencies(self, layer: int) -> Array:
        return super().frequencies(layer)[::-1]


@bank.mutant(FORWARD, "Every pair is rotated: Gemma has no partial rotation.")
class RopePartial(Reference):
    def frequencies(self, layer: int) -> Array:
        frequencies = super().frequencies(layer)
        return np.where(np.arange(len(frequencies)) < len(frequencies) // 2, frequencies, 0.0)


@bank.mutant(FORWARD, "The exponents end at 1 - 2 / head_dim, not at 1.")
class RopeFrequenciesToTheEnd(Reference):
    def frequencies(self, layer: int) -> Array:
        half = self.config.head_dim // 2
        return np.asarray(self.config.layers[layer].rope_theta ** -np.linspace(0, 1, half))


@bank.mutant("L2.positions.offset_250", "Positions do not fit into eight bits.")
class PositionsInUintEight(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(positions % 256, layer)


@bank.mutant("L3.bfloat16.precision.far_positions", "A table of positions does not wrap around.")
class PositionTableWraps(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(positions % 4096, layer)


@bank.mutant(FORWARD, "Cosines and sines are those of the whole angle.")
class PhaseOfSixteenBits(Reference):
    """Counts an angle in steps of 1/65536 of a turn, as a unit for sines does."""

    def angles(self, positions: Array, layer: int) -> Array:
        step = 2 * math.pi / 2**16
        return np.asarray(np.round(super().angles(positions, layer) / step) * step)


@bank.mutant("L2.laws.rows_permuted", "Positions belong to a call, not to its length.")
class AnglesRememberedByLength(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        if not hasattr(self, "_angles"):
            self._angles: dict[tuple[tuple[int, ...], int], Array] = {}
        found = super().angles(positions, layer)
        return self._angles.setdefault((positions.shape, layer), found)


# -- caps, windows, masks ------------------------------------------------------------------------


@bank.mutant("L2.forward.softcap", "Scores are scaled before they are capped.")
class CapBeforeScale(Reference):
    def scores(self, q: Array, k: Array) -> Array:
        scale = self.attention_scale()
        products = self.contract("btnh,bsnh->bnts", q, k[:, :, self.kv_heads()])
        return self.soft_cap(products, self.config.attn_logit_softcapping) * scale


@bank.mutant("L2.forward.softcap", "Scores and logits have a cap each.")
class CapsExchanged(Reference):
    def soft_cap(self, x: Array, cap: float | None) -> Array:
        caps = (self.config.attn_logit_softcapping, self.config.final_logit_softcapping)
        return super().soft_cap(x, caps[1] if cap == caps[0] else caps[0])


@bank.mutant("L2.forward.softcap", "A cap bends smoothly; it does not cut off.")
class CapClips(Reference):
    def soft_cap(self, x: Array, cap: float | None) -> Array:
        return x if cap is None else np.clip(x, -cap, cap)


@bank.mutant("L2.forward.sliding_window", "A window goes along with the query.")
class WindowInBlocks(Reference):
    """Attends within blocks of the window's size."""

    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        window = self.config.layers[layer].window
        seen = super().visible(valid, start, T, layer)
        if window is None:
            return seen
        slots, queries = np.arange(valid.shape[1]), np.arange(start, start + T)
        return np.asarray(seen & (slots // window == queries[:, None] // window))


@bank.mutant("L2.positions.packed", "A token sees the slots before it, whatever their positions.")
class CausalByPosition(Reference):
    def block(
        self, i: int, x: Array, positions: Array, valid: Array, start: int, cache: object
    ) -> Array:
        self._positions = positions
        return super().block(i, x, positions, valid, start, cache)  # type: ignore[arg-type]

    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        seen = super().visible(valid, start, T, layer)
        if start or valid.shape[1] != T:
            return seen
        return seen & (self._positions[:, None, :] <= self._positions[:, :, None])


@bank.mutant("L2.forward.gqa.left_padding", "Padding is masked; a key of zeros is seen.")
class PaddingKeysZeroed(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        padding = np.asarray(~visible.any(axis=1, keepdims=True))
        causal = np.tril(np.ones(visible.shape[1:], np.bool_), visible.shape[2] - visible.shape[1])
        return super().softmax(
            np.where(padding[:, None], 0.0, scores), visible | (padding & causal)
        )


@bank.mutant("L2.forward.gqa.left_padding", "Every row has its own mask.")
class MaskOfFirstRow(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        return super().visible(np.broadcast_to(valid[:1], valid.shape), start, T, layer)


@bank.mutant("L2.masks.padding_content", "A mask belongs to a call, not to its shape.")
class MaskRememberedByShape(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        if not hasattr(self, "_masks"):
            self._masks: dict[tuple[object, ...], Array] = {}
        found = super().visible(valid, start, T, layer)
        return self._masks.setdefault((valid.shape, start, layer), found)


@bank.mutant("L2.forward.sliding_window", "A layer's window is that of its own kind.")
class WindowEverywhere(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        windows = [i for i, each in enumerate(self.config.layers) if each.window is not None]
        return super().visible(valid, start, T, windows[0] if windows else layer)


@bank.mutant("L2.forward.linear_rope.no_padding", "A factor divides positions, not the base.")
class RopeFactorOnTheta(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(positions * self.config.layers[layer].rope_factor, layer)

    def frequencies(self, layer: int) -> Array:
        half = self.config.head_dim // 2
        kind = self.config.layers[layer]
        return np.asarray((kind.rope_theta * kind.rope_factor) ** -(np.arange(half) / half))


@bank.mutant("L2.liveness.max_position_embeddings", "The limit scales no position.")
class RopeStretchedToLimit(Reference):
    """Dynamic scaling where nobody asked for it: a call past half the limit has another base."""

    def angles(self, positions: Array, layer: int) -> Array:
        limit = self.config.max_position_embeddings
        longer = positions.max() + 1 > limit / 2
        config = self.config
        if longer:
            self.config = dataclasses.replace(config, rope_theta=config.rope_theta * 2)
        try:
            return super().angles(positions, layer)
        finally:
            self.config = config
