"""Keys and values, preallocated. Twin: gemma_hub_torch/cache.py."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError
from gemma_hub.memory import check_cache_fits
from gemma_hub_flax.devices import free_memory


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, each (B, S, K, H)."""

    keys: Array
    values: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValueCache:
    """`past_key_values`: what the tokens so far left behind. A pytree.

    Attributes:
        layers: one `LayerCache` per layer.
        valid: (B, S) bool, the slots that hold real tokens.
        next_position: (B,) integers, position of each row's next token.
        length: number of slots used.
        can_grow: whether a call that does not fit makes a larger cache (one that a call made by
            itself) or is an error (one from `init_cache`).
    """

    layers: tuple[LayerCache, ...]
    valid: Array
    next_position: Array
    length: Array | int
    can_grow: bool = field(default=False, metadata={"static": True})

    @property
    def known_length(self) -> int | None:
        """`length`, as far as it is known: not inside a compiled function."""
        return None if isinstance(self.length, jax.core.Tracer) else int(self.length)

    def counts(self, num_tokens: int) -> bool:
        """Whether it holds this many tokens, as far as that is known."""
        return self.known_length is None or num_tokens == self.known_length

    def with_room(self, num_tokens: int) -> "KeyValueCache":
        """A cache with `num_tokens` free slots: itself if there are so many, or under jit.

        Raises:
            CapacityError: there are not, and it must not grow.
        """
        if self.known_length is None:
            return self
        needed, capacity = self.known_length + num_tokens, self.valid.shape[1]
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
    config: GemmaConfig, batch_size: int, max_length: int, dtype: jnp.dtype, device: jax.Device
) -> KeyValueCache:
    """A cache of `max_length` slots that holds nothing yet, and does not grow."""
    check_fits(config, batch_size, max_length, dtype, device)
    shape = (batch_size, max_length, config.num_key_value_heads, config.head_dim)
    return KeyValueCache(
        layers=tuple(
            LayerCache(
                jnp.zeros(shape, dtype=dtype, device=device),
                jnp.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_hidden_layers)
        ),
        valid=jnp.zeros((batch_size, max_length), dtype=jnp.bool, device=device),
        next_position=jnp.zeros(batch_size, dtype=jnp.int32, device=device),
        length=0,
    )


def check_fits(
    config: GemmaConfig, batch_size: int, max_length: int, dtype: jnp.dtype, device: jax.Device
) -> None:
    """Refuse a cache for which the device has not enough memory.

    Raises:
        CapacityError: it has not.
    """
    check_cache_fits(
        config, batch_size, max_length, jnp.dtype(dtype).itemsize, lambda: free_memory(device)
    )


def widen(array: Array, more: int) -> Array:
    """(B, S, ...) with `more` slots of zeros behind."""
    return jnp.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2))


def store(array: Array, new: Array, start: Array | int) -> Array:
    """A copy of `array` (B, S) with `new` (B, M) in the slots from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(array, new, start, axis=1)


def append(cache: LayerCache | None, k: Array, v: Array, start: Array | int) -> LayerCache:
    """`cache` with k and v (B, T, K, H) in the slots from `start` on; in place under jit.

    XLA would shift a write that does not fit. Outside of jit `with_room` has refused it; under jit
    nothing can be raised, so it turns into NaN instead of into a wrong result.
    """
    if cache is None:
        return LayerCache(k, v)
    fits = start + k.shape[1] <= cache.keys.shape[1]
    k, v = jnp.where(fits, k, jnp.nan), jnp.where(fits, v, jnp.nan)
    return LayerCache(
        jax.lax.dynamic_update_slice_in_dim(cache.keys, k, start, axis=1),
        jax.lax.dynamic_update_slice_in_dim(cache.values, v, start, axis=1),
    )


def filled(array: Array, num_slots: Array | int) -> Array:
    """(B, S, ...) up to the slots that a query may have to look at: shapes are fixed, so all."""
    return array


@jax.jit
def gathered(layers: Sequence[LayerCache], slots: Array) -> LayerCache:
    """(B, S) slots of one layer of several caches, counted end to end; zeros at -1."""
    return LayerCache(
        take([layer.keys for layer in layers], slots),
        take([layer.values for layer in layers], slots),
    )


def take(arrays: list[Array], slots: Array) -> Array:
    """(B, S, K, H) of the slots of (b, s, K, H) arrays, counted end to end; zeros at -1."""
    flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]
    return jnp.concatenate([*flat, jnp.zeros_like(flat[0][:1])])[slots]
