"""Gradient checkpointing of one layer. Twin: gemma_hub_torch/remat.py."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def remat(layer: nnx.Module) -> Callable[..., Any]:
    """`layer`, whose activations the backward pass computes again instead of finding them kept."""
    rerun = nnx.remat(lambda module, *arguments: module(*arguments))
    return lambda *arguments: rerun(layer, *arguments)
