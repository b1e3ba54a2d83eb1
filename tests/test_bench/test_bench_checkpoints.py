"""Random checkpoints: their distribution, the same each time, whole or not at all."""

import math

import numpy as np
import pytest

from gemma_hub.bench import checkpoints
from gemma_hub.bench.checkpoints import (
    SHAPES,
    NormalWeights,
    matrix_parameters,
    random_checkpoint,
)
from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import parameter_shapes

EMBEDDING = "model.embed_tokens.weight"


def test_weights_are_normal_with_a_deviation_of_two_hundredths():
    values = NormalWeights(SHAPES["small"]).read("model.layers.0.mlp.up_proj.weight")
    values = values.astype(np.float64)
    assert values.std() == pytest.approx(0.02, rel=0.01)
    assert abs(values.mean()) < 1e-4
    assert np.mean(np.abs(values) < 0.02) == pytest.approx(math.erf(0.5**0.5), abs=0.005)


def test_weights_depend_on_the_seed_and_the_name_alone(tiny_config, monkeypatch):
    first = NormalWeights(tiny_config).read(EMBEDDING)
    monkeypatch.setattr(checkpoints, "_VALUES_AT_ONCE", 100)
    assert np.array_equal(first, NormalWeights(tiny_config).read(EMBEDDING))
    assert not np.array_equal(first, NormalWeights(tiny_config, seed=1).read(EMBEDDING))
    one, other = (
        NormalWeights(tiny_config).read(f"model.layers.0.mlp.{name}_proj.weight")
        for name in ("gate", "up")
    )
    assert not np.array_equal(one, other)


def test_a_checkpoint_is_written_once_and_read_back(checkpoint, tiny_config):
    opened = open_checkpoint(checkpoint)
    expected = NormalWeights(tiny_config).read(EMBEDDING)
    assert np.array_equal(opened.weights.read(EMBEDDING), expected)
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert random_checkpoint(checkpoint, tiny_config) == checkpoint
    assert before == {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}


def test_a_checkpoint_that_fails_half_way_leaves_nothing(tmp_path, tiny_config):
    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random_checkpoint(tmp_path / "random", tiny_config, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_model_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match="another model than the random one"):
        random_checkpoint(checkpoint, SHAPES["small"])


def test_a_damaged_folder_is_refused(tmp_path, tiny_config):
    (tmp_path / "random").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read.*Delete it"):
        random_checkpoint(tmp_path / "random", tiny_config)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(checkpoints, "SPARE_BYTES", 1 << 62)
    with pytest.raises(CheckpointError, match=r"GB free.*--cache"):
        random_checkpoint(tmp_path / "a" / "random", tiny_config)
    assert list(tmp_path.iterdir()) == []


def test_matrices_are_counted_as_a_step_reads_them():
    shapes = parameter_shapes(SHAPES["2b"])
    norms = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    every, body = matrix_parameters(SHAPES["2b"])
    assert every == sum(map(math.prod, shapes.values())) - norms
    assert every - body == 256000 * 2048
