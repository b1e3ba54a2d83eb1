"""Between the checkpoint's arrays and a module's parameters. Twin: gemma_hub_torch/weights.py."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.parameters import ArrayWeights, Weights, parameter_shapes

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def check_dtype(name: str) -> None:
    """Refuse a dtype that this backend does not have."""
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; the flax backend has {', '.join(DTYPES)}.")


def build_module(
    kind: Any, config: GemmaConfig, weights: Weights, dtype: str, device: jax.Device
) -> nnx.Module:
    """A module of class `kind` with the tensors of `weights`, put on the device one by one."""
    abstract = nnx.eval_shape(lambda: kind(config))
    graphdef, state = nnx.split(abstract)
    leaves = [
        as_jax(weights.read(name), DTYPES[dtype], device) for name, _ in named_parameters(abstract)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


def export_weights(module: Any) -> ArrayWeights:
    """The parameters under their canonical names, as views where possible."""
    parameters = dict(named_parameters(module))
    names = parameter_shapes(module.config, module.task)
    return ArrayWeights({name: as_array(parameters[name]) for name in names})


def named_parameters(module: Any) -> Iterator[tuple[str, Array]]:
    """(canonical name, array) of every parameter, in the order of the module's state."""
    return named_leaves(module.task, nnx.state(module, nnx.Param))


def named_leaves(task: str, state: nnx.State) -> Iterator[tuple[str, Array]]:
    """(canonical name, array) of every entry of a parameter state or of its gradient."""
    flat = nnx.to_flat_state(state)
    return ((canonical(task, ".".join(map(str, path))), p.get_value()) for path, p in flat)


def canonical(task: str, name: str) -> str:
    """The name in the canonical tree: the model without a head is `model` there."""
    return f"model.{name}" if task == "base" else name


def as_jax(array: np.ndarray, dtype: Any, device: jax.Device) -> Array:
    """`array` on the device in `dtype`, with no second copy of it left behind."""
    return jax.device_put(np.asarray(array, dtype), device)


def as_array(array: Array) -> np.ndarray:
    """An array in NumPy, in its own dtype."""
    return np.asarray(array)
