"""Keys and values, preallocated. Twin: gemma_hub_flax/cache.py."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError
from gemma_hub.memory import check_cache_fits
from gemma_hub_torch.devices import free_memory


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, each (B, S, K, H)."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class KeyValueCache:
    """`past_key_values`: what the tokens so far left behind.

    Attributes:
        layers: one `LayerCache` per layer.
        valid: (B, S) bool, the slots that hold real tokens.
        next_position: (B,) integers, position of each row's next token.
        length: number of slots used.
        can_grow: whether a call that does not fit makes a larger cache (one that a call made by
            itself) or is an error (one from `init_cache`).
    """

    layers: tuple[LayerCache, ...]
    valid: Tensor
    next_position: Tensor
    length: int
    can_grow: bool = False

    def counts(self, num_tokens: int) -> bool:
        """Whether it holds this many tokens."""
        return num_tokens == self.length

    def with_room(self, num_tokens: int) -> "KeyValueCache":
        """A cache with `num_tokens` free slots: itself if there are so many.

        Raises:
            CapacityError: there are not, and it must not grow.
        """
        needed, capacity = self.length + num_tokens, self.valid.shape[1]
        if needed <= capacity:
            return self
        if not self.can_grow:
            raise CapacityError(
                f"The cache holds {self.length} of {capacity} tokens and {num_tokens} more do not "
                "fit. Make a larger one with init_cache(batch_size, max_length)."
            )
        more = max(2 * capacity, needed) - capacity
        layers = tuple(LayerCache(widen(c.keys, more), widen(c.values, more)) for c in self.layers)
        return dataclasses.replace(self, layers=layers, valid=widen(self.valid, more))


def empty_cache(
    config: GemmaConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
) -> KeyValueCache:
    """A cache of `max_length` slots that holds nothing yet, and does not grow."""
    check_fits(config, batch_size, max_length, dtype, device)
    shape = (batch_size, max_length, config.num_key_value_heads, config.head_dim)
    return KeyValueCache(
        layers=tuple(
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_hidden_layers)
        ),
        valid=torch.zeros((batch_size, max_length), dtype=torch.bool, device=device),
        next_position=torch.zeros(batch_size, dtype=torch.int64, device=device),
        length=0,
    )


def check_fits(
    config: GemmaConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a cache for which the device has not enough memory.

    Raises:
        CapacityError: it has not.
    """
    check_cache_fits(config, batch_size, max_length, dtype.itemsize, lambda: free_memory(device))


def widen(array: Tensor, more: int) -> Tensor:
    """(B, S, ...) with `more` slots of zeros behind."""
    free = torch.zeros((array.shape[0], more, *array.shape[2:]), dtype=array.dtype)
    return torch.cat([array, free.to(array.device)], 1)


def store(array: Tensor, new: Tensor, start: int) -> Tensor:
    """A copy of `array` (B, S) with `new` (B, M) in the slots from `start` on."""
    array = array.clone()
    array[:, start : start + new.shape[1]] = new
    return array


def append(cache: LayerCache | None, k: Tensor, v: Tensor, start: int) -> LayerCache:
    """`cache` with k and v (B, T, K, H) in the slots from `start` on, written in place."""
    if cache is None:
        return LayerCache(k, v)
    end = start + k.shape[1]
    cache.keys[:, start:end] = k
    cache.values[:, start:end] = v
    return cache


def filled(array: Tensor, num_slots: int) -> Tensor:
    """The first `num_slots` of (B, S, ...): the slots that a query may have to look at."""
    return array[:, :num_slots]


def gathered(layers: Sequence[LayerCache], slots: Tensor) -> LayerCache:
    """(B, S) slots of one layer of several caches, counted end to end; zeros at -1."""
    return LayerCache(
        take([layer.keys for layer in layers], slots),
        take([layer.values for layer in layers], slots),
    )


def take(arrays: list[Tensor], slots: Tensor) -> Tensor:
    """(B, S, K, H) of the slots of (b, s, K, H) arrays, counted end to end; zeros at -1."""
    flat = [array.flatten(0, 1) for array in arrays]
    return torch.cat([*flat, torch.zeros_like(flat[0][:1])])[slots]
