"""The contract of gemma-hub around `model`: what is built, what is refused, what is returned."""

from collections.abc import Sequence

import numpy as np

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights
from gemma_hub_frozen_api_1 import model

NAME = "frozen_api_1"
DEVICE = "cpu"


class FrozenApi1Backend:
    """Builds causal language models in float32."""

    def devices(self) -> Sequence[str]:
        return (DEVICE,)

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> "FrozenApi1Model":
        """A model that holds `weights`.

        Raises:
            UnsupportedFeature: another task, or a config that needs a feature this lacks.
            InputError: a device, a compute type or an option that there is not.
            CheckpointError: a parameter is missing or has the wrong shape.
        """
        if task.name != "causal_lm":
            raise UnsupportedFeature(f"task:{task.name}", NAME)
        for feature in config.required_features:
            raise UnsupportedFeature(feature, NAME)
        if options.device not in ("auto", DEVICE):
            raise InputError(f"device is {options.device!r}; {NAME} has only {DEVICE!r}.")
        if options.dtype != "float32":
            raise InputError(f"dtype is {options.dtype!r}; {NAME} has only 'float32'.")
        if options.extra:
            raise InputError(f"{NAME} has no options of its own; got {sorted(options.extra)}.")
        return FrozenApi1Model(config, weights)


class FrozenApi1Model:
    """One checkpoint.

    Attributes:
        native: the parameters, by their canonical names.
        device: where they are.
    """

    def __init__(self, config: GemmaConfig, weights: Weights) -> None:
        self.config = config
        self.native = model.load_parameters(config, weights)
        self.device = DEVICE

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        _check(inputs)
        logits, states = model.run(self.config, self.native, inputs)
        return self._outputs(inputs, logits, states)

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array)

    def _outputs(
        self, inputs: ModelInputs, logits: np.ndarray, states: list[np.ndarray]
    ) -> ModelOutputs:
        loss = None
        if inputs.labels is not None:
            loss = model.causal_loss(logits, inputs.labels, inputs.num_items_in_batch)
        return ModelOutputs(
            logits=logits.astype(np.float32),
            hidden_states=(
                tuple(state.astype(np.float32) for state in states)
                if inputs.output_hidden_states
                else None
            ),
            as_numpy=self.to_numpy,
            loss=loss,
        )

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        shape = (batch_size, max_length, self.config.num_key_value_heads, self.config.head_dim)
        layers = range(self.config.num_hidden_layers)
        store = [(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in layers]
        return Cache.empty(store, batch_size, max_length)

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        _check(inputs)
        valid = cache.admit(inputs)
        found = model.run(self.config, self.native, inputs, valid, cache.arrays, cache.length)
        return self._outputs(inputs, *found), cache.advanced(inputs, cache.arrays)


def _check(inputs: ModelInputs) -> None:
    """Refuse what `plugin.py` does not claim."""
    if inputs.input_ids is None:
        raise UnsupportedFeature("inputs_embeds", NAME)
    if inputs.output_attentions:
        raise UnsupportedFeature("attentions", NAME)
