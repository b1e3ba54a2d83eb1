"""Models to convert: every attention shape in every type, with weights that no two share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_hub.checkpoints.formats.interface import Opened
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import DTYPES, ArrayWeights, Weights, parameter_shapes

SHAPES = {  # (query heads, key/value heads, head size); the hidden size is 24
    "mqa": (3, 1, 8),
    "gqa": (4, 2, 6),
    "mha": (3, 3, 8),
    "narrow": (4, 1, 16),  # heads * head size != hidden size
}
DTYPE_NAMES = ("float32", "bfloat16", "float16")


def make_config(shape: str = "gqa", **changes: object) -> GemmaConfig:
    heads, kv_heads, head_dim = SHAPES[shape]
    values = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return GemmaConfig(**{**values, **changes})


def make_weights(config: GemmaConfig, dtype: str = "float32", seed: int = 5) -> ArrayWeights:
    draw = np.random.default_rng(seed).normal
    return ArrayWeights(
        {
            name: draw(size=shape).astype(DTYPES[dtype])
            for name, shape in parameter_shapes(config).items()
        }
    )


@pytest.fixture
def make_opened(tmp_path: Path) -> Callable[..., Opened]:
    """Make a model that a format can write: `make_opened("mqa", "bfloat16", rope_theta=5e5)`."""

    def make(shape: str = "gqa", dtype: str = "float32", **changes: object) -> Opened:
        config = make_config(shape, dtype=dtype, **changes)
        tokenizer = tmp_path / "source" / "tokenizer.model"
        tokenizer.parent.mkdir(exist_ok=True)
        tokenizer.write_bytes(b"not a real vocabulary")
        return Opened(
            path=tmp_path / "source",
            config=config,
            task="causal_lm",
            weights=make_weights(config, dtype),
            files={"tokenizer.model": tokenizer},
        )

    return make


@pytest.fixture(params=[(s, d) for s in SHAPES for d in DTYPE_NAMES], ids="-".join)
def any_opened(request: pytest.FixtureRequest, make_opened: Callable[..., Opened]) -> Opened:
    """Each shape in each type."""
    return make_opened(*request.param)


@pytest.fixture
def assert_same() -> Callable[[Weights, Weights], None]:
    """Assert that two models' weights are equal bit for bit."""

    def check(found: Weights, expected: Weights) -> None:
        assert set(found.names()) == set(expected.names())
        for name in expected.names():
            one, other = found.read(name), expected.read(name)
            assert found.dtype(name) == expected.dtype(name) == one.dtype.name, name
            assert found.shape(name) == one.shape == other.shape, name
            assert one.tobytes() == other.tobytes(), name

    return check
