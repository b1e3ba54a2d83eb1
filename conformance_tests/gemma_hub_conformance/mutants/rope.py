"""Bugs in rotary positions."""

from typing import ClassVar

import numpy as np

from gemma_hub_conformance.mutants.bank import Bank, to_bfloat16
from gemma_hub_numpy.model import Array, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"


@bank.mutant("L2.liveness.rope_theta", "Use the config's rope_theta.")
class RopeThetaHardcoded(Reference):
    def frequencies(self, layer: int) -> Array:
        half = self.config.head_dim // 2
        return np.asarray(10_000.0 ** -(np.arange(half) / half))


@bank.mutant(FORWARD, "The exponents run over head_dim, not hidden_size / heads.")
class RopeDimFromHidden(Reference):
    def frequencies(self, layer: int) -> Array:
        half = self.config.head_dim // 2
        size = self.config.hidden_size // self.config.num_attention_heads
        return np.asarray(self.config.rope_theta ** -(2 * np.arange(half) / size))


@bank.mutant("L2.positions.offset_0", "Compute the frequencies in float32.")
class RopeInvFreqLow(Reference):
    def frequencies(self, layer: int) -> Array:
        return to_bfloat16(super().frequencies(layer))


@bank.mutant("L2.positions.offset_0", "Compute cos and sin in float32.")
class RopeCosSinLow(Reference):
    def rotate(self, x: Array, angles: Array) -> Array:
        first, second = np.split(x, 2, axis=-1)
        cos = to_bfloat16(np.cos(angles))[:, :, None, :]
        sin = to_bfloat16(np.sin(angles))[:, :, None, :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@bank.mutant("L2.positions.offset_257", "Positions are integers or float32: bfloat16 ends at 256.")
class RopePositionsInBf16(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(to_bfloat16(positions), layer)


@bank.mutant("L2.positions.offset_4001", "Compute the angles in float32, not in float16.")
class RopeAnglesInFloat16(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(positions, layer).astype(np.float16).astype(np.float64)


@bank.mutant(FORWARD, "Rotate by the positive angle.")
class RopeSign(Reference):
    def rotate(self, x: Array, angles: Array) -> Array:
        first, second = np.split(x, 2, axis=-1)
        # Negating every angle rotates q and k alike; the bug is the sign of one sine only.
        cos, sin = np.cos(angles)[:, :, None, :], np.sin(angles)[:, :, None, :]
        return np.concatenate([first * cos + second * sin, second * cos + first * sin], axis=-1)


@bank.mutant(FORWARD, "Entries j and j + head_dim/2 are a pair, not 2j and 2j + 1.")
class RopeInterleaved(Reference):
    def rotate(self, x: Array, angles: Array) -> Array:
        apart = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
        first, second = np.split(super().rotate(apart, angles), 2, axis=-1)
        return np.stack([first, second], axis=-1).reshape(x.shape)


@bank.mutant(FORWARD, "Keep the first half until the second is computed.")
class RopeInplaceOverwrite(Reference):
    def rotate(self, x: Array, angles: Array) -> Array:
        first, second = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles)[:, :, None, :], np.sin(angles)[:, :, None, :]
        first = first * cos - second * sin
        return np.concatenate([first, second * cos + first * sin], axis=-1)


@bank.mutant(FORWARD, "Rotate the keys too.")
class RopeQOnly(Reference):
    def apply_positions(
        self, q: Array, k: Array, v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        return self.rotate(q, angles), k, v


@bank.mutant(FORWARD, "Rotate the keys by the queries' angles, not against them.")
class RopeKeysBackwards(Reference):
    def apply_positions(
        self, q: Array, k: Array, v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        return self.rotate(q, angles), self.rotate(k, -angles), v


@bank.mutant(FORWARD, "Values are not rotated.")
class RopeOnV(Reference):
    def apply_positions(
        self, q: Array, k: Array, v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        return self.rotate(q, angles), self.rotate(k, angles), self.rotate(v, angles)


@bank.mutant(
    "L2.forward.small_limit.no_padding", "The table has head_dim features, whatever the limit."
)
class RopeTableTruncated(Reference):
    def rotate(self, x: Array, angles: Array) -> Array:
        kept = np.arange(x.shape[-1]) < self.config.max_position_embeddings
        return np.where(kept, super().rotate(x, angles), x)


@bank.mutant("L2.positions.offset_8190", "The table is as long as max_position_embeddings.")
class RopeOobClamp(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(np.minimum(positions, 8191), layer)


@bank.mutant("L2.liveness.rope_scaling", "Apply linear RoPE scaling.")
class RopeScalingIgnored(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(positions * self.config.rope_factor, layer)


@bank.mutant("L2.forward.linear_rope.no_padding", "Divide positions by the factor.")
class RopeScalingMultiplies(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(positions * self.config.rope_factor**2, layer)


@bank.mutant("L2.forward.linear_rope.no_padding", "Scaled positions are not whole numbers.")
class RopeScalingFloors(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        factor = self.config.rope_factor
        return super().angles(positions // factor * factor, layer)


@bank.mutant("L2.positions.gap", "Use the position_ids of the call.")
class PositionsIgnored(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        counted = np.broadcast_to(np.arange(positions.shape[1]), positions.shape)
        return super().angles(counted, layer)


@bank.mutant("L2.positions.packed", "Positions may start again at 0 inside a row.")
class PositionsNeverFall(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(np.maximum.accumulate(positions, axis=1), layer)


@bank.mutant("L2.positions.packed", "Every row has its own positions.")
class PositionsOfFirstRow(Reference):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(np.broadcast_to(positions[:1], positions.shape), layer)


@bank.mutant("L1.contract.two_models", "Do not share a table between models of other configs.")
class RopeTableShared(Reference):
    table: ClassVar[dict[tuple[bytes, int], Array]] = {}

    def angles(self, positions: Array, layer: int) -> Array:
        key = (positions.tobytes(), self.config.head_dim)
        return self.table.setdefault(key, super().angles(positions, layer))
