"""TorchBackend: the backend contract over model.py. Twin: gemma_hub_flax/backend.py."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.options import read_switches
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights, check_weights
from gemma_hub_torch import model
from gemma_hub_torch.cache import KeyValueCache, check_fits, gathered
from gemma_hub_torch.devices import device_names, find_device
from gemma_hub_torch.fast_compile import compiled_step, is_step, step_arguments
from gemma_hub_torch.fast_native import use_native
from gemma_hub_torch.fast_options import TorchOptions
from gemma_hub_torch.weights import build_module, check_dtype, export_weights, named_parameters

CLASSES: dict[str, Any] = {
    kind.task: kind
    for kind in (
        model.GemmaModel,
        model.GemmaForCausalLM,
        model.GemmaForSequenceClassification,
        model.GemmaForTokenClassification,
    )
}


class TorchBackend:
    """Gemma in PyTorch."""

    def devices(self) -> Sequence[str]:
        """The default first: the first GPU where there is one."""
        return device_names()

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> "TorchModel":
        """A model whose parameters are the mapped tensors of `weights` where that can be.

        Raises:
            UnsupportedFeature: the config or the task needs something that is not here.
            InputError: a dtype, device or option that this backend does not have.
            CheckpointError: parameters are missing or have the wrong shape.
        """
        check_request(config, task, options)
        chosen = read_switches(TorchOptions, "torch", options.extra)
        check_weights(config, task.name, weights)
        device = find_device(options.device)
        module = build_module(CLASSES[task.name], config, weights, options.dtype, device)
        if chosen.native:
            use_native(module)
        return TorchModel(module, compiles=chosen.compile)


def check_request(config: GemmaConfig, task: TaskSpec, options: BuildOptions) -> None:
    """Refuse, with a typed error, what this backend does not have."""
    if task.name not in CLASSES:
        raise UnsupportedFeature(f"task:{task.name}", "torch", f"It has {', '.join(CLASSES)}.")
    for feature in config.required_features:
        raise UnsupportedFeature(feature, "torch", "It runs first-generation Gemma.")
    check_dtype(options.dtype)


def check_has_loss(task: str, inputs: ModelInputs) -> None:
    """Refuse what has no gradients: a task without a loss, or inputs without labels."""
    if task == "base":
        raise UnsupportedFeature("gradients", "torch", "The model without a head has no loss.")
    if inputs.labels is None:
        raise InputError("There are no labels, so that there is no loss. Give labels.")


class TorchModel:
    """One checkpoint in PyTorch.

    Attributes:
        native: the module, an instance of one of the classes of model.py.
        device: such as "cpu" or "cuda:0".
    """

    def __init__(self, module: Any, *, compiles: bool = False) -> None:
        self.native = module
        self._step = compiled_step(module) if compiles else None
        weight = getattr(module, "model", module).embed_tokens.weight
        self.device, self.dtype = str(weight.device), weight.dtype

    @torch.no_grad()
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        """Outputs of whole sequences, without a cache and without dropout."""
        with _without_dropout(self.native):
            return self._outputs(self.native(**self._arguments(inputs), use_cache=False))

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache of `max_length` slots in the compute dtype."""
        cache = Cache.empty(None, batch_size, max_length)
        return dataclasses.replace(cache, arrays=self.native.init_cache(batch_size, max_length))

    @torch.no_grad()
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        """Outputs for the tokens after those in `cache`; overwrites its arrays. No dropout."""
        cache.admit(inputs)
        past = self._past(cache)
        with _without_dropout(self.native):
            if self._step is not None and is_step(inputs, past):
                out = self._step(**step_arguments(self._arguments(inputs), past))
            else:
                out = self.native(**self._arguments(inputs), past_key_values=past)
        return self._outputs(out), cache.advanced(inputs, out.past_key_values)

    @torch.no_grad()
    def gather_rows(
        self, caches: Sequence[Cache], rows: Sequence[tuple[int, int]], max_length: int
    ) -> Cache:
        """A new cache made of rows of others, which stay as they are."""
        cache, slots = Cache.gathered(caches, rows, max_length)
        places = torch.tensor(slots, device=self.device)
        check_fits(self.native.config, len(rows), places.shape[1], self.dtype, places.device)
        layers = [
            gathered(parts, places)
            for parts in zip(*(each.arrays.layers for each in caches), strict=True)
        ]
        arrays = dataclasses.replace(caches[0].arrays, layers=tuple(layers))
        return dataclasses.replace(cache, arrays=arrays)

    @torch.enable_grad()
    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, dict[str, Tensor]]:
        """The loss of `inputs.labels` without dropout, and its gradient by every parameter.

        Returns:
            The loss, and {canonical name: gradient in the parameter's shape and dtype}.

        Raises:
            InputError: there are no labels.
        """
        check_has_loss(self.native.task, inputs)
        parameters = dict(named_parameters(self.native))
        with _everything_trains(self.native):
            out = self.native(**self._arguments(inputs), use_cache=False)
            gradients = torch.autograd.grad(out.loss, list(parameters.values()))
        return float(out.loss.detach()), dict(zip(parameters, gradients, strict=True))

    def export(self) -> Weights:
        """The parameters under their canonical names, as views where possible."""
        return export_weights(self.native)

    def to_numpy(self, array: Tensor) -> np.ndarray:
        """A tensor of this model in NumPy; 16-bit floats become float32."""
        if array.dtype in (torch.bfloat16, torch.float16):
            array = array.to(torch.float32)
        return array.detach().cpu().numpy()

    def _past(self, cache: Cache) -> KeyValueCache:
        """The arrays under the book of `cache`, which may have been shortened since."""
        past: KeyValueCache = cache.arrays
        return dataclasses.replace(
            past,
            valid=torch.tensor(cache.valid, device=self.device),
            next_position=torch.tensor(cache.next_position, device=self.device),
            length=cache.length,
        )

    def _arguments(self, inputs: ModelInputs) -> dict[str, Any]:
        arrays = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.position_ids,
            "inputs_embeds": inputs.inputs_embeds,
            "labels": inputs.labels,
            "pooled_positions": inputs.pooled_positions,
        }
        arguments: dict[str, Any] = {
            name: torch.tensor(array, device=self.device)
            for name, array in arrays.items()
            if array is not None
        }
        for name in ("input_ids", "labels", "pooled_positions"):  # indices are int64 in torch
            if name in arguments and not arguments[name].is_floating_point():
                arguments[name] = arguments[name].to(torch.int64)
        if inputs.logits_to_keep:
            arguments["logits_to_keep"] = inputs.logits_to_keep
        if inputs.num_items_in_batch is not None:
            arguments["num_items_in_batch"] = inputs.num_items_in_batch
        arguments["output_hidden_states"] = inputs.output_hidden_states
        arguments["output_attentions"] = inputs.output_attentions
        return arguments

    def _outputs(self, out: Any) -> ModelOutputs:
        return ModelOutputs(
            logits=getattr(out, "logits", None),
            last_hidden_state=getattr(out, "last_hidden_state", None),
            loss=getattr(out, "loss", None),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            as_numpy=self.to_numpy,
        )


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Eval mode, whatever the user set; then every part is as it was."""
    parts = [module]  # `modules` takes five times as long
    for part in parts:
        parts.extend(child for child in part._modules.values() if child is not None)
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _everything_trains(module: nn.Module) -> Iterator[None]:
    """Gradients for every parameter, frozen ones too, without dropout; then all is as it was."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    try:
        module.requires_grad_(True)
        with _without_dropout(module):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
