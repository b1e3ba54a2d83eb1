"""FlaxBackend: the backend contract over model.py. Twin: gemma_hub_torch/backend.py."""

import dataclasses
from collections.abc import Iterable, Sequence
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
from gemma_hub.parameters import ArrayWeights, Weights, parameter_shapes
from gemma_hub_flax.cache import empty_cache
from gemma_hub_flax.model import Caches, FlaxGemmaForCausalLM

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class FlaxBackend:
    """Gemma in Flax NNX."""

    def devices(self) -> Sequence[str]:
        """The default first: JAX's own default platform."""
        platforms = [jax.default_backend(), *(["cpu"] if jax.default_backend() != "cpu" else [])]
        return [
            f"{d.platform}:{d.id}" for name in platforms for d in jax.local_devices(backend=name)
        ]

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> "FlaxModel":
        """A model whose parameters are those of `weights`, put on the device one by one.

        Raises:
            UnsupportedFeature: the config or the task needs something that is not here.
            InputError: a dtype, device or option that this backend does not have.
        """
        dtype, device = check_request(config, task, options, self.devices())
        abstract = nnx.eval_shape(lambda: FlaxGemmaForCausalLM(config, nnx.Rngs(0)))
        graphdef, state = nnx.split(abstract)
        leaves = [
            as_jax(weights.read(name), DTYPES[dtype], find_device(device))
            for name, _ in named_parameters(abstract)
        ]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return FlaxModel(config, nnx.merge(graphdef, state))


def check_request(
    config: GemmaConfig, task: TaskSpec, options: BuildOptions, devices: Sequence[str]
) -> tuple[str, str]:
    """(dtype, device) to build with, or a typed error."""
    if task.name != "causal_lm":
        raise UnsupportedFeature(f"task:{task.name}", "flax", "It has the task 'causal_lm'.")
    for feature in config.required_features:
        raise UnsupportedFeature(feature, "flax", "It runs first-generation Gemma.")
    if options.dtype not in DTYPES:
        raise InputError(f"dtype is {options.dtype!r}; the flax backend has {', '.join(DTYPES)}.")
    device = devices[0] if options.device == "auto" else options.device
    if ":" not in device:
        device = f"{device}:0"
    if device not in devices:
        raise InputError(f"device is {device!r}; this machine has {', '.join(devices)}.")
    if options.extra:
        raise InputError(f"The flax backend has no options; got {', '.join(options.extra)}.")
    return options.dtype, device


class FlaxModel:
    """One checkpoint in JAX.

    Attributes:
        native: the `FlaxGemmaForCausalLM` module.
        device: such as "cpu:0" or "gpu:0".
    """

    def __init__(self, config: GemmaConfig, module: FlaxGemmaForCausalLM) -> None:
        self.config = config
        self.native = module
        weight = module.model.embed_tokens.weight[...]
        device = next(iter(weight.devices()))
        self.device, self.dtype = f"{device.platform}:{device.id}", weight.dtype

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        """Logits of whole sequences, without a cache."""
        valid = self._to_device(inputs.attention_mask)
        outputs, _ = self._run(inputs, valid, None, 0)
        return outputs

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache of `max_length` slots in the compute dtype."""
        cache = Cache.empty(None, batch_size, max_length)
        arrays = empty_cache(
            self.config, batch_size, max_length, self.dtype, find_device(self.device)
        )
        return dataclasses.replace(cache, arrays=arrays)

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        """Outputs for the tokens after those in `cache`; consumes its arrays."""
        valid = cache.admit(inputs)
        outputs, arrays = self._run(inputs, self._to_device(valid), cache.arrays, cache.length)
        return outputs, cache.advanced(inputs, arrays)

    def export(self) -> Weights:
        """The parameters under their canonical names, as views where possible."""
        parameters = dict(named_parameters(self.native))
        return ArrayWeights(
            {name: np.asarray(parameters[name]) for name in parameter_shapes(self.config)}
        )

    def to_numpy(self, array: Array) -> np.ndarray:
        """An array of this model in NumPy; 16-bit floats become float32."""
        if array.dtype in (jnp.bfloat16, jnp.float16):
            array = array.astype(jnp.float32)
        return np.asarray(array)

    def _run(
        self,
        inputs: ModelInputs,
        valid: Array,
        cache: Caches | None,
        start: int,
    ) -> tuple[ModelOutputs, Caches]:
        graphdef, state = nnx.split(self.native)
        logits, hidden_states, cache = run(
            graphdef,
            state,
            self._ids_or_embeddings(inputs),
            self._to_device(inputs.position_ids),
            valid,
            cache,
            start,
            inputs.logits_to_keep,
            inputs.output_hidden_states,
        )
        return ModelOutputs(logits, hidden_states, self.to_numpy), cache

    def _ids_or_embeddings(self, inputs: ModelInputs) -> Array:
        if inputs.inputs_embeds is None:
            return self._to_device(inputs.input_ids)
        return self._to_device(inputs.inputs_embeds).astype(self.dtype)

    def _to_device(self, array: np.ndarray | None) -> Array:
        return jax.device_put(array, find_device(self.device))


@partial(
    jax.jit,
    static_argnames=("graphdef", "logits_to_keep", "output_hidden_states"),
    donate_argnames="cache",
)
def run(
    graphdef: Any,
    state: Any,
    inputs: Array,
    position_ids: Array,
    valid: Array,
    cache: Caches | None,
    start: Array | int,
    logits_to_keep: int,
    output_hidden_states: bool,
) -> tuple[Array, tuple[Array, ...] | None, Caches]:
    """The module's call, compiled; the cache's memory is reused."""
    module = nnx.merge(graphdef, state)
    logits, hidden_states, cache = module(inputs, position_ids, valid, cache, start, logits_to_keep)
    return logits, hidden_states if output_hidden_states else None, cache


def named_parameters(module: nnx.Module) -> Iterable[tuple[str, Array]]:
    """(canonical name, array) of every parameter, in the order of the module's state."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return ((".".join(map(str, path)), p.get_value()) for path, p in flat)


def find_device(name: str) -> jax.Device:
    """The JAX device that `devices()` calls `name`."""
    platform, _, index = name.partition(":")
    return next(d for d in jax.local_devices(backend=platform) if d.id == int(index))


def as_jax(array: np.ndarray, dtype: Any, device: jax.Device) -> Array:
    """`array` on the device in `dtype`, with no second copy of it left behind."""
    return jax.device_put(np.asarray(array, dtype), device)
