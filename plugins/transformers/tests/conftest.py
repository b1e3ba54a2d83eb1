"""A small Gemma on which a wrong operation shows, and models of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import DTYPES, ArrayWeights, Weights, parameter_shapes
from gemma_hub.plugins.registry import plugin_registry

PAD = 3
SMALL = GemmaConfig(
    vocab_size=61,
    hidden_size=24,  # its root is not a number of bfloat16
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=3e-6,
    rope_theta=5e4,
    pad_token_id=PAD,
    bos_token_id=5,
    eos_token_id=(1, 9),
    num_labels=3,
)


def small_weights(config: GemmaConfig, task: str = "causal_lm", dtype: str = "float32") -> Weights:
    """Random parameters, the same for the same arguments; norms are away from 0."""
    random = np.random.default_rng(17)
    arrays = {
        name: random.uniform(-0.6, 1.5, shape)
        if "norm" in name
        else random.standard_normal(shape) / shape[-1] ** 0.5
        for name, shape in parameter_shapes(config, task).items()
    }
    return ArrayWeights({name: array.astype(DTYPES[dtype]) for name, array in arrays.items()})


@pytest.fixture
def config() -> Callable[..., GemmaConfig]:
    """The small config with some fields changed."""
    return lambda **changes: dataclasses.replace(SMALL, **changes)


@pytest.fixture
def weights() -> Callable[..., Weights]:
    """Of a config, a task and a dtype."""
    return small_weights


@pytest.fixture
def build() -> Callable[..., Any]:
    """A backend's model on the CPU, float32 unless told."""

    def built(
        backend: str = "transformers",
        config: GemmaConfig = SMALL,
        task: str = "causal_lm",
        dtype: str = "float32",
        weights: Weights | None = None,
    ) -> Any:
        weights = small_weights(config, task, dtype) if weights is None else weights
        options = BuildOptions(dtype=dtype, device="cpu")
        return (
            plugin_registry().load(backend).backend.build(config, TaskSpec(task), weights, options)
        )

    return built


@pytest.fixture
def batch() -> Callable[..., ModelInputs]:
    """Three rows of nine slots, padded on the left; arguments as those of `prepare`."""

    def prepared(config: GemmaConfig = SMALL, **arguments: Any) -> ModelInputs:
        ids = np.random.default_rng(1).integers(10, 61, (3, 9))
        mask = np.ones_like(ids)
        mask[1, :4], mask[2, :1] = 0, 0
        ids[mask == 0] = PAD
        return ModelInputs.prepare(config, ids, mask, **arguments)

    return prepared
