"""Matrix products on the CPU by kernels that `torch.nn.functional.linear` does not choose.

PyTorch gives every bfloat16 product to oneDNN, whose blocked kernels are for many rows, and every
float32 one to MKL. Generation multiplies few rows: one per text. Then a product takes as long as
reading its weight takes, and both read a row-major weight at half the memory's speed or less. Two
ways out that need no compiler (fast_native.py is the third):

- `one_row_linear`: PyTorch's own matrix-vector kernel, where there is just one row, or the one that
  torch.compile makes, in float32 too;
- `onednn_linear`: oneDNN for float32 too.

And where many rows of bfloat16 are slower than as many of float32, `widened_linear` is for them.

Sums are in float32 and rounded once, as in the plain product, in another order.
"""

from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_hub.cache import processor

# Processors with AMX are Intel's, where MKL multiplies one row of float32 at the speed of memory.
# On AMD's it takes twice as long.
_HAS_MKL_FOR_ONE_ROW = torch.cpu._is_amx_tile_supported()

# The kernels for one row were measured with these vectors only.
_HAS_WIDE_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX512")

# There PyTorch's own kernel for one row reads 9 GB/s, oneDNN 13 to 17; on AMD's it reads 33.
_IS_INTEL = "Intel(R)" in processor()

# There oneDNN multiplies many rows of bfloat16 at half the rate of float32.
_IS_INTEL_WITHOUT_AMX = _IS_INTEL and not torch.cpu._is_amx_tile_supported()

_MANY_ROWS = 128  # with 64, converting the weight takes as long as it saves
_WIDENED = 512  # rows of a weight that are in float32 at once


class _OneDNNOff:
    """oneDNN is switched off while any thread is inside, and then as it was.

    The switch belongs to the process. A thread that computes something else meanwhile may get
    PyTorch's other kernels, which are right too.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch._C._set_mkldnn_enabled(self._before)


_onednn_off = _OneDNNOff()


def is_one_row(x: Tensor, weight: Tensor) -> bool:
    """Whether `one_row_linear` is for x (..., in) times weight (out, in).

    Not where a gradient may be asked for, or a graph is recorded other than by torch.compile, and
    not for subclasses of tensors, which may know F.linear only.
    """
    compiles = torch.compiler.is_dynamo_compiling()
    return (
        (x.dtype == torch.bfloat16 or (compiles and x.dtype == torch.float32))
        and x.numel() == weight.shape[1]
        and x.device.type == "cpu"
        and _HAS_WIDE_VECTORS
        and (compiles or not _IS_INTEL)
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_grad_enabled()
        and (compiles or not torch.compiler.is_compiling())
    )


def one_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (1, ..., 1, in) times weight (out, in), plus bias."""
    if torch.compiler.is_compiling():
        y = _compiled_product(weight, x.reshape(-1))
    else:
        with _onednn_off:
            y = torch.mv(weight, x.reshape(-1))
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], -1)


def _compiled_product(weight: Tensor, x: Tensor) -> Tensor:
    """weight (out, in) times x (in,), as torch.compile fuses it: nothing of weight's size is kept.

    Its loop reads the weight as fast as the kernel does, and faster than the products of float32
    that PyTorch calls.
    """
    product = weight.to(torch.float32) * x.to(torch.float32)
    return product.sum(-1).to(x.dtype)


def is_widened(x: Tensor, weight: Tensor) -> bool:
    """Whether `widened_linear` is for x (..., in) times weight (out, in): without a gradient."""
    return (
        _IS_INTEL_WITHOUT_AMX
        and x.dtype == torch.bfloat16 == weight.dtype
        and x.numel() >= _MANY_ROWS * weight.shape[1]
        and x.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias, by float32 products of parts of the weight."""
    size_out, size_in = weight.shape
    rows, y = x.to(torch.float32), x.new_empty(*x.shape[:-1], size_out)
    buffer = torch.empty(
        min(_WIDENED, size_out), size_in
    )  # a new one each time takes as long again
    for start in range(0, size_out, _WIDENED):
        part = slice(start, start + _WIDENED)
        wide = buffer[: weight[part].shape[0]].copy_(weight[part])
        y[..., part] = F.linear(rows, wide, None if bias is None else bias[part].to(torch.float32))
    return y


def is_float32_inference(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn_linear` is for x (..., in) times weight (out, in): without a gradient."""
    return (
        x.dtype == torch.float32
        and (x.numel() > weight.shape[1] or not _HAS_MKL_FOR_ONE_ROW)
        and x.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_mkldnn_enabled()
        and torch.backends.mkldnn.is_available()
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias; no gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
