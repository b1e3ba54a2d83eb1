"""Products of few rows by gemma_hub/native/products.h, at the speed at which memory is read.

On the CPU, in float32 and bfloat16, without a gradient. A row's result is the same bit by bit
whatever rows are beside it. Twin: gemma_hub_flax/fast_native.py.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma_hub.native.library import load_library

MOST_ROWS = 16
"""Up to so many, the product takes no longer than those of PyTorch."""

_SOURCE = Path(__file__).with_name("fast_products.cpp")
_FUNCTIONS: dict[torch.dtype, "ctypes._NamedFuncPointer"] = {}


def load_native() -> None:
    """Compile and load the functions, unless they are there.

    Raises:
        InputError: that fails.
    """
    library = load_library(_SOURCE, ("-fopenmp",))
    for dtype in (torch.float32, torch.bfloat16):
        function = library[f"product_{str(dtype).removeprefix('torch.')}"]
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_int]
        function.restype = None
        _FUNCTIONS[dtype] = function


def is_for_native(x: Tensor, weight: Tensor) -> bool:
    """Whether `native_linear` is for x (..., in) times weight (out, in)."""
    return (
        x.numel() <= MOST_ROWS * weight.shape[1]
        and x.dtype == weight.dtype
        and x.dtype in _FUNCTIONS
        and x.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and (torch.compiler.is_dynamo_compiling() or not torch.compiler.is_compiling())
    )


def native_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times weight (out, in); no gradient."""
    product = torch.ops.gemma_hub.product if torch.compiler.is_compiling() else _product
    y: Tensor = product(x.reshape(-1, weight.shape[1]).contiguous(), weight)
    return y.reshape(*x.shape[:-1], -1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) times weight (out, in)."""
    (rows, size_in), size_out = x.shape, weight.shape[0]
    y = torch.empty(rows, size_out, dtype=x.dtype)
    pointers = weight.data_ptr(), x.data_ptr(), y.data_ptr()
    _FUNCTIONS[x.dtype](*pointers, rows, size_in, size_out, torch.get_num_threads())
    return y


def _shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# A graph of torch.compile can call what PyTorch knows by name.
_OPERATIONS = torch.library.Library("gemma_hub", "DEF")
_OPERATIONS.define("product(Tensor x, Tensor weight) -> Tensor")
_OPERATIONS.impl("product", _product, "CPU")
torch.library.register_fake("gemma_hub::product", _shape, lib=_OPERATIONS)
