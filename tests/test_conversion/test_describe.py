"""describe and tensor_hashes: the same account of a checkpoint in whatever format it is."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.cli.app import app
from gemma_hub.config import GemmaConfig
from gemma_hub.conversion import convert, describe, tensor_hashes
from gemma_hub.parameters import ArrayWeights, parameter_shapes


@pytest.fixture
def source(tmp_path):
    config = GemmaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, dtype="float32",
    )  # fmt: skip
    draw = np.random.default_rng(1).normal
    arrays = {n: draw(size=s).astype(np.float32) for n, s in parameter_shapes(config).items()}
    save_checkpoint(tmp_path / "source", config, ArrayWeights(arrays))
    return tmp_path / "source"


@pytest.fixture(params=["pytorch_bin", "gemma_pytorch", "flax_msgpack"])
def other(request, tmp_path, source):
    convert(source, tmp_path / "other", request.param)
    return tmp_path / "other", request.param


def test_another_format_is_described_like_ours(source, other):
    path, name = other
    ours, theirs = describe(source), describe(path)
    assert (ours.format, theirs.format) == ("huggingface", name)
    assert not theirs.problems
    for field in ("config", "task", "num_parameters", "dtype", "eos_token_ids"):
        assert getattr(theirs, field) == getattr(ours, field), field
    rows = [
        [(t.name, t.shape, t.dtype, t.nbytes) for t in found.tensors] for found in (ours, theirs)
    ]
    assert rows[0] == rows[1]


def test_hashes_do_not_depend_on_the_format(source, other):
    path, _ = other
    assert tensor_hashes(path) == tensor_hashes(source)
    assert len(set(tensor_hashes(source).values())) == len(tensor_hashes(source))


def test_what_is_wrong_is_said(other):
    path, _ = other
    file = next(p for p in path.iterdir() if p.suffix in {".bin", ".ckpt", ".msgpack"})
    file.write_bytes(file.read_bytes()[:-5000])
    description = describe(path)
    assert description.problems
    assert str(path) in description.problems[0]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands(tmp_path, source):
    plan = run("convert", source, "--to", "gemma_pytorch", "--plan")
    assert plan.exit_code == 0, plan.output
    assert "model.layers.1.self_attn.qkv_proj.weight" in plan.output
    done = run("convert", source, tmp_path / "out.ckpt", "--to", "gemma_pytorch", "--json")
    record = json.loads(done.stdout)
    assert record["tensors"]["embedder.weight"] == {"shape": [50, 24], "dtype": "float32"}
    narrow = run("convert", source, tmp_path / "narrow", "--dtype", "float16")
    assert "values in all" in narrow.output
    assert run("convert", source).exit_code == 2
    config = source / "config.json"
    back = run("convert", tmp_path / "out.ckpt", tmp_path / "back", "--config", config)
    assert back.exit_code == 0, back.output
    shown = run("inspect", tmp_path / "back", "--hashes", "--json")
    hashes = {t["name"]: t["sha256"] for t in json.loads(shown.stdout)["tensors"]}
    assert hashes == tensor_hashes(source)
    assert "gemma_pytorch" in run("formats").output


def test_a_refusal_has_an_exit_code(tmp_path, source):
    config = json.loads((source / "config.json").read_text())
    changed = {**config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (source / "config.json").write_text(json.dumps(changed))
    plan = run("convert", source, "--to", "gemma_pytorch", "--plan")
    assert plan.exit_code == 1
    assert "cannot be written" in plan.output
    assert run("convert", source, tmp_path / "out", "--to", "gemma_pytorch").exit_code == 1
    assert not (tmp_path / "out").exists()
