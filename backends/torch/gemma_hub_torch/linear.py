"""Matrices by which rows are multiplied: stored as [out, in], as in the checkpoint.

Twin: gemma_hub_flax/linear.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_hub_torch.fast_linear import (
    is_float32_inference,
    is_one_row,
    is_widened,
    one_row_linear,
    onednn_linear,
    widened_linear,
)
from gemma_hub_torch.fast_native import is_for_native, native_linear


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, native: bool = False
) -> Tensor:
    """x (..., in) times weight (out, in), plus bias; float32 accumulation, result in x's dtype."""
    if native and bias is None and is_for_native(x, weight):
        return native_linear(x, weight)
    if is_one_row(x, weight):
        return one_row_linear(x, weight, bias)
    if is_float32_inference(x, weight):
        return onednn_linear(x, weight, bias)
    if is_widened(x, weight):
        return widened_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def draw(weight: Tensor, std: float) -> None:
    """Fill `weight` from normal(0, std), unless it is on the meta device and has no numbers."""
    if not weight.is_meta:  # PyTorch would import its compiler there, which takes a second
        nn.init.normal_(weight, std=std)


class Linear(nn.Linear):
    """`linear` with parameters of its own, drawn from normal(0, std).

    Attributes:
        native: multiply few rows as fast_native.py does.
    """

    native = False

    def __init__(self, size_in: int, size_out: int, *, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(size_in, size_out, bias=bias)

    def reset_parameters(self) -> None:
        draw(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, native=self.native)


class Embedding(nn.Module):
    """One row of `weight` (V, D) per id, drawn from normal(0, std).

    Looking up `padding_id` gives that row no gradient, as in Transformers.

    Attributes:
        native: as in `Linear`.
    """

    native = False

    def __init__(
        self, num_rows: int, size: int, *, std: float, padding_id: int | None = None
    ) -> None:
        super().__init__()
        self.padding_id = padding_id
        self.weight = nn.Parameter(torch.empty(num_rows, size))
        draw(self.weight, std)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, self.padding_id)

    def scores(self, x: Tensor) -> Tensor:
        """x (..., D) times each row: what the tied head gives, (..., V)."""
        return linear(x, self.weight, native=self.native)
