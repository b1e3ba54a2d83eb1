"""Keys and values of one layer, preallocated. Twin: gemma_hub_torch/cache.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gemma_hub.config import GemmaConfig


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, each (B, S, K, H)."""

    keys: Array
    values: Array


def empty_cache(
    config: GemmaConfig, batch_size: int, max_length: int, dtype: jnp.dtype, device: jax.Device
) -> tuple[LayerCache, ...]:
    """One `LayerCache` per layer, all zeros."""
    shape = (batch_size, max_length, config.num_key_value_heads, config.head_dim)
    return tuple(
        LayerCache(
            jnp.zeros(shape, dtype=dtype, device=device),
            jnp.zeros(shape, dtype=dtype, device=device),
        )
        for _ in range(config.num_hidden_layers)
    )


def append(cache: LayerCache, k: Array, v: Array, start: Array | int) -> LayerCache:
    """`cache` with k and v (B, T, K, H) in the slots from `start` on; in place under jit.

    XLA would shift a write that does not fit instead of failing: `Cache.admit` refuses it before.
    """
    return LayerCache(
        jax.lax.dynamic_update_slice_in_dim(cache.keys, k, start, axis=1),
        jax.lax.dynamic_update_slice_in_dim(cache.values, v, start, axis=1),
    )


def filled(cache: LayerCache, num_slots: int) -> LayerCache:
    """The first `num_slots` slots: those that a query may see."""
    return LayerCache(cache.keys[:, :num_slots], cache.values[:, :num_slots])
