"""Checkpoints written by the safetensors library, an independent writer, for the reader to read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import DTYPES, parameter_shapes

Arrays = dict[str, np.ndarray]
Writer = Callable[..., Path]


@pytest.fixture
def config() -> GemmaConfig:
    """Every size differs from every other, and N * H from D."""
    return GemmaConfig(
        vocab_size=23,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        dtype="bfloat16",
    )


@pytest.fixture
def make_arrays(config: GemmaConfig) -> Callable[..., Arrays]:
    """Random arrays for all parameters of a config."""

    def make(dtype: str = "bfloat16", config: GemmaConfig = config) -> Arrays:
        draw = np.random.default_rng(5).normal
        return {
            name: draw(size=shape).astype(DTYPES[dtype])
            for name, shape in parameter_shapes(config).items()
        }

    return make


@pytest.fixture
def arrays(make_arrays: Callable[..., Arrays]) -> Arrays:
    return make_arrays()


@pytest.fixture
def write(tmp_path: Path, config: GemmaConfig) -> Writer:
    """Write arrays as one file, or as shards where `shards` names the first tensor of each."""

    def write(
        arrays: Mapping[str, np.ndarray],
        *,
        config: Mapping[str, Any] | GemmaConfig = config,
        shards: tuple[str, ...] = (),
        name: str = "checkpoint",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        raw = config.to_dict() if isinstance(config, GemmaConfig) else config
        (folder / "config.json").write_text(json.dumps(dict(raw)))
        if not shards:
            save_file(dict(arrays), folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        parts: list[Arrays] = [{}]
        for tensor, array in arrays.items():
            if tensor in shards:
                parts.append({})
            parts[-1][tensor] = array
        weight_map = {}
        for i, part in enumerate(parts):
            file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def sharded(write: Writer, arrays: Arrays) -> Path:
    """A checkpoint in three shards."""
    return write(arrays, shards=("model.layers.0.mlp.up_proj.weight", "model.norm.weight"))
