"""Decoding steps through torch.compile: one program instead of a thousand small operations a token.

A step is a call with one row of one token that goes on from a cache. Its program holds for every
length and every capacity of the cache; the first step makes it, which takes half a minute or more.
With several rows the small operations are a smaller part of the time, so that those calls, like all
others, stay as they are.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gemma_hub.errors import InputError
from gemma_hub.inputs import ModelInputs
from gemma_hub_torch.cache import KeyValueCache

# Sizes 0 and 1 are constants to torch.compile, so that a program for them is for them alone.
_LEAST_LENGTH = 2


def compiled_step(module: nn.Module) -> Callable[..., Any]:
    """`module` as a function that is compiled at its first call.

    Raises:
        InputError: the module is not on the CPU, or nothing can be compiled here.
    """
    device = next(module.parameters()).device
    if device.type != "cpu":
        raise InputError(
            f"The option compile was given and the model is on {device}; it is for device='cpu' "
            "only. Leave it out."
        )
    _check_compiler()
    step = torch.compile(module, dynamic=True)

    def run(**arguments: Any) -> Any:
        # Sizes are dynamic and numbers such as epsilon are not: each would be a tensor of its own.
        with torch._dynamo.config.patch(specialize_float=True):
            return step(**arguments)

    return run


def is_step(inputs: ModelInputs, past: KeyValueCache) -> bool:
    """Whether a call is one that the compiled program is for."""
    return (
        inputs.shape == (1, 1)
        and past.length >= _LEAST_LENGTH
        and inputs.input_ids is not None
        and inputs.labels is None
        and inputs.pooled_positions is None
        and not inputs.output_hidden_states
        and not inputs.output_attentions
    )


def step_arguments(arguments: dict[str, Any], past: KeyValueCache) -> dict[str, Any]:
    """The arguments of a step's call, so that those of the next fit the same program."""
    arguments = {**arguments, "past_key_values": past}
    arguments.pop("logits_to_keep", None)  # there is one position
    # torch.compile takes sizes that are equal at the first call for one; marked ones it does not.
    for array in (past.valid, *(array for layer in past.layers for array in layer)):
        torch._dynamo.maybe_mark_dynamic(array, 1)
    return arguments


def _check_compiler() -> None:
    """Compile something small.

    Raises:
        InputError: that fails.
    """
    # What was compiled before does not show that there still is a compiler.
    options: dict[str, Any] = {"fx_graph_cache": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing the compiler warns of torch's own parts
            torch.compile(_one_more, options=options)(torch.zeros(64))
    except Exception as error:  # whatever a compiler does
        raise InputError(
            "The option compile was given and torch.compile does not work here: "
            f"{str(error).splitlines()[0]}. It needs a C++ compiler such as g++, or the one that "
            "the environment variable CXX names. Install one, or leave the option out."
        ) from error


def _one_more(x: torch.Tensor) -> torch.Tensor:
    return x + 1
