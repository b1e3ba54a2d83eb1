"""TorchBackend: the backend contract over model.py. Twin: gemma_hub_flax/backend.py."""

import dataclasses
from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import ArrayWeights, Weights, parameter_shapes
from gemma_hub_torch.cache import empty_cache
from gemma_hub_torch.model import Caches, GemmaForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchBackend:
    """Gemma in PyTorch."""

    def devices(self) -> Sequence[str]:
        """The default first: the first GPU where there is one."""
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        return [*gpus, "cpu"]

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> "TorchModel":
        """A model whose parameters are the mapped tensors of `weights` where that can be.

        Raises:
            UnsupportedFeature: the config or the task needs something that is not here.
            InputError: a dtype, device or option that this backend does not have.
        """
        dtype, device = check_request(config, task, options, self.devices())
        with torch.device("meta"):
            module = GemmaForCausalLM(config)
        state = (
            (name, as_tensor(weights.read(name)).to(device, DTYPES[dtype]))
            for name in weights.names()
        )
        module.load_state_dict(dict(state), assign=True)
        return TorchModel(config, module.eval())


def check_request(
    config: GemmaConfig, task: TaskSpec, options: BuildOptions, devices: Sequence[str]
) -> tuple[str, str]:
    """(dtype, device) to build with, or a typed error."""
    if task.name != "causal_lm":
        raise UnsupportedFeature(f"task:{task.name}", "torch", "It has the task 'causal_lm'.")
    for feature in config.required_features:
        raise UnsupportedFeature(feature, "torch", "It runs first-generation Gemma.")
    if options.dtype not in DTYPES:
        raise InputError(f"dtype is {options.dtype!r}; the torch backend has {', '.join(DTYPES)}.")
    device = devices[0] if options.device == "auto" else options.device
    if device == "cuda":
        device = "cuda:0"
    if device not in devices:
        raise InputError(f"device is {device!r}; this machine has {', '.join(devices)}.")
    if options.extra:
        raise InputError(f"The torch backend has no options; got {', '.join(options.extra)}.")
    return options.dtype, device


class TorchModel:
    """One checkpoint in PyTorch.

    Attributes:
        native: the `GemmaForCausalLM` module, in eval mode.
        device: such as "cpu" or "cuda:0".
    """

    def __init__(self, config: GemmaConfig, module: GemmaForCausalLM) -> None:
        self.config = config
        self.native = module
        weight = module.model.embed_tokens.weight
        self.device, self.dtype = str(weight.device), weight.dtype

    @torch.no_grad()
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        """Logits of whole sequences, without a cache."""
        valid = self._to_device(inputs.attention_mask)
        outputs, _ = self._run(inputs, valid, None, 0)
        return outputs

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache of `max_length` slots in the compute dtype."""
        cache = Cache.empty(None, batch_size, max_length)
        arrays = empty_cache(
            self.config, batch_size, max_length, self.dtype, torch.device(self.device)
        )
        return dataclasses.replace(cache, arrays=arrays)

    @torch.no_grad()
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        """Outputs for the tokens after those in `cache`; overwrites its arrays."""
        valid = cache.admit(inputs)[:, : cache.length + inputs.shape[1]]
        outputs, arrays = self._run(inputs, self._to_device(valid), cache.arrays, cache.length)
        return outputs, cache.advanced(inputs, arrays)

    def export(self) -> Weights:
        """The parameters under their canonical names, as views where possible."""
        parameters = dict(named_parameters(self.native))
        return ArrayWeights(
            {name: as_array(parameters[name]) for name in parameter_shapes(self.config)}
        )

    def to_numpy(self, array: Tensor) -> np.ndarray:
        """A tensor of this model in NumPy; 16-bit floats become float32."""
        if array.dtype in (torch.bfloat16, torch.float16):
            array = array.to(torch.float32)
        return array.detach().cpu().numpy()

    def _run(
        self,
        inputs: ModelInputs,
        valid: Tensor,
        cache: Caches | None,
        start: int,
    ) -> tuple[ModelOutputs, Caches]:
        logits, hidden_states, cache = self.native(
            self._ids_or_embeddings(inputs),
            self._to_device(inputs.position_ids),
            valid,
            cache,
            start,
            inputs.logits_to_keep,
        )
        states = hidden_states if inputs.output_hidden_states else None
        return ModelOutputs(logits, states, self.to_numpy), cache

    def _ids_or_embeddings(self, inputs: ModelInputs) -> Tensor:
        if inputs.inputs_embeds is None:
            return self._to_device(inputs.input_ids).to(torch.int64)
        return self._to_device(inputs.inputs_embeds).to(self.dtype)

    def _to_device(self, array: np.ndarray | None) -> Tensor:
        return torch.tensor(array, device=self.device)


def named_parameters(module: torch.nn.Module) -> Iterable[tuple[str, Tensor]]:
    """(canonical name, detached tensor) of every parameter."""
    return ((name, p.detach()) for name, p in module.named_parameters())


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the array's own memory (NumPy has no bfloat16 that torch knows)."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> np.ndarray:
    """The inverse of `as_tensor`."""
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
