"""Products of few rows and attention of one query a row, by the C++ of gemma_hub/native.

Both take as long as reading the weights, or the cache, takes. On the CPU, in float32 and bfloat16.
A row's result is the same bit by bit whatever rows are beside it.
Twin: gemma_hub_torch/fast_native.py.
"""

from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gemma_hub.native.library import check_is_for_native, load_library
from gemma_hub_flax.devices import device_of, name_of

MOST_ROWS = 16
"""Up to so many, the product takes no longer than XLA's."""

_SOURCE = Path(__file__).with_name("fast_native.cpp")
_TARGETS = ("gemma_hub_product", "gemma_hub_attend")
_DTYPES: list[Any] = []
_LOCK = Lock()


def use_native(module: nnx.Module) -> None:
    """Let `module` and its parts multiply few rows, and attend from one query a row, natively.

    Raises:
        InputError: it cannot be compiled here, or the model is not what it is for.
    """
    weight = jax.tree.leaves(nnx.state(module, nnx.Param))[0]
    check_is_for_native(name_of(device_of(weight)), str(weight.dtype))
    load_native()
    for _, part in nnx.iter_graph(module):
        if hasattr(part, "native"):
            cast(Any, part).native = True


def load_native() -> None:
    """Compile and load the functions, unless they are there.

    Raises:
        InputError: that fails.
    """
    library = load_library(_SOURCE, (f"-I{jax.ffi.include_dir()}",))
    with _LOCK:
        if not _DTYPES:  # XLA refuses the functions of a second library, such as of another cache
            for name in _TARGETS:
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library[name]), platform="cpu")
            _DTYPES[:] = jnp.float32, jnp.bfloat16


def has_native(dtype: jnp.dtype) -> bool:
    """Whether the functions of this dtype are there: not in a process that has not loaded them."""
    return dtype in _DTYPES


def is_for_native(x: Array, weight: Array) -> bool:
    """Whether `native_linear` is for x (..., in) times weight (out, in)."""
    return x.size <= MOST_ROWS * weight.shape[1] and x.dtype == weight.dtype and has_native(x.dtype)


def native_linear(x: Array, weight: Array) -> Array:
    """x (..., in) times weight (out, in)."""
    y = _product(x.reshape(-1, weight.shape[1]), weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@jax.custom_jvp
def _product(x: Array, weight: Array) -> Array:
    """x (rows, in) times weight (out, in)."""
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype)
    y: Array = jax.ffi.ffi_call("gemma_hub_product", shape, vmap_method="sequential")(x, weight)
    return y


@_product.defjvp
def _tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, weight), (dx, dweight) = primals, tangents
    tangent = jnp.einsum("ri,oi->ro", dx, weight) + jnp.einsum("ri,oi->ro", x, dweight)
    return _product(x, weight), tangent


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def native_attend(q: Array, k: Array, v: Array, visible: Array, scale: float) -> Array:
    """Attention of q (B, N, H) over k and v (B, S, K, H) where visible (B, S).

    A row that sees nothing has the average of v.

    Returns:
        The weighted sums, (B, N, H).
    """
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    call = jax.ffi.ffi_call("gemma_hub_attend", shape, vmap_method="sequential")
    out: Array = call(q, k, v, visible, scale=np.float32(scale))
    return out


@native_attend.defjvp
def _attend_tangent(
    scale: float, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    q, k, v, visible = primals
    B, N, H = q.shape
    K = k.shape[2]

    def plain(q: Array, k: Array, v: Array) -> Array:
        queries, keys, values = (each.astype(jnp.float32) for each in (q, k, v))
        scores = jnp.einsum("bkgh,bskh->bkgs", queries.reshape(B, K, N // K, H), keys) * scale
        probs = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -2.0e38))
        return jnp.einsum("bkgs,bskh->bkgh", probs, values).reshape(B, N, H).astype(q.dtype)

    _, tangent = jax.jvp(plain, (q, k, v), tangents[:3])
    return native_attend(q, k, v, visible, scale), tangent
