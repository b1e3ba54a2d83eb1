"""Products of few rows by gemma_hub/native/products.h, at the speed at which memory is read.

On the CPU, in float32 and bfloat16. A row's result is the same bit by bit whatever rows are beside
it. Twin: gemma_hub_torch/fast_native.py.
"""

from pathlib import Path

import jax
import jax.ffi
import jax.numpy as jnp
from jax import Array

from gemma_hub.native.library import load_library

MOST_ROWS = 16
"""Up to so many, the product takes no longer than XLA's."""

_SOURCE = Path(__file__).with_name("fast_products.cpp")
_TARGET = "gemma_hub_product"


def load_native() -> None:
    """Compile and load the function, unless it is there.

    Raises:
        InputError: that fails.
    """
    library = load_library(_SOURCE, (f"-I{jax.ffi.include_dir()}",))
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library[_TARGET]), platform="cpu")


def is_for_native(x: Array, weight: Array) -> bool:
    """Whether `native_linear` is for x (..., in) times weight (out, in)."""
    return (
        x.size <= MOST_ROWS * weight.shape[1]
        and x.dtype == weight.dtype
        and x.dtype in (jnp.float32, jnp.bfloat16)
    )


def native_linear(x: Array, weight: Array) -> Array:
    """x (..., in) times weight (out, in)."""
    y = _product(x.reshape(-1, weight.shape[1]), weight)
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_jvp
def _product(x: Array, weight: Array) -> Array:
    """x (rows, in) times weight (out, in)."""
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype)
    y: Array = jax.ffi.ffi_call(_TARGET, shape, vmap_method="sequential")(x, weight)
    return y


@_product.defjvp
def _tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, weight), (dx, dweight) = primals, tangents
    tangent = jnp.einsum("ri,oi->ro", dx, weight) + jnp.einsum("ri,oi->ro", x, dweight)
    return _product(x, weight), tangent
