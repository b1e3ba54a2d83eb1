"""convert: from any format to any, whole or not at all, with an account of every tensor."""

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.checkpoints.formats.interface import WriteOptions
from gemma_hub.config import GemmaConfig
from gemma_hub.conversion import convert, detect_format, open_source, plan_conversion
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, InputError
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

READERS = {"orbax": "tensorstore", "keras": "h5py", "gguf": "gguf"}
FORMATS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name in READERS and find_spec(READERS[name]) is None,
            reason=f"its reader, {READERS.get(name)}, is not installed",
        ),
    )
    for name in ("pytorch_bin", "gemma_pytorch", "orbax", "keras", "gguf", "flax_msgpack")
]
HEADS = {"mqa": (3, 1, 8), "gqa": (4, 2, 6), "mha": (3, 3, 8), "narrow": (4, 1, 16)}


def make(folder, heads="gqa", dtype="bfloat16", layers=2, **changes):
    n, k, h = HEADS[heads]
    sizes = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": layers,
        "num_attention_heads": n, "num_key_value_heads": k, "head_dim": h,
    }  # fmt: skip
    config = GemmaConfig(**{**sizes, **changes}, dtype=dtype)
    draw = np.random.default_rng(5).normal
    arrays = {
        name: draw(size=shape).astype(DTYPES[dtype])
        for name, shape in parameter_shapes(config).items()
    }
    save_checkpoint(folder, config, ArrayWeights(arrays))
    return folder


@pytest.fixture
def source(tmp_path):
    return make(tmp_path / "source")


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_is_bit_equal(tmp_path, name, dtype, heads):
    first = make(tmp_path / "first", heads, dtype)
    convert(first, tmp_path / "other", name)
    assert detect_format(tmp_path / "other") == name
    record = convert(tmp_path / "other", tmp_path / "back")
    assert record.source_format == name
    assert not record.changed
    assert not record.dropped
    one, other = open_checkpoint(first), open_checkpoint(tmp_path / "back")
    assert other.weights.names() == one.weights.names()
    for parameter in one.weights.names():
        expected, found = one.weights.read(parameter), other.weights.read(parameter)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes(), parameter
    assert other.config == one.config


@pytest.mark.parametrize("name", FORMATS)
def test_a_plan_says_what_the_conversion_does(tmp_path, source, name):
    plan = plan_conversion(source, name)
    done = convert(source, tmp_path / "out", name)
    assert done == plan
    assert plan.nbytes > 0
    assert plan.tensors
    found = files_of(tmp_path / "out")
    assert sum(map(len, found.values())) >= plan.nbytes
    assert done.to_dict()["target_format"] == name


@pytest.mark.parametrize("name", FORMATS)
def test_a_wider_type_changes_nothing(tmp_path, source, name):
    record = convert(source, tmp_path / "out", name, dtype="float32")
    assert not record.changed
    _, opened = open_source(tmp_path / "out")
    original = open_checkpoint(source).weights
    for parameter in original.names():
        assert opened.weights.dtype(parameter) == "float32"
        expected = original.read(parameter).astype(np.float32)
        np.testing.assert_array_equal(opened.weights.read(parameter), expected)


def test_a_narrower_type_says_how_many_values_change(tmp_path):
    source = make(tmp_path / "source", dtype="float32")
    record = convert(source, tmp_path / "out", dtype="bfloat16")
    original = open_checkpoint(source).weights
    expected = {}
    for name in original.names():
        array = original.read(name)
        expected[name] = int((array.astype(DTYPES["bfloat16"]).astype(np.float32) != array).sum())
    assert record.changed == expected
    assert open_checkpoint(tmp_path / "out").config.dtype == "bfloat16"


def test_values_that_overflow_are_refused(tmp_path):
    source = make(tmp_path / "source", dtype="float32")
    checkpoint = open_checkpoint(source)
    arrays = {name: checkpoint.weights.read(name) for name in checkpoint.weights.names()}
    arrays["model.norm.weight"][3] = 1e6
    save_checkpoint(tmp_path / "large", checkpoint.config, ArrayWeights(arrays))
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds 1e\+06.*float16"):
        convert(tmp_path / "large", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_that_a_format_cannot_hold_is_refused(tmp_path, name):
    source = make(tmp_path / "source", attention_bias=True)
    plan = plan_conversion(source, name)
    if name == "pytorch_bin":
        assert not plan.objections
        return
    assert plan.objections
    assert not plan.tensors
    with pytest.raises(CheckpointError, match="cannot hold this model"):
        convert(source, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_single_file_is_written_where_the_format_has_one(tmp_path, source):
    pytest.importorskip("gguf", reason="the reader of GGUF is not installed")
    for name, file in (("gguf", "tiny.gguf"), ("gemma_pytorch", "tiny.ckpt")):
        convert(source, tmp_path / file, name)
        assert (tmp_path / file).is_file()
        assert detect_format(tmp_path / file) == name
        with pytest.raises(CheckpointError, match="exists already"):
            convert(source, tmp_path / file, name)
        convert(source, tmp_path / file, name, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "tiny.ckpt", "tiny.gguf"]


def test_padded_rows_are_explicit(tmp_path, source):
    options = WriteOptions(pad_vocab_to=64)
    record = convert(source, tmp_path / "padded", "gemma_pytorch", options=options)
    assert record.tensors["embedder.weight"][0] == (64, 24)
    back = convert(tmp_path / "padded", tmp_path / "back")
    assert back.dropped == {"embedder.weight[50:64]": "rows past vocab_size, for padding"}
    objections = plan_conversion(source, "huggingface", options=options).objections
    assert any("pad" in text for text in objections)


# -- what is asked for wrongly ---------------------------------------------------------------------


def test_what_is_there_is_kept(tmp_path, source):
    convert(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    convert(source, tmp_path / "out", dtype="float32", overwrite=True)
    assert files_of(tmp_path / "out") != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not replaced"):
        convert(source, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_unknown_names_are_errors(tmp_path, source):
    with pytest.raises(CheckpointError, match="gguf"):
        convert(source, tmp_path / "out", "ggufs")
    with pytest.raises(InputError, match="float16"):
        convert(source, tmp_path / "out", dtype="float15")
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="in no format"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_too_small_a_disk_is_refused_first(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 left"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- crashes ---------------------------------------------------------------------------------------

_SLOW = """
import sys, time
from gemma_hub.conversion import convert

def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.02)

convert(sys.argv[1], sys.argv[2], sys.argv[3], overwrite=True, progress=slowly)
print("finished", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize("name", ["huggingface", "gemma_pytorch"])
def test_a_killed_conversion_leaves_the_old_output(tmp_path, name):
    source = make(tmp_path / "source", layers=6)
    convert(source, tmp_path / "out", name, dtype="float32")
    before = files_of(tmp_path / "out")
    for steps in (1, 7, 20):
        arguments = [sys.executable, "-c", _SLOW, source, tmp_path / "out", name]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            for line in itertools.islice(process.stdout, steps):
                assert line != "finished\n"
            process.send_signal(signal.SIGKILL)
        assert files_of(tmp_path / "out") == before
        assert list(tmp_path.glob(".out.*.partial")), "it was killed while it wrote"
    # The next one clears away what the dead left, and does its work.
    convert(source, tmp_path / "out", name, overwrite=True)
    assert not list(tmp_path.glob(".*"))
    assert files_of(tmp_path / "out") != before


def test_a_living_conversion_is_not_disturbed(tmp_path):
    pytest.importorskip("fcntl", reason="there are no locks to tell the living from the dead")
    source = make(tmp_path / "source", layers=6)
    arguments = [sys.executable, "-c", _SLOW, source, tmp_path / "out", "huggingface"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        convert(source, tmp_path / "out", overwrite=True)
        assert process.stdout.read().endswith("finished\n")
    assert process.returncode == 0
    assert not list(tmp_path.glob(".*"))


def test_the_progress_reaches_the_total(tmp_path, source):
    seen = []
    record = convert(source, tmp_path / "out", progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == record.nbytes


def test_a_config_can_be_given(tmp_path, source):
    convert(source, tmp_path / "ckpt", "gemma_pytorch")
    (tmp_path / "ckpt" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config"):
        convert(tmp_path / "ckpt", tmp_path / "out")
    config = dataclasses.replace(open_checkpoint(source).config, rms_norm_eps=1e-5)
    record = convert(tmp_path / "ckpt", tmp_path / "out", config=config)
    assert record.config.rms_norm_eps == 1e-5
