"""Positions, masks and scaled dot-product attention. Twin: gemma_hub_torch/attention.py.

Axes: B batch, T queries, S key slots, N query heads, K key/value heads, G = N / K, H head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gemma_hub.config import GemmaConfig
from gemma_hub_flax.dropout import Dropout
from gemma_hub_flax.fast_attention import FusedMask, fused_attend

Mask = Array | FusedMask

# Finite, so that a row that sees nothing is a plain average and not NaN.
MASKED = -2.0e38


class Rope(NamedTuple):
    """How much of each feature, and of its partner, is in the turned one: (B, T, 1, H) float32."""

    cos: Array
    sin: Array


def rope(position_ids: Array, config: GemmaConfig) -> Rope:
    """The rotation by integer positions (B, T): pairs are (i, i + H / 2)."""
    H = config.head_dim
    exponents = jnp.arange(0, H, 2, dtype=jnp.float32) / H
    frequencies = 1.0 / config.rope_theta**exponents
    positions = position_ids.astype(jnp.float32) / config.rope_factor
    angles = (positions[:, :, None] * frequencies)[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rope(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))


def rotate(x: Array, turns: Rope) -> Array:
    """x (B, T, N, H) turned by its positions; in float32."""
    y = x.astype(jnp.float32)
    first, second = jnp.split(y, 2, -1)
    y = y * turns.cos + jnp.concatenate([second, first], -1) * turns.sin
    return y.astype(x.dtype)


def causal_mask(valid: Array, start: Array | int, num_queries: int) -> Array:
    """(B, T, S) bool: query t, in slot start + t, sees the valid (B, S) slots up to its own."""
    slots = jnp.arange(valid.shape[1])
    queries = start + jnp.arange(num_queries)
    return valid[:, None, :] & (slots[None, None, :] <= queries[None, :, None])


def attend(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, dropout: Dropout
) -> tuple[Array, Array]:
    """Attention of q (B, T, N, H) over k and v (B, S, K, H) where mask (B, T, S).

    Returns:
        The weighted sums (B, T, N, H), and the weights (B, N, T, S) as they were before dropout.
    """
    if isinstance(mask, FusedMask):
        if dropout.is_off:
            return fused_attend(q, k, v, mask, scale), jnp.empty(0)  # nobody wants the weights
        mask = mask.visible
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    q = q.reshape(B, T, K, N // K, H)
    scores = product("BTKGH,BSKH->BKGTS", q, k) * scale
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    probs = jax.nn.softmax(scores, -1).astype(v.dtype)
    dropped = dropout(probs)
    out = product("BKGTS,BSKH->BTKGH", dropped, v).astype(v.dtype)
    return out.reshape(B, T, N, H), probs.reshape(B, N, T, S)


def product(subscripts: str, a: Array, b: Array) -> Array:
    """Einsum of a and b in float32, whatever their dtype."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
