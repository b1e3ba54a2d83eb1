"""Between gemma_hub's config and weights and a module of Transformers."""

import copy
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from torch import Tensor

from gemma_hub.config import ARCHITECTURES, GemmaConfig
from gemma_hub.errors import PluginError
from gemma_hub.parameters import ArrayWeights, Weights, parameter_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_module(config: GemmaConfig, task: str, weights: Weights, dtype: str, device: str) -> Any:
    """The module of Transformers for `task`, over the mapped tensors of `weights` where it can be.

    Nothing is drawn at random and no parameter is held twice: the module is made without memory
    and then given its parameters.

    Raises:
        PluginError: this version of Transformers has values that are in no checkpoint and that
            this plug-in does not know how to make.
    """
    theirs = transformers_config(config, task, dtype)
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            module: Any = getattr(transformers, ARCHITECTURES[task])(theirs)
        buffers = dict(_without_layers(theirs).named_buffers())
    state = {
        _native(task, name): as_tensor(weights.read(name)).to(device, DTYPES[dtype])
        for name in parameter_shapes(config, task)
    }
    is_tied = task == "causal_lm" and config.tie_word_embeddings
    if is_tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    module.load_state_dict(state, assign=True)
    if is_tied:
        module.lm_head.weight = module.model.embed_tokens.weight
    for name, value in buffers.items():
        owner, _, own_name = name.rpartition(".")
        decoder(module).get_submodule(owner).register_buffer(
            own_name, value.to(device), persistent=False
        )
    _check_is_whole(module)
    return module.eval()


def transformers_config(config: GemmaConfig, task: str, dtype: str) -> Any:
    """The same config as Transformers' own; its attention returns the probabilities."""
    # A copy of everything: Transformers writes into the dictionaries that it is given.
    values = copy.deepcopy(config.to_dict(task)) | {"torch_dtype": dtype}
    return transformers.GemmaConfig.from_dict(values, attn_implementation="eager")


def decoder(module: Any) -> Any:
    """The GemmaModel of a module."""
    return getattr(module, "model", module)


def export_weights(module: Any, config: GemmaConfig, task: str) -> ArrayWeights:
    """The parameters under their canonical names, as views where possible."""
    parameters = dict(named_parameters(module, task))
    return ArrayWeights(
        {name: as_array(parameters[name]) for name in parameter_shapes(config, task)}
    )


def named_parameters(module: Any, task: str) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, parameter) of every parameter; a tied head comes once."""
    prefix = "model." if task == "base" else ""
    return ((prefix + name, p) for name, p in module.named_parameters())


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


def _native(task: str, name: str) -> str:
    """The name in Transformers: there the model without a head has no prefix."""
    return name.removeprefix("model.") if task == "base" else name


def _without_layers(config: Any) -> Any:
    """A decoder with the same buffers, and next to nothing else.

    Rotary frequencies and the embedding's scale are in no checkpoint; Transformers computes them
    when it makes a decoder, from neither the layers nor the vocabulary.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = 0, 1, None
    return transformers.GemmaModel(small)


def _check_is_whole(module: Any) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise PluginError(
            f"transformers {transformers.__version__} has values that no checkpoint has and that "
            f"gemma-hub-transformers does not make: {', '.join(empty)}. Install an older "
            "transformers, or a newer gemma-hub-transformers."
        )
