"""TransformersBackend: the backend contract over Transformers' own classes.

It computes what Transformers computes, also where that differs from the contract: how, and why, is
in docs/reference/transformers-backend.md.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.config import ARCHITECTURES, GemmaConfig
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights, check_weights
from gemma_hub.problem import problem_type
from gemma_hub_transformers.devices import device_names, find_device
from gemma_hub_transformers.module import (
    DTYPES,
    build_module,
    decoder,
    export_weights,
    named_parameters,
)

NAME = "transformers"


class TransformersBackend:
    """Gemma as Hugging Face transformers has it."""

    def devices(self) -> Sequence[str]:
        """The default first: the first GPU where there is one."""
        return device_names()

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> "TransformersModel":
        """A model whose parameters are the mapped tensors of `weights` where that can be.

        Raises:
            UnsupportedFeature: Transformers' Gemma does not have something that is asked for.
            InputError: a dtype, device or option that this backend does not have.
            CheckpointError: parameters are missing or have the wrong shape.
        """
        check_request(config, task, options)
        check_weights(config, task.name, weights)
        device = find_device(options.device)
        module = build_module(config, task.name, weights, options.dtype, device)
        return TransformersModel(module, config, task.name)


def check_request(config: GemmaConfig, task: TaskSpec, options: BuildOptions) -> None:
    """Refuse, with a typed error, what Transformers' Gemma does not have."""
    if task.name not in ARCHITECTURES:
        raise UnsupportedFeature(f"task:{task.name}", NAME, f"It has {', '.join(ARCHITECTURES)}.")
    for feature in config.required_features:
        raise UnsupportedFeature(feature, NAME, "It runs first-generation Gemma.")
    # Transformers ignores these two without a word, so the model would be another one.
    if config.rms_norm_offset != 1.0:
        raise UnsupportedFeature("rms_norm_offset", NAME, "Transformers adds 1 to norm weights.")
    if config.query_pre_attn_scalar not in (None, config.head_dim):
        raise UnsupportedFeature(
            "query_pre_attn_scalar", NAME, "Transformers scales scores by head_dim ** -0.5."
        )
    if options.dtype not in DTYPES:
        raise InputError(f"dtype is {options.dtype!r}; the {NAME} backend has {', '.join(DTYPES)}.")
    if options.extra:
        raise InputError(f"The {NAME} backend has no options; got {', '.join(options.extra)}.")


class TransformersModel:
    """One checkpoint in Transformers.

    Attributes:
        native: the module, an instance of one of Transformers' Gemma classes.
        device: such as "cpu" or "cuda:0".
    """

    def __init__(self, module: Any, config: GemmaConfig, task: str) -> None:
        self.native = module
        self.config, self.task = config, task
        weight = decoder(module).embed_tokens.weight
        self.device, self.dtype = str(weight.device), weight.dtype

    @torch.no_grad()
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        """Outputs of whole sequences, without a cache."""
        return self._outputs(self._call(inputs, inputs.attention_mask, use_cache=False))

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache; Transformers' own grows with each call, up to `max_length` slots."""
        cache = Cache.empty(None, batch_size, max_length)
        return dataclasses.replace(cache, arrays=DynamicCache(config=self.native.config))

    @torch.no_grad()
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        """Outputs for the tokens after those in `cache`; overwrites its arrays."""
        filled = cache.length + inputs.shape[1]
        mask = cache.admit(inputs)[:, :filled]
        out = self._call(inputs, mask, past_key_values=cache.arrays, use_cache=True)
        return self._outputs(out), cache.advanced(inputs, cache.arrays)

    @torch.enable_grad()
    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, dict[str, Tensor]]:
        """The loss of `inputs.labels` without dropout, and its gradient by every parameter.

        Returns:
            The loss, and {canonical name: gradient in the parameter's shape and dtype}.

        Raises:
            UnsupportedFeature: the task has no loss.
            InputError: there are no labels.
        """
        if self.task == "base":
            raise UnsupportedFeature("gradients", NAME, "The model without a head has no loss.")
        if inputs.labels is None:
            raise InputError("There are no labels, so that there is no loss. Give labels.")
        parameters = dict(named_parameters(self.native, self.task))
        with _everything_trains(self.native):
            out = self._call(inputs, inputs.attention_mask, use_cache=False)
            gradients = torch.autograd.grad(out.loss, list(parameters.values()))
        return float(out.loss.detach()), dict(zip(parameters, gradients, strict=True))

    def export(self) -> Weights:
        """The parameters under their canonical names, as views where possible."""
        return export_weights(self.native, self.config, self.task)

    def to_numpy(self, array: Tensor) -> np.ndarray:
        """A tensor of this model in NumPy; 16-bit floats become float32."""
        if array.dtype in (torch.bfloat16, torch.float16):
            array = array.to(torch.float32)
        return array.detach().cpu().numpy()

    def _call(self, inputs: ModelInputs, mask: np.ndarray, **arguments: Any) -> Any:
        """Transformers' outputs; `mask` (B, S) is over the cache's slots and these tokens."""
        arguments["attention_mask"] = self._indices(mask)
        # Transformers would count padding too; it never does so where it is given positions.
        arguments["position_ids"] = self._indices(inputs.position_ids)
        if inputs.input_ids is not None:
            arguments["input_ids"] = self._indices(inputs.input_ids)
        else:
            arguments["inputs_embeds"] = self._embeddings(inputs.inputs_embeds)
        if self.task == "sequence_classification":
            self._check_pooling(len(mask))
        if inputs.labels is not None:
            arguments |= self._loss_arguments(inputs, inputs.labels)
        if inputs.logits_to_keep:
            arguments["logits_to_keep"] = inputs.logits_to_keep
        arguments["output_hidden_states"] = inputs.output_hidden_states
        arguments["output_attentions"] = inputs.output_attentions
        return self.native(**arguments)

    def _loss_arguments(self, inputs: ModelInputs, labels: np.ndarray) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if inputs.num_items_in_batch is not None:
            if self.task == "token_classification":
                raise UnsupportedFeature(
                    "num_items_in_batch", NAME, "Its token classifier always takes the mean."
                )
            arguments["num_items_in_batch"] = inputs.num_items_in_batch
        is_integer = labels.dtype.kind in "iu"
        if self.task == "sequence_classification":
            # Transformers keeps what the first call's labels meant; this sets it for each call.
            kind = problem_type(self.config, labels.shape, is_integer)
            self.native.config.problem_type = kind
        if is_integer:
            arguments["labels"] = self._indices(labels)
        else:
            arguments["labels"] = torch.tensor(labels, device=self.device, dtype=torch.float32)
        return arguments

    def _check_pooling(self, num_rows: int) -> None:
        if self.config.pad_token_id is None and num_rows > 1:
            raise UnsupportedFeature(
                "pooling by attention_mask",
                NAME,
                "Transformers finds the last token of each row by pad_token_id, which this config "
                "does not have. Give one row at a time.",
            )

    def _indices(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self.device, dtype=torch.int64)

    def _embeddings(self, array: Any) -> Tensor:
        """(B, T, D) as this version of Transformers takes them, from unscaled ones."""
        embeds = torch.tensor(array, device=self.device).to(self.dtype)
        if not hasattr(decoder(self.native).embed_tokens, "embed_scale"):
            return embeds  # before 5.4 the decoder scales them
        return embeds * torch.tensor(self.config.embedding_scale).to(embeds)

    def _outputs(self, out: Any) -> ModelOutputs:
        def single(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(torch.float32)

        return ModelOutputs(
            logits=single(getattr(out, "logits", None)),
            last_hidden_state=getattr(out, "last_hidden_state", None),
            loss=single(getattr(out, "loss", None)),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            as_numpy=self.to_numpy,
        )


@contextmanager
def _everything_trains(module: Any) -> Iterator[None]:
    """Gradients for every parameter, frozen ones too, in eval mode; then all is as it was."""
    modes = {part: part.training for part in module.modules()}
    frozen = [p for p in module.parameters() if not p.requires_grad]
    try:
        module.eval().requires_grad_(True)
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        for parameter in frozen:
            parameter.requires_grad_(False)
