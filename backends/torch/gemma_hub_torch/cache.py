"""Keys and values of one layer, preallocated. Twin: gemma_hub_flax/cache.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_hub.config import GemmaConfig


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, each (B, S, K, H)."""

    keys: Tensor
    values: Tensor


def empty_cache(
    config: GemmaConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """One `LayerCache` per layer, all zeros."""
    shape = (batch_size, max_length, config.num_key_value_heads, config.head_dim)
    return tuple(
        LayerCache(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        for _ in range(config.num_hidden_layers)
    )


def append(cache: LayerCache, k: Tensor, v: Tensor, start: int) -> LayerCache:
    """`cache` with k and v (B, T, K, H) in the slots from `start` on, written in place."""
    end = start + k.shape[1]
    cache.keys[:, start:end] = k
    cache.values[:, start:end] = v
    return cache


def filled(cache: LayerCache, num_slots: int) -> LayerCache:
    """Views of the first `num_slots` slots: those that a query may see."""
    return LayerCache(cache.keys[:, :num_slots], cache.values[:, :num_slots])
