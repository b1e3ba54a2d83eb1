"""Small models with weights that make every part of Gemma matter."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import ArrayWeights, parameter_shapes

SMALL = GemmaConfig(
    vocab_size=131,
    hidden_size=48,  # not a square, and not heads * head_dim
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=3e-6,
    rope_theta=50_000.0,
    pad_token_id=3,
    eos_token_id=1,
    bos_token_id=5,
)


def draw_weights(config: GemmaConfig, seed: int = 0) -> ArrayWeights:
    """Float32 weights: scores that spread, GELU inputs up to 4, norms far from zero and unlike."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("norm.weight"):
            value = random.uniform(-0.6, 2.0, shape)
        elif name.endswith(".bias"):
            value = random.normal(size=shape) * 0.5
        else:
            value = random.normal(size=shape) / np.sqrt(shape[1])
        if name == "model.embed_tokens.weight":
            value *= np.exp(0.35 * random.normal(size=(shape[0], 1)))
            value[7] *= 1e-4  # a row so small that rms_norm_eps matters
        arrays[name] = value.astype(np.float32)
    return ArrayWeights(arrays)


@pytest.fixture(scope="session")
def make_config():
    return lambda **changes: dataclasses.replace(SMALL, **changes)


@pytest.fixture(scope="session")
def make_weights():
    return draw_weights


@pytest.fixture(scope="session")
def config():
    return SMALL


@pytest.fixture(scope="session")
def weights():
    return draw_weights(SMALL)


@pytest.fixture
def ids():
    """(3, 23) token ids, one of them the embedding row that is nearly zero."""
    ids = np.random.default_rng(1).integers(0, 131, (3, 23))
    ids[:, 4] = 7
    return ids


@pytest.fixture
def ragged_mask():
    """(3, 23): nothing padded, 9 on the left, 6 on the right."""
    mask = np.ones((3, 23), np.int64)
    mask[1, :9] = 0
    mask[2, 17:] = 0
    return mask
