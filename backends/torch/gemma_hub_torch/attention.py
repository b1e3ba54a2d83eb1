"""Positions, masks and scaled dot-product attention. Twin: gemma_hub_flax/attention.py.

Axes: B batch, T queries, S key slots, N query heads, K key/value heads, G = N / K, H head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_hub.config import GemmaConfig
from gemma_hub_torch.dropout import dropout
from gemma_hub_torch.fast_attention import FusedMask, fused_attend

Mask = Tensor | FusedMask

# Finite, so that a row that sees nothing is a plain average and not NaN.
MASKED = -2.0e38


class Rope(NamedTuple):
    """How much of each feature, and of its partner, is in the turned one: (B, T, 1, H) float32."""

    cos: Tensor
    sin: Tensor


def rope(position_ids: Tensor, config: GemmaConfig) -> Rope:
    """The rotation by integer positions (B, T): pairs are (i, i + H / 2)."""
    H = config.head_dim
    exponents = torch.arange(0, H, 2, dtype=torch.float32, device=position_ids.device) / H
    frequencies = 1.0 / config.rope_theta**exponents
    positions = position_ids.to(torch.float32) / config.rope_factor
    angles = (positions[:, :, None] * frequencies)[:, :, None]
    cos, sin = torch.cos(angles), torch.sin(angles)
    return Rope(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


def rotate(x: Tensor, turns: Rope) -> Tensor:
    """x (B, T, N, H) turned by its positions; in float32."""
    y = x.to(torch.float32)
    first, second = torch.chunk(y, 2, -1)
    y = y * turns.cos + torch.cat([second, first], -1) * turns.sin
    return y.to(x.dtype)


def causal_mask(valid: Tensor, start: int, num_queries: int) -> Tensor:
    """(B, T, S) bool: query t, in slot start + t, sees the valid (B, S) slots up to its own."""
    slots = torch.arange(valid.shape[1], device=valid.device)
    queries = start + torch.arange(num_queries, device=valid.device)
    return valid[:, None, :] & (slots[None, None, :] <= queries[None, :, None])


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout_rate: float
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, T, N, H) over k and v (B, S, K, H) where mask (B, T, S).

    Returns:
        The weighted sums (B, T, N, H), and the weights (B, N, T, S) as they were before dropout.
    """
    if isinstance(mask, FusedMask):
        if dropout_rate == 0:
            return fused_attend(q, k, v, mask, scale), q.new_empty(0)  # nobody wants the weights
        mask = mask.visible
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    q = q.reshape(B, T, K, N // K, H)
    scores = product("BTKGH,BSKH->BKGTS", q, k) * scale
    scores = torch.where(mask[:, None, None], scores, MASKED)
    probs = torch.softmax(scores, -1).to(v.dtype)
    dropped = dropout(probs, dropout_rate)
    out = product("BKGTS,BSKH->BTKGH", dropped, v).to(v.dtype)
    return out.reshape(B, T, N, H), probs.reshape(B, N, T, S)


def product(subscripts: str, a: Tensor, b: Tensor) -> Tensor:
    """Einsum of a and b in float32, whatever their dtype."""
    return torch.einsum(subscripts, a.to(torch.float32), b.to(torch.float32))
