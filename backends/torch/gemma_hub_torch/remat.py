"""Gradient checkpointing of one layer. Twin: gemma_hub_flax/remat.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def remat(layer: nn.Module) -> Callable[..., Any]:
    """`layer`, whose activations the backward pass computes again instead of finding them kept."""
    return partial(checkpoint, layer, use_reentrant=False)
