"""Products of few rows and attention of one query a row, by the C++ of gemma_hub/native.

Both take as long as reading the weights, or the cache, takes. Norms and gates of any number of
rows go through memory once, where PyTorch's operations do so up to ten times. On the CPU, in
float32 and bfloat16, without a gradient. A row's result is the same bit by bit whatever is beside
it.
Twin: gemma_hub_flax/fast_native.py.
"""

import ctypes
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from gemma_hub.native.library import check_is_for_native, load_library

MOST_ROWS = 16
"""Up to so many, the product takes no longer than those of PyTorch."""

_SOURCE = Path(__file__).with_name("fast_native.cpp")
_ARRAY, _SIZE, _NUMBER, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS: dict[str, list[Any]] = {
    "product": [_ARRAY] * 3 + [_SIZE] * 3 + [_THREADS],
    "attend": [_ARRAY] * 5 + [_SIZE] * 6 + [_NUMBER, _THREADS],
    "normalize": [_ARRAY] * 3 + [_SIZE] * 2 + [_NUMBER] * 2 + [_THREADS],
    "gated": [_ARRAY] * 3 + [_SIZE] * 2 + [_THREADS],
}
_FUNCTIONS: dict[tuple[str, torch.dtype], "ctypes._NamedFuncPointer"] = {}
_OPERATORS = torch.library.Library("gemma_hub_torch", "FRAGMENT")
_LOCK = Lock()


def use_native(module: nn.Module) -> None:
    """Let `module` and its parts multiply few rows, and attend from one query a row, natively.

    Raises:
        InputError: it cannot be compiled here, or the model is not what it is for.
    """
    weight = next(module.parameters())
    check_is_for_native(str(weight.device), str(weight.dtype).removeprefix("torch."))
    load_native()
    for part in module.modules():
        if hasattr(part, "native"):
            cast(Any, part).native = True


def load_native() -> None:
    """Compile and load the functions, unless they are there.

    Raises:
        InputError: that fails.
    """
    library = load_library(_SOURCE, ("-fopenmp",))
    with _LOCK:  # operators are defined once
        if not _FUNCTIONS:
            _define_operators()
        for name, arguments in _ARGUMENTS.items():
            for dtype in (torch.float32, torch.bfloat16):
                function = library[f"{name}_{str(dtype).removeprefix('torch.')}"]
                function.argtypes, function.restype = arguments, None
                _FUNCTIONS[name, dtype] = function


def has_native(dtype: torch.dtype) -> bool:
    """Whether the functions of this dtype are there: not in a process that has not loaded them."""
    return ("product", dtype) in _FUNCTIONS


def is_for_native(x: Tensor, weight: Tensor) -> bool:
    """Whether `native_linear` is for x (..., in) times weight (out, in)."""
    return (
        x.numel() <= MOST_ROWS * weight.shape[1]
        and x.dtype == weight.dtype
        and has_native(x.dtype)
        and x.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and (torch.compiler.is_dynamo_compiling() or not torch.compiler.is_compiling())
    )


def native_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times weight (out, in); no gradient."""
    product = torch.ops.gemma_hub_torch.product if torch.compiler.is_compiling() else _product
    y: Tensor = product(x.reshape(-1, weight.shape[1]).contiguous(), weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) times weight (out, in)."""
    (rows, size_in), size_out = x.shape, weight.shape[0]
    y = torch.empty(rows, size_out, dtype=x.dtype)
    pointers = weight.data_ptr(), x.data_ptr(), y.data_ptr()
    _FUNCTIONS["product", x.dtype](*pointers, rows, size_in, size_out, torch.get_num_threads())
    return y


def native_attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of q (B, N, H) over k and v (B, S, K, H) where visible (B, S); no gradient.

    A row that sees nothing has the average of v.

    Returns:
        The weighted sums, (B, N, H).
    """
    attend = torch.ops.gemma_hub_torch.attend if torch.compiler.is_compiling() else _attend
    out: Tensor = attend(q.contiguous(), k, v, visible.contiguous(), scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    (B, N, H), (S, K) = q.shape, k.shape[1:3]
    if k.stride() != v.stride() or k.stride()[1:] != (K * H, H, 1):
        k, v = k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr(), visible.data_ptr(), out.data_ptr()
    sizes = B, S, N, K, H, k.stride(0)
    _FUNCTIONS["attend", q.dtype](*pointers, *sizes, scale, torch.get_num_threads())
    return out


def is_for_one_pass(*arrays: Tensor) -> bool:
    """Whether `native_norm` or `native_gated_` is for these; torch.compile needs neither."""
    dtype = arrays[0].dtype
    return (
        has_native(dtype)
        and all(x.dtype == dtype and x.device.type == "cpu" for x in arrays)
        and all(type(x) in (nn.Parameter, Tensor) and x.is_contiguous() for x in arrays)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def native_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / rms(x) * (offset + weight) of each row of x (..., D); no gradient."""
    y, size = torch.empty_like(x), weight.numel()
    pointers = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    sizes = x.numel() // size, size
    _FUNCTIONS["normalize", x.dtype](*pointers, *sizes, eps, offset, torch.get_num_threads())
    return y


def native_gated_(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh form of GELU, both (..., F), in gate's memory; no gradient.

    New memory for the largest array of a layer takes half as long as all the rest.
    """
    size = gate.shape[-1]
    pointers = gate.data_ptr(), up.data_ptr(), gate.data_ptr()
    sizes = gate.numel() // size, size
    _FUNCTIONS["gated", gate.dtype](*pointers, *sizes, torch.get_num_threads())
    return gate


def _product_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _attend_shape(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


def _define_operators() -> None:
    """Name the functions for PyTorch: a graph of torch.compile can call what it knows by name."""
    _OPERATORS.define("product(Tensor x, Tensor weight) -> Tensor")
    _OPERATORS.define("attend(Tensor q, Tensor k, Tensor v, Tensor visible, float scale) -> Tensor")
    for name, function, shape in (
        ("product", _product, _product_shape),
        ("attend", _attend, _attend_shape),
    ):
        _OPERATORS.impl(name, function, "CPU")
        torch.library.register_fake(f"gemma_hub_torch::{name}", shape, lib=_OPERATORS)
