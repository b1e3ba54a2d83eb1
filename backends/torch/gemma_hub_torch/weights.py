"""Between the checkpoint's arrays and a module's parameters. Twin: gemma_hub_flax/weights.py."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.parameters import ArrayWeights, Weights, parameter_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(name: str) -> None:
    """Refuse a dtype that this backend does not have."""
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; the torch backend has {', '.join(DTYPES)}.")


def build_module(
    kind: Any, config: GemmaConfig, weights: Weights, dtype: str, device: str
) -> nn.Module:
    """A module of class `kind` over the mapped tensors of `weights` where that can be."""
    with torch.device("meta"):
        module: nn.Module = kind(config)
    state = {
        name: as_tensor(weights.read(canonical(kind.task, name))).to(device, DTYPES[dtype])
        for name in module.state_dict()
    }
    module.load_state_dict(state, assign=True)
    return module.eval()


def export_weights(module: Any) -> ArrayWeights:
    """The parameters under their canonical names, as views where possible."""
    parameters = dict(named_parameters(module))
    names = parameter_shapes(module.config, module.task)
    return ArrayWeights({name: as_array(parameters[name]) for name in names})


def named_parameters(module: Any) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, parameter) of every parameter."""
    return ((canonical(module.task, name), p) for name, p in module.named_parameters())


def canonical(task: str, name: str) -> str:
    """The name in the canonical tree: the model without a head is `model` there."""
    return f"model.{name}" if task == "base" else name


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the array's own memory (NumPy has no bfloat16 that torch knows)."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> np.ndarray:
    """The inverse of `as_tensor`."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
