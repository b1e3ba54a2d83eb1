"""FlaxBackend: the backend contract over model.py. Twin: gemma_hub_torch/backend.py."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights, check_weights
from gemma_hub_flax import model
from gemma_hub_flax.cache import KeyValueCache, gathered
from gemma_hub_flax.devices import device_names, device_of, find_device, name_of
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
        check_weights(config, task.name, weights)
        device = find_device(options.device)
        return FlaxModel(build_module(CLASSES[task.name], config, weights, options.dtype, device))


def check_request(config: GemmaConfig, task: TaskSpec, options: BuildOptions) -> None:
    """Refuse, with a typed error, what this backend does not have."""
    if task.name not in CLASSES:
        raise UnsupportedFeature(f"task:{task.name}", "flax", f"It has {', '.join(CLASSES)}.")
    for feature in config.required_features:
        raise UnsupportedFeature(feature, "flax", "It runs first-generation Gemma.")
    check_dtype(options.dtype)
    if options.extra:
        raise InputError(f"The flax backend has no options; got {', '.join(options.extra)}.")


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

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        """Outputs of whole sequences, without a cache."""
        return self._outputs(self._run(inputs, None))

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache of `max_length` slots in the compute dtype."""
        cache = Cache.empty(None, batch_size, max_length)
        return dataclasses.replace(cache, arrays=self.native.init_cache(batch_size, max_length))

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        """Outputs for the tokens after those in `cache`; consumes its arrays."""
        cache.admit(inputs)
        past = self._past(cache)
        out = self._run(inputs, past)
        return self._outputs(out), cache.advanced(inputs, out.past_key_values)

    def gather_rows(
        self, caches: Sequence[Cache], rows: Sequence[tuple[int, int]], max_length: int
    ) -> Cache:
        """A new cache made of rows of others, which stay as they are."""
        cache, slots = Cache.gathered(caches, rows, max_length)
        places = jax.device_put(slots, find_device(self.device))
        layers = [
            gathered(parts, places)
            for parts in zip(*(each.arrays.layers for each in caches), strict=True)
        ]
        arrays = dataclasses.replace(caches[0].arrays, layers=tuple(layers))
        return dataclasses.replace(cache, arrays=arrays)

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, dict[str, Array]]:
        """The loss of `inputs.labels` without dropout, and its gradient by every parameter.

        Returns:
            The loss, and {canonical name: gradient in the parameter's shape and dtype}.

        Raises:
            InputError: there are no labels.
        """
        check_has_loss(self.native.task, inputs)
        graphdef, state = nnx.split(self.native)
        arrays, options = self._arguments(inputs)
        loss, gradients = loss_and_gradients(graphdef, state, arrays, options)
        return float(loss), dict(named_leaves(self.native.task, gradients))

    def export(self) -> Weights:
        """The parameters under their canonical names, as views where possible."""
        return export_weights(self.native)

    def to_numpy(self, array: Array) -> np.ndarray:
        """An array of this model in NumPy; 16-bit floats become float32."""
        if array.dtype in (jnp.bfloat16, jnp.float16):
            array = array.astype(jnp.float32)
        return np.asarray(array)

    def _past(self, cache: Cache) -> KeyValueCache:
        """The arrays under the book of `cache`, which may have been shortened since."""
        past: KeyValueCache = cache.arrays
        # Copies, because `run` may write into the memory of what it is given.
        device = find_device(self.device)
        return dataclasses.replace(
            past,
            valid=jax.device_put(cache.valid.copy(), device),
            next_position=jax.device_put(cache.next_position.astype(np.int32), device),
            length=cache.length,
        )

    def _run(self, inputs: ModelInputs, past: KeyValueCache | None) -> Any:
        graphdef, state = nnx.split(self.native)
        arrays, options = self._arguments(inputs)
        return run(graphdef, state, past, arrays, options)

    def _arguments(self, inputs: ModelInputs) -> tuple[dict[str, Array], tuple[Any, ...]]:
        arrays = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.position_ids,
            "inputs_embeds": inputs.inputs_embeds,
            "labels": inputs.labels,
            "pooled_positions": inputs.pooled_positions,
            # An array, so that a loss is not compiled again for every number of tokens.
            "num_items_in_batch": inputs.num_items_in_batch,
        }
        device = find_device(self.device)
        arguments = {
            name: jax.device_put(array, device)
            for name, array in arrays.items()
            if array is not None
        }
        options: dict[str, Any] = {
            "output_hidden_states": inputs.output_hidden_states,
            "output_attentions": inputs.output_attentions,
        }
        if inputs.logits_to_keep:
            options["logits_to_keep"] = inputs.logits_to_keep
        return arguments, tuple(options.items())

    def _outputs(self, out: Any) -> ModelOutputs:
        return ModelOutputs(
            logits=getattr(out, "logits", None),
            last_hidden_state=getattr(out, "last_hidden_state", None),
            loss=getattr(out, "loss", None),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            as_numpy=self.to_numpy,
        )


@partial(jax.jit, static_argnames=("graphdef", "options"), donate_argnames="past")
def run(
    graphdef: Any,
    state: Any,
    past: KeyValueCache | None,
    arrays: dict[str, Array],
    options: tuple[tuple[str, Any], ...],
) -> Any:
    """The module's call, compiled; the cache's memory is reused."""
    module = nnx.merge(graphdef, state)
    return module(**arrays, **dict(options), past_key_values=past, use_cache=past is not None)


@partial(jax.jit, static_argnames=("graphdef", "options"))
def loss_and_gradients(
    graphdef: Any, state: Any, arrays: dict[str, Array], options: tuple[tuple[str, Any], ...]
) -> tuple[Array, Any]:
    """The module's loss and its gradient by the state, compiled."""

    def loss(state: Any) -> Array:
        module = nnx.merge(graphdef, state)
        return module(**arrays, **dict(options), use_cache=False).loss

    return jax.value_and_grad(loss)(state)
