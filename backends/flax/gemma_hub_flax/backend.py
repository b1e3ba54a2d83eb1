"""FlaxBackend: the backend contract over model.py. Twin: gemma_hub_torch/backend.py."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.options import read_switches
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights, check_weights
from gemma_hub_flax import fast_greedy, model
from gemma_hub_flax.cache import KeyValueCache, LayerCache, check_fits, gathered
from gemma_hub_flax.compile_programs import Programs
from gemma_hub_flax.devices import device_names, device_of, find_device, name_of
from gemma_hub_flax.fast_native import use_native
from gemma_hub_flax.fast_options import FlaxOptions
from gemma_hub_flax.fast_shapes import (
    LastTokens,
    num_slots,
    padded_inputs,
    padded_length,
    unpadded,
    whole_length,
    widened_slots,
    widened_valid,
)
from gemma_hub_flax.fast_state import ModuleState, Structure
from gemma_hub_flax.weights import build_module, check_dtype, export_weights, named_leaves

CLASSES: dict[str, Any] = {
    kind.task: kind
    for kind in (
        model.FlaxGemmaModel,
        model.FlaxGemmaForCausalLM,
        model.FlaxGemmaForSequenceClassification,
        model.FlaxGemmaForTokenClassification,
    )
}


class FlaxBackend:
    """Gemma in Flax NNX."""

    def devices(self) -> Sequence[str]:
        """The default first: JAX's own default platform."""
        return device_names()

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> "FlaxModel":
        """A model whose parameters are those of `weights`, put on the device one by one.

        Raises:
            UnsupportedFeature: the config or the task needs something that is not here.
            InputError: a dtype, device or option that this backend does not have.
            CheckpointError: parameters are missing or have the wrong shape.
        """
        check_request(config, task, options)
        chosen = read_switches(FlaxOptions, "flax", options.extra)
        check_weights(config, task.name, weights)
        device = find_device(options.device)
        module = build_module(CLASSES[task.name], config, weights, options.dtype, device)
        if chosen.native:
            use_native(module)
        return FlaxModel(module)


def check_request(config: GemmaConfig, task: TaskSpec, options: BuildOptions) -> None:
    """Refuse, with a typed error, what this backend does not have."""
    if task.name not in CLASSES:
        raise UnsupportedFeature(f"task:{task.name}", "flax", f"It has {', '.join(CLASSES)}.")
    for feature in config.required_features:
        raise UnsupportedFeature(feature, "flax", "It runs first-generation Gemma.")
    check_dtype(options.dtype)


def check_has_loss(task: str, inputs: ModelInputs) -> None:
    """Refuse what has no gradients: a task without a loss, or inputs without labels."""
    if task == "base":
        raise UnsupportedFeature("gradients", "flax", "The model without a head has no loss.")
    if inputs.labels is None:
        raise InputError("There are no labels, so that there is no loss. Give labels.")


class FlaxModel:
    """One checkpoint in JAX.

    Attributes:
        native: the module, an instance of one of the classes of model.py.
        device: such as "cpu:0" or "gpu:0".
    """

    def __init__(self, module: Any) -> None:
        self.native = module
        weight = getattr(module, "model", module).embed_tokens.weight[...]
        self.device, self.dtype = name_of(device_of(weight)), weight.dtype
        self._state = ModuleState(module)

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        """Outputs of whole sequences, without a cache."""
        return self._outputs(self._run(inputs, None))

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache of `max_length` slots in the compute dtype; its arrays may have more."""
        cache = Cache.empty(None, batch_size, max_length)
        arrays = self.native.init_cache(batch_size, padded_length(max_length))
        return dataclasses.replace(cache, arrays=arrays)

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        """Outputs for the tokens after those in `cache`; consumes its arrays."""
        cache.admit(inputs)
        out = self._run(inputs, cache)
        arrays = dataclasses.replace(cache.arrays, layers=out.past_key_values)
        return self._outputs(out), cache.advanced(inputs, arrays)

    def gather_rows(
        self, caches: Sequence[Cache], rows: Sequence[tuple[int, int]], max_length: int
    ) -> Cache:
        """A new cache made of rows of others, which stay as they are."""
        cache, slots = Cache.gathered(caches, rows, max_length)
        places = jax.device_put(widened_slots(slots, caches), find_device(self.device))
        check_fits(self.native.config, len(rows), places.shape[1], self.dtype, device_of(places))
        layers = [
            gathered(parts, places)
            for parts in zip(*(each.arrays.layers for each in caches), strict=True)
        ]
        arrays = dataclasses.replace(caches[0].arrays, layers=tuple(layers))
        return dataclasses.replace(cache, arrays=arrays)

    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> tuple[np.ndarray, Cache]:
        """Up to `MOST_STEPS` greedy steps in one call; consumes the cache's arrays.

        See `gemma_hub.backend.SupportsGreedySteps`.
        """
        return fast_greedy.taken(*self._state(), cache, token_ids, running, num_steps, stops)

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, dict[str, Array]]:
        """The loss of `inputs.labels` without dropout, and its gradient by every parameter.

        Returns:
            The loss, and {canonical name: gradient in the parameter's shape and dtype}.

        Raises:
            InputError: there are no labels.
        """
        check_has_loss(self.native.task, inputs)
        structure, leaves = self._state()
        padded = padded_inputs(inputs, whole_length(inputs))
        arrays, options = _arguments(padded)
        loss, gradients = _LOSS_AND_GRADIENTS((structure, options), leaves, arrays)
        gradients = structure.state(gradients)
        return float(loss), dict(named_leaves(self.native.task, gradients))

    def export(self) -> Weights:
        """The parameters under their canonical names, as views where possible."""
        return export_weights(self.native)

    def to_numpy(self, array: Array) -> np.ndarray:
        """An array of this model in NumPy; 16-bit floats become float32."""
        known = np.asarray(array)
        return known.astype(np.float32) if array.dtype in (jnp.bfloat16, jnp.float16) else known

    def _run(self, inputs: ModelInputs, cache: Cache | None) -> Any:
        num_tokens, length, layers, book = inputs.shape[1], whole_length(inputs), None, None
        if cache is not None:
            layers = cache.arrays.layers
            length = padded_length(num_tokens, num_slots(cache) - cache.length)
            book = {
                "valid": widened_valid(cache.valid, num_slots(cache)),
                "next_position": cache.next_position.astype(np.int32),
                "length": np.int32(cache.length),
            }
        padded = padded_inputs(inputs, length)
        structure, leaves = self._state()
        arrays, options = _arguments(padded)
        if inputs.logits_to_keep:
            arrays["num_tokens"] = np.int32(num_tokens)
            options += (("logits_to_keep", min(inputs.logits_to_keep, num_tokens)),)
        out = _RUN((structure, options), leaves, layers, book, arrays)
        return unpadded(out, num_tokens, num_tokens if cache is None else cache.capacity)

    def _outputs(self, out: Any) -> ModelOutputs:
        return ModelOutputs(
            logits=getattr(out, "logits", None),
            last_hidden_state=getattr(out, "last_hidden_state", None),
            loss=getattr(out, "loss", None),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            as_numpy=self.to_numpy,
        )


Static = tuple[Structure, tuple[tuple[str, Any], ...]]
"""What a program is compiled for: the module without its arrays, and the call's choices."""


def _arguments(inputs: ModelInputs) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """The arrays of a call, and its choices."""
    arrays: dict[str, Any] = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "position_ids": inputs.position_ids,
        "inputs_embeds": inputs.inputs_embeds,
        "labels": inputs.labels,
        "pooled_positions": inputs.pooled_positions,
    }
    if inputs.num_items_in_batch is not None:
        # An array, so that a loss is not compiled again for every number of tokens.
        arrays["num_items_in_batch"] = np.int32(inputs.num_items_in_batch)
    options = {
        "output_hidden_states": inputs.output_hidden_states,
        "output_attentions": inputs.output_attentions,
    }
    present = {name: array for name, array in arrays.items() if array is not None}
    return present, tuple(options.items())


def run(
    static: Static,
    leaves: list[Array],
    layers: tuple[LayerCache, ...] | None,
    book: dict[str, Any] | None,
    arrays: dict[str, Array],
) -> Any:
    """The module's call. Of the cache it returns the layers; the rest is the book of the core."""
    structure, options = static
    module = structure.module(leaves)
    past = None if layers is None or book is None else KeyValueCache(layers, **book)
    kept = dict(options).get("logits_to_keep")
    if kept is not None:
        module.model = LastTokens(module.model, arrays.pop("num_tokens"), kept)
    out = module(**arrays, **dict(options), past_key_values=past, use_cache=past is not None)
    return out._replace(past_key_values=None if past is None else out.past_key_values.layers)


def loss_and_gradients(
    static: Static, leaves: list[Array], arrays: dict[str, Array]
) -> tuple[Array, list[Array]]:
    """The module's loss and its gradient by each array."""
    structure, options = static

    def loss(leaves: list[Array]) -> Array:
        return structure.module(leaves)(**arrays, **dict(options), use_cache=False).loss

    return jax.value_and_grad(loss)(leaves)


_RUN = Programs(run, donated=(2,))
_LOSS_AND_GRADIENTS = Programs(loss_and_gradients)
