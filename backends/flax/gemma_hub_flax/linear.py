"""Matrices by which rows are multiplied: stored as [out, in], as in the checkpoint.

Twin: gemma_hub_torch/linear.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gemma_hub_flax.fast_native import is_for_native, native_linear

# XLA's CPU product of one row of 16-bit floats converts the whole weight to float32 at every call,
# ten times slower than the read of the weight; with a few rows it does not.
_MIN_ROWS_16_BIT = 4
# Of few rows in float32, XLA's CPU product rearranges its right operand first. The weight is the
# larger one, so up to here it is made the left one: 1.1 to 3 times as fast.
_MAX_ROWS_WEIGHT_FIRST = 64


def linear(x: Array, weight: Array, bias: Array | None = None, *, native: bool = False) -> Array:
    """x (..., in) times weight (out, in), plus bias; float32 accumulation, result in x's dtype."""
    if native and bias is None and is_for_native(x, weight):
        return native_linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    num_rows = rows.shape[0]
    if x.dtype == jnp.float32 and 1 < num_rows <= _MAX_ROWS_WEIGHT_FIRST:
        y = _weight_first(rows, weight)
    else:
        if x.dtype != jnp.float32 and num_rows < _MIN_ROWS_16_BIT:
            rows = jnp.pad(rows, ((0, _MIN_ROWS_16_BIT - num_rows), (0, 0)))
        y = _product("ri,oi->ro", rows, weight)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y[:num_rows].astype(x.dtype).reshape(*x.shape[:-1], -1)


def _weight_first(rows: Array, weight: Array) -> Array:
    # The barriers keep XLA from turning it round again.
    columns = jax.lax.optimization_barrier(rows.T)
    return jax.lax.optimization_barrier(_product("oi,ir->or", weight, columns)).T


def _product(subscripts: str, a: Array, b: Array) -> Array:
    # HIGHEST: without it a GPU or TPU would multiply float32 in fewer bits.
    return jnp.einsum(
        subscripts,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


class Linear(nnx.Module):
    """`linear` with parameters of its own, drawn from normal(0, std).

    Attributes:
        native: multiply few rows as fast_native.py does.
    """

    native = False

    def __init__(
        self, size_in: int, size_out: int, rngs: nnx.Rngs, *, std: float, bias: bool = False
    ) -> None:
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (size_out, size_in)))
        self.bias = nnx.Param(jnp.zeros(size_out)) if bias else None

    def __call__(self, x: Array) -> Array:
        bias = None if self.bias is None else self.bias[...]
        return linear(x, self.weight[...], bias, native=self.native)


class Embedding(nnx.Module):
    """One row of `weight` (V, D) per id, drawn from normal(0, std).

    Looking up `padding_id` gives that row no gradient, as in Transformers.

    Attributes:
        native: as in `Linear`.
    """

    native = False

    def __init__(
        self,
        num_rows: int,
        size: int,
        rngs: nnx.Rngs,
        *,
        std: float,
        padding_id: int | None = None,
    ) -> None:
        self.padding_id = padding_id
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (num_rows, size)))

    def __call__(self, ids: Array) -> Array:
        rows = self.weight[ids]
        if self.padding_id is None:
            return rows
        is_padding = (ids == self.padding_id)[..., None]
        return jnp.where(is_padding, jax.lax.stop_gradient(rows), rows)

    def scores(self, x: Array) -> Array:
        """x (..., D) times each row: what the tied head gives, (..., V)."""
        return linear(x, self.weight[...], native=self.native)
