"""Dropout. Twin: gemma_hub_flax/dropout.py, which takes the random key as an argument."""

from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, rate: float) -> Tensor:
    """x with entries zeroed with probability `rate` and the others scaled up; x itself for 0."""
    return F.dropout(x, rate) if rate > 0 else x
