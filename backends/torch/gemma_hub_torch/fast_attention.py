"""Attention by PyTorch's fused kernel: the same sums without the (B, N, T, S) weights in memory.

On the CPU, where it is quicker, and only where nobody asked for the weights.
Everything in it is float32. Axes are those of attention.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma_hub_torch.calls import can_look
from gemma_hub_torch.fast_native import native_attend


@dataclass(frozen=True)
class FusedMask:
    """A mask in the form that the kernel takes.

    Attributes:
        visible: (B, T, S) bool, as `causal_mask` made it.
        bias: (B, 1, T, S) float32 to add to the scores; None where each query sees all slots up to
            its own, so that the kernel need not look at the others.
        native: whether the kernel is that of fast_native.py.
    """

    visible: Tensor
    bias: Tensor | None = None
    native: bool = False

    @property
    def shape(self) -> torch.Size:
        """(B, T, S)."""
        return self.visible.shape


def fused_mask(mask: Tensor, masked: float, native: bool = False) -> Tensor | FusedMask:
    """The (B, T, S) mask for the fused kernel, or itself where that is not the quicker one.

    Args:
        mask: as `causal_mask` made it.
        masked: score of what a query does not see.
        native: whether the model is a native one.
    """
    _, T, S = mask.shape
    if mask.device.type != "cpu":
        return mask
    if native and T == 1 and not torch.is_grad_enabled():
        return FusedMask(mask, native=True)
    # The last query sees every slot: then there is no padding, and all queries see a triangle.
    if 1 < T == S and can_look(mask) and bool(mask[:, -1].all()):
        return FusedMask(mask, None)
    # A score that is replaced has no gradient; one that something is added to has, which shows in
    # rows that see nothing.
    if torch.is_grad_enabled():
        return mask
    return FusedMask(mask, torch.where(mask, 0.0, masked)[:, None])


def fused_attend(q: Tensor, k: Tensor, v: Tensor, mask: FusedMask, scale: float) -> Tensor:
    """The weighted sums (B, T, N, H) of v (B, S, K, H) for q (B, T, N, H)."""
    B, T, N, H = q.shape
    if mask.native:
        return native_attend(q[:, 0], k, v, mask.visible[:, 0], scale)[:, None]
    queries, keys, values = (x.to(torch.float32).transpose(1, 2) for x in (q, k, v))
    if T == 1:
        # The heads that share keys see the same slots: as queries of one head, (B, K, G, H), they
        # have the keys read once.
        queries = queries.reshape(B, -1, N // k.shape[2], H)
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask.bias,
        is_causal=mask.bias is None,
        scale=scale,
        enable_gqa=True,
    ).to(v.dtype)
    return out.reshape(B, T, N, H) if T == 1 else out.transpose(1, 2)
