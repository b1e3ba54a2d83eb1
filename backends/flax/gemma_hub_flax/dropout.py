"""Dropout. Twin: gemma_hub_torch/dropout.py, where the random numbers are torch's own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Dropout(NamedTuple):
    """Zeroes entries with probability `rate` and scales up the others; without a key, nothing."""

    rate: float
    key: Array | None

    @property
    def is_off(self) -> bool:
        """Whether nothing is ever zeroed."""
        return self.key is None or self.rate == 0

    def __call__(self, x: Array) -> Array:
        if self.key is None or self.rate == 0:
            return x
        kept = jax.random.bernoulli(self.key, 1.0 - self.rate, x.shape)
        return jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """A key of its own for each of `count` layers, or None for each."""
    return [None] * count if key is None else [jax.random.fold_in(key, i) for i in range(count)]
