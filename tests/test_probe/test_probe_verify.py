"""verify: a right model passes on every backend and a damaged one fails; save and convert."""

import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma_hub import Gemma
from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.cli.app import app
from gemma_hub.config import GemmaConfig
from gemma_hub.conversion import convert
from gemma_hub.errors import (
    BackendNotFoundError,
    CheckpointError,
    InputError,
    VerificationError,
)
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes
from gemma_hub.probe import PROBE_FILE, making, needed_probe, read_probe, reference_probe
from gemma_hub.tasks import loaded_model

BACKENDS = ("numpy", "torch", "flax")
SIZES = {
    "vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip


def make(folder, dtype="float32", task="causal_lm", seed=3, **changes):
    config = GemmaConfig(**{**SIZES, **changes}, dtype=dtype)
    draw = np.random.default_rng(seed).normal
    arrays = {
        name: draw(size=shape, scale=0.5).astype(DTYPES[dtype])
        for name, shape in parameter_shapes(config, task).items()
    }
    save_checkpoint(folder, config, ArrayWeights(arrays), task=task)
    return folder


@pytest.fixture
def converted(tmp_path):
    """A checkpoint with a probe of the reference."""
    convert(make(tmp_path / "source"), tmp_path / "model")
    return tmp_path / "model"


def damage(folder, name, factor=1.01):
    """Multiply one parameter, and keep the probe as it is."""
    probe = (folder / PROBE_FILE).read_bytes()
    checkpoint = open_checkpoint(folder)
    weights = checkpoint.weights
    arrays = {n: np.array(weights.read(n)) for n in weights.names()}
    arrays[name] = arrays[name] * np.float32(factor)
    save_checkpoint(folder, checkpoint.config, ArrayWeights(arrays), overwrite=True)
    (folder / PROBE_FILE).write_bytes(probe)


@pytest.fixture
def gemma_hub_command():
    """`gemma_hub_command("verify", path)` gives the result: exit_code, stdout, stderr."""

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_right_model_passes(tmp_path, backend, dtype, stored):
    convert(make(tmp_path / "source", stored), tmp_path / "model")
    lm = Gemma.load(tmp_path / "model", backend, dtype=dtype, verify=True)
    assert lm.verification.passed
    assert 0.05 < lm.verification.ratio < 4
    assert lm.verification.noise == ("measured" if dtype == stored else "scaled")
    assert lm.verification.dtype == dtype
    assert Gemma.load(tmp_path / "model", backend, dtype=dtype).verification is None


@pytest.mark.parametrize("name", parameter_shapes(GemmaConfig(**SIZES)))
def test_one_per_cent_on_any_parameter_is_seen(converted, name):
    damage(converted, name)
    with pytest.raises(VerificationError, match=r"error is \d.* times the rounding noise.*damaged"):
        Gemma.load(converted, "numpy", verify=True)
    assert Gemma.load(converted, "numpy").verification is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_is_not_finite_fails(converted, backend):
    damage(converted, "model.norm.weight", np.inf)
    with pytest.raises(VerificationError, match="NaN or infinite"):
        Gemma.load(converted, backend, verify=True)


def test_a_checkpoint_without_a_probe_cannot_be_verified(tmp_path):
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"no gemma_hub_probe\.json to verify it by"):
        Gemma.load(tmp_path / "model", "numpy", verify=True)


def test_a_probe_is_of_one_task(converted):
    with pytest.raises(InputError, match="task 'causal_lm' and the model was loaded for 'base'"):
        Gemma.load(converted, "numpy", task="base", verify=True)


# -- what save writes ------------------------------------------------------------------------------

TASKS = ("causal_lm", "base", "sequence_classification", "token_classification")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("writer", BACKENDS)
def test_saved_by_one_backend_verified_by_another(tmp_path, writer, task):
    make(tmp_path / "source", task=task)
    Gemma.load(tmp_path / "source", writer, task=task).save(tmp_path / "saved")
    for backend in BACKENDS:
        lm = Gemma.load(tmp_path / "saved", backend, task=task, verify=True)
        assert lm.verification.noise == "measured"


@pytest.mark.parametrize("writer", ["torch", "flax"])
@pytest.mark.parametrize("reason", ["it is large", "no reference"])
def test_the_loaded_model_makes_the_probe_where_the_reference_does_not(
    tmp_path, monkeypatch, writer, reason
):
    make(tmp_path / "source")
    lm = Gemma.load(tmp_path / "source", writer)
    with monkeypatch.context() as patch:
        if reason == "it is large":
            patch.setattr(loaded_model, "_SMALL", 10)
        else:
            patch.setattr(making, "plugin_registry", NoReference)
        lm.save(tmp_path / "saved")
    probe = read_probe(tmp_path / "saved", lm.config)
    assert probe.noise is None
    assert probe.dtype == "float32"
    assert probe.made_by["backend"] == writer
    for backend in BACKENDS:
        verification = Gemma.load(tmp_path / "saved", backend, verify=True).verification
        assert verification.noise == "usual"
    damage(tmp_path / "saved", "model.layers.1.self_attn.v_proj.weight")
    with pytest.raises(VerificationError):
        Gemma.load(tmp_path / "saved", "numpy", verify=True)


class NoReference:
    def load(self, name):
        raise BackendNotFoundError(f"There is no {name}.")


def test_a_probe_follows_the_weights_that_are_saved(tmp_path):
    make(tmp_path / "source")
    Gemma.load(tmp_path / "source", "torch").save(tmp_path / "first")
    lm = Gemma.load(tmp_path / "first", "torch", verify=True)
    lm.model.model.norm.weight.data += 0.25
    lm.save(tmp_path / "second")
    assert Gemma.load(tmp_path / "second", "flax", verify=True).verification.passed
    first, second = (read_probe(tmp_path / name, lm.config) for name in ("first", "second"))
    assert not np.allclose(first.values, second.values)


def test_a_model_without_finite_results_is_saved_without_a_probe(tmp_path):
    make(tmp_path / "source")
    lm = Gemma.load(tmp_path / "source", "torch")
    lm.model.model.norm.weight.data[3] = np.nan
    lm.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / PROBE_FILE).exists()
    assert np.isnan(open_checkpoint(tmp_path / "saved").weights.read("model.norm.weight")[3])


def test_no_probe_on_request(tmp_path):
    make(tmp_path / "source")
    Gemma.load(tmp_path / "source", "numpy").save(tmp_path / "saved", probe=False)
    convert(tmp_path / "source", tmp_path / "converted", probe=False)
    assert not list(tmp_path.glob(f"*/{PROBE_FILE}"))


# -- what convert writes ---------------------------------------------------------------------------


def test_a_lossless_conversion_keeps_the_probe(tmp_path, converted):
    convert(converted, tmp_path / "flax", "flax_msgpack")
    convert(tmp_path / "flax", tmp_path / "back")
    original = (converted / PROBE_FILE).read_bytes()
    assert (tmp_path / "flax" / PROBE_FILE).read_bytes() == original
    assert (tmp_path / "back" / PROBE_FILE).read_bytes() == original
    assert Gemma.load(tmp_path / "flax", "torch", verify=True).verification.passed


def test_another_type_gets_another_probe(tmp_path, converted):
    convert(converted, tmp_path / "narrow", dtype="bfloat16")
    probe = needed_probe(tmp_path / "narrow", open_checkpoint(converted).config)
    assert probe.noise.dtype == "bfloat16"
    checkpoint = open_checkpoint(tmp_path / "narrow")
    expected = reference_probe(checkpoint.config, "causal_lm", checkpoint.weights, "bfloat16")
    np.testing.assert_array_equal(probe.values, expected.values)
    original = needed_probe(converted, checkpoint.config)
    assert not np.array_equal(probe.values, original.values)


def test_a_damaged_probe_stops_a_conversion_before_it_writes(tmp_path, converted):
    (converted / PROBE_FILE).write_text("{}")
    with pytest.raises(
        CheckpointError, match="is no probe of this checkpoint: it has no 'version'"
    ):
        convert(converted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(converted, tmp_path / "out", probe=False)


def test_without_the_reference_a_conversion_writes_none(tmp_path, monkeypatch):
    make(tmp_path / "source")
    monkeypatch.setattr(making, "plugin_registry", NoReference)
    convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out" / PROBE_FILE).exists()


# -- the noise -------------------------------------------------------------------------------------


def test_what_a_coarse_model_made_is_held_to_its_own_roundings(tmp_path):
    """A bfloat16 model's values cannot be met to float32's noise, whatever recomputes them."""
    make(tmp_path / "source", "bfloat16")
    lm = Gemma.load(tmp_path / "source", "torch")
    probe = making.probe_of_model(lm.contract, lm.config, "causal_lm", lm.backend, "bfloat16")
    fine = Gemma.load(tmp_path / "source", "flax", dtype="float32")
    assert fine.verify(probe).passed
    claimed = dataclasses.replace(probe, dtype="float32")
    assert not fine.verify(claimed).passed


# -- the command -----------------------------------------------------------------------------------


def test_the_command(converted, gemma_hub_command):
    done = gemma_hub_command("verify", converted, "--backends", "numpy,torch")
    assert done.exit_code == 0
    assert done.stdout.count("same") == 2
    assert "measured" in done.stdout
    done = gemma_hub_command("verify", converted, "--backends", "numpy", "--json")
    (verification,) = json.loads(done.stdout)["runs"].values()
    assert verification["passed"]
    damage(converted, "model.norm.weight")
    done = gemma_hub_command("verify", converted, "--backends", "numpy,torch")
    assert done.exit_code == 1
    assert done.stdout.count("DIFFERENT") == 2
    assert "times the rounding noise" in done.stdout


def test_the_command_without_a_probe(tmp_path, gemma_hub_command):
    done = gemma_hub_command("verify", make(tmp_path / "model"))
    assert done.exit_code == 1
    assert "no gemma_hub_probe.json" in done.stderr
