"""Attention by the native kernel: one query a row, without the (B, N, 1, S) weights in memory.

Only where nobody asked for the weights: other attention is fused by XLA. Twin:
gemma_hub_torch/fast_attention.py. Axes are those of attention.py.
"""

from typing import NamedTuple

from jax import Array

from gemma_hub_flax.fast_native import native_attend


class FusedMask(NamedTuple):
    """A mask in the form that the kernel takes.

    Attributes:
        visible: (B, 1, S) bool, as `causal_mask` made it.
    """

    visible: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, 1, S)."""
        return self.visible.shape


def fused_mask(mask: Array, native: bool) -> Array | FusedMask:
    """The (B, T, S) mask for the kernel, or itself where that is not for it.

    Args:
        mask: as `causal_mask` made it.
        native: whether the model is a native one.
    """
    return FusedMask(mask) if native and mask.shape[1] == 1 else mask


def fused_attend(q: Array, k: Array, v: Array, mask: FusedMask, scale: float) -> Array:
    """The weighted sums (B, 1, N, H) of v (B, S, K, H) for q (B, 1, N, H)."""
    return native_attend(q[:, 0], k, v, mask.visible[:, 0], scale)[:, None]
