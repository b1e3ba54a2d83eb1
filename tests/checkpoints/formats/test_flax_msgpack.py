"""Flax checkpoints: there and back bit for bit, what is refused, hostile files; without flax."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest

from gemma_hub.checkpoints.formats import msgpack_file
from gemma_hub.checkpoints.formats.flax_msgpack import FlaxMsgpack
from gemma_hub.checkpoints.formats.interface import CheckpointFormat, WriteOptions
from gemma_hub.checkpoints.formats.msgpack_file import MsgpackFile
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

FLAX = FlaxMsgpack()
PLAIN = WriteOptions()
INDEX = "flax_model.msgpack.index.json"
FUZZ = Path(__file__).with_name("fuzz_msgpack.py")


def written(opened, folder, options=PLAIN, progress=None):
    folder.mkdir()
    FLAX.write(folder, opened, options, progress)
    return folder


def packed(array, kind=1, **changes):
    parts = {"shape": list(array.shape), "dtype": array.dtype.name, "data": array.tobytes()}
    return msgpack.ExtType(kind, msgpack.packb([*(parts | changes).values()]))


def file_of(tree, path):
    path.write_bytes(tree if isinstance(tree, bytes) else msgpack.packb(tree))
    return path


def base_of(opened):
    names = parameter_shapes(opened.config, "base")
    arrays = ArrayWeights({name: opened.weights.read(name) for name in names})
    return dataclasses.replace(opened, task="base", weights=arrays)


def untied(opened):
    config = dataclasses.replace(opened.config, tie_word_embeddings=False)
    arrays = {name: opened.weights.read(name) for name in opened.weights.names()}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] * 2
    return dataclasses.replace(opened, config=config, weights=ArrayWeights(arrays))


def assert_round_trip(opened, folder, assert_same):
    again = FLAX.open(folder)
    assert again.config == opened.config
    assert again.task == opened.task
    assert again.dropped == {}
    assert again.notes == ()
    assert_same(again.weights, opened.weights)
    assert again.files["tokenizer.model"].read_bytes() == b"not a real vocabulary"


def test_it_is_a_format(tmp_path):
    assert isinstance(FLAX, CheckpointFormat)
    assert not FLAX.detect(tmp_path)
    assert not FLAX.detect(tmp_path / "nothing")
    (tmp_path / "flax_model.msgpack").touch()
    assert FLAX.detect(tmp_path)


def test_there_and_back(any_opened, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "flax")
    assert FLAX.detect(folder)
    assert_round_trip(any_opened, folder, assert_same)


@pytest.mark.parametrize("change", [untied, base_of])
@pytest.mark.parametrize("size", [None, 3000])
def test_other_models_there_and_back(make_opened, change, size, tmp_path, assert_same):
    opened = change(make_opened())
    options = WriteOptions(max_shard_bytes=size)
    assert_round_trip(opened, written(opened, tmp_path / "flax", options), assert_same)


def test_shards(any_opened, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "flax", WriteOptions(max_shard_bytes=6000))
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards[0] == f"flax_model-00001-of-{len(shards):05}.msgpack"
    assert sorted(f.name for f in folder.glob("*.msgpack")) == shards
    arrays = [any_opened.weights.read(n) for n in any_opened.weights.names()]
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays)
    assert "model/layers/0/self_attn/q_proj/kernel" in index["weight_map"]
    assert FLAX.detect(folder)
    assert_round_trip(any_opened, folder, assert_same)


def test_what_is_announced_is_written(any_opened, tmp_path):
    weights = FLAX.tensors(any_opened, PLAIN)
    done = []
    folder = written(any_opened, tmp_path / "flax", progress=lambda *told: done.append(told))
    file = MsgpackFile(folder / "flax_model.msgpack")
    assert set(file.tensors) == set(weights.names())
    for name in weights.names():
        array = file.tensors[name]
        assert (array.shape, array.dtype) == (weights.shape(name), weights.dtype(name))
    assert done[-1] == (sum(weights.read(n).nbytes for n in weights.names()),) * 2
    assert [told[0] for told in done] == sorted(told[0] for told in done)


def test_kernels_are_transposed(make_opened, tmp_path):
    opened = make_opened()
    file = MsgpackFile(written(opened, tmp_path / "flax") / "flax_model.msgpack")
    kernel = file.read("model/layers/2/mlp/down_proj/kernel")
    assert np.array_equal(kernel, opened.weights.read("model.layers.2.mlp.down_proj.weight").T)


def test_chunked_arrays(make_opened, tmp_path, assert_same, monkeypatch):
    opened = make_opened(dtype="bfloat16")
    monkeypatch.setattr(msgpack_file, "MAX_CHUNK_BYTES", 500)
    folder = written(opened, tmp_path / "flax")
    assert (folder / "flax_model.msgpack").read_bytes().count(b"__msgpack_chunked_array__") > 10
    assert_round_trip(opened, folder, assert_same)


def test_flat_names_and_a_missing_prefix_are_read(make_opened, tmp_path, assert_same):
    opened = make_opened(dtype="float16")
    weights = FLAX.tensors(opened, PLAIN)
    for prefix in ("model/", ""):
        folder = written(opened, tmp_path / f"flax{len(prefix)}")
        flat = {n.removeprefix("model/"): packed(weights.read(n)) for n in weights.names()}
        file_of({prefix + n: v for n, v in flat.items()}, folder / "flax_model.msgpack")
        assert_round_trip(opened, folder, assert_same)


def test_a_head_is_left_alone_by_a_base_model(make_opened, tmp_path, assert_same):
    opened = untied(make_opened())
    folder = written(opened, tmp_path / "flax")
    stated = opened.config.to_dict("base")
    (folder / "config.json").write_text(json.dumps(stated))
    again = FLAX.open(folder)
    assert again.task == "base"
    assert list(again.dropped) == ["lm_head/kernel"]
    assert_same(again.weights, base_of(opened).weights)


def test_a_config_is_needed(make_opened, tmp_path, assert_same):
    for name, opened in {"whole": make_opened(), "base": base_of(make_opened())}.items():
        folder = written(opened, tmp_path / name)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json.*pass the model's config"):
            FLAX.open(folder)
        again = FLAX.open(folder, opened.config)
        assert again.task == opened.task
        assert_same(again.weights, opened.weights)


def test_reads_are_views_where_they_can_be_and_writable(make_opened, tmp_path):
    opened = make_opened()
    folder = written(opened, tmp_path / "flax")
    before = (folder / "flax_model.msgpack").read_bytes()
    file = MsgpackFile(folder / "flax_model.msgpack")
    for name in file.tensors:
        part = file.read(name, slice(0, 2))
        assert part.flags.aligned
        assert part.flags.writeable
        part[:] = 0
    assert (folder / "flax_model.msgpack").read_bytes() == before


OBJECTIONS = {
    "attention biases": {"attention_bias": True},
    "norm of queries": {"use_qk_norm": True},
    "soft caps": {"attn_logit_softcapping": 50.0},
    "sliding windows": {"layer_types": ("sliding_attention",) * 3, "sliding_window": 4},
    r"0 \+ weight": {"rms_norm_offset": 0.0},
    "query_pre_attn_scalar 24": {"query_pre_attn_scalar": 24.0},
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "RoPE base": {"rope_theta": 5e5},
}


@pytest.mark.parametrize("reason", OBJECTIONS)
def test_objections(make_opened, reason, tmp_path):
    opened = make_opened()
    assert FLAX.objections(opened.config, "causal_lm", PLAIN) == ()
    config = dataclasses.replace(opened.config, **OBJECTIONS[reason])
    assert len(FLAX.objections(config, "base", PLAIN)) == 1
    with pytest.raises(CheckpointError, match=reason):
        written(dataclasses.replace(opened, config=config), tmp_path / "flax")
    assert not list((tmp_path / "flax").iterdir())


def test_objections_to_tasks_and_padding(make_opened):
    config = make_opened().config
    for task in ("sequence_classification", "token_classification"):
        assert any(task in text for text in FLAX.objections(config, task, PLAIN))
    padded = WriteOptions(pad_vocab_to=64)
    assert any("pad_vocab_to" in text for text in FLAX.objections(config, "base", padded))


# -- damaged and hostile ---------------------------------------------------------------------------

VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)
CHUNK = {
    "__msgpack_chunked_array__": True,
    "shape": {"0": 2, "1": 3},
    "chunks": {"0": packed(VALUE.reshape(-1)[:4]), "1": packed(VALUE.reshape(-1)[4:])},
}
DEEP = packed(VALUE)
for _ in range(40):
    DEEP = {"a": DEEP}
GOOD = msgpack.packb({"a": packed(VALUE)})

HOSTILE = {
    "empty": b"",
    "no complete msgpack": GOOD[:-1],
    "goes on after its end": GOOD + b"\0",
    "one value": msgpack.packb(packed(VALUE)),
    "maps within one another": DEEP,
    "map at its start says that it has 4294967295": b"\xdf\xff\xff\xff\xff" + GOOD,
    "past the end": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01" + GOOD,
    "has 4294967295 bytes": b"\x81\xdb\xff\xff\xff\xff" + GOOD,
    "a twice": b"\x82" + GOOD[1:] + GOOD[1:],
    "a/b twice": {"a": {"b": packed(VALUE)}, "a/b": packed(VALUE)},
    "negative number in the shape": {"a": packed(VALUE, shape=[-2, -3])},
    "in the shape of a that": {"a": packed(VALUE, shape=[2.0, 3])},
    "has 24 bytes": {"a": packed(VALUE, shape=[2**63, 2**63, 2**63])},
    r"is float32 \(2, 2\)": {"a": packed(VALUE, shape=[2, 2])},
    "has 33 axes": {"a": packed(VALUE, shape=[1] * 33)},
    "no list where its shape": {"a": packed(VALUE, shape="23")},
    "'int32'; expected": {"a": packed(VALUE.astype(np.int32))},
    "'object'": {"a": packed(VALUE, dtype="object")},
    "'V8'": {"a": packed(VALUE, dtype="V8")},
    "not a text": {"a": packed(VALUE, dtype=7)},
    "no bytes where": {"a": packed(VALUE, data="text")},
    r"not \[shape, type, bytes\]": {"a": msgpack.ExtType(1, msgpack.packb([[2, 3], "float32"]))},
    "extension of type 2": {"a": packed(VALUE, kind=2)},
    "that is no array": {"a": [packed(VALUE)]},
    "a key of the map at a is not a text": {"a": {1: packed(VALUE)}},
    "a/b is a number": {"a": {"b": 7}},
    "negative number at a": {"a": -7},
    "not UTF-8": b"\x81\xa1\xff\xc0",
    "has more than 512": {"a" * 300: {"b" * 300: packed(VALUE)}},
    "has not the parts": {"a": CHUNK | {"more": True}},
    "no chunks": {"a": CHUNK | {"chunks": {}}},
    "not numbered": {"a": CHUNK | {"chunks": {"1": CHUNK["chunks"]["1"]}}},
    "do not fit": {"a": CHUNK | {"chunks": {"0": CHUNK["chunks"]["0"]}}},
    "chunks do not fit": {"a": CHUNK | {"shape": {"0": 2**62, "1": 2**62}}},
    "are no arrays": {"a": CHUNK | {"chunks": {"0": {"0": packed(VALUE)}}}},
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_hostile_files(reason, tmp_path):
    path = file_of(HOSTILE[reason], tmp_path / "flax_model.msgpack")
    start = time.process_time()
    pattern = "complete msgpack" if reason == "no complete msgpack" else reason
    with pytest.raises(CheckpointError, match=f"flax_model.msgpack.*{pattern}"):
        MsgpackFile(path)
    assert time.process_time() - start < 1


def test_the_good_ones_are_good(tmp_path):
    tree = {"a": {"b": packed(VALUE)}, "c": CHUNK, "d": packed(np.array(3.0, "float16"), kind=3)}
    file = MsgpackFile(file_of(tree, tmp_path / "x.msgpack"))
    assert np.array_equal(file.read("a/b"), VALUE)
    assert np.array_equal(file.read("c", slice(1, 2)), VALUE[1:2])
    assert file.read("d") == np.float16(3.0)


def test_many_entries_are_refused_in_time(tmp_path):
    small = packed(np.zeros(0, np.float16))
    path = file_of({f"{i:x}": small for i in range(300_000)}, tmp_path / "x.msgpack")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="more than 10,000 values"):
        MsgpackFile(path)
    assert time.process_time() - start < 1


def test_every_type_and_its_bytes(tmp_path):
    arrays = {name: np.arange(5).astype(dtype) for name, dtype in DTYPES.items()}
    tree = {name: packed(array) for name, array in arrays.items()}
    file = MsgpackFile(file_of(tree, tmp_path / "x.msgpack"))
    for name, array in arrays.items():
        assert file.read(name).dtype == array.dtype
        assert file.read(name).tobytes() == array.tobytes()


# -- the folder ------------------------------------------------------------------------------------


@pytest.fixture
def sharded(make_opened, tmp_path):
    return written(make_opened(), tmp_path / "flax", WriteOptions(max_shard_bytes=6000))


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


NORM = "model/norm/weight"
INDEXES = {
    "plain name": lambda places: places.update({NORM: "../flax_model.msgpack"}),
    r"expected the plain name of a \*.msgpack": lambda places: places.update({NORM: "/x.msgpack"}),
    "in 7": lambda places: places.update({NORM: 7}),
    "in 'x.bin'": lambda places: places.update({NORM: "x.bin"}),
    r"Missing \(1\): x.msgpack": lambda places: places.update({NORM: "x.msgpack"}),
    "In no file": lambda places: places.update({"model/x": places[NORM]}),
    r"Not in the index \(1\)": lambda places: places.pop(NORM),
    "In another file": lambda places: places.update({NORM: places["model/embed_tokens/embedding"]}),
    r"Missing \(1\): mmm": lambda places: places.update({NORM: f"{'m' * 999}.msgpack"}),
    "no weight_map": lambda places: places.clear(),
}


@pytest.mark.parametrize("reason", INDEXES)
def test_wrong_indexes(sharded, reason):
    change_index(sharded, INDEXES[reason])
    with pytest.raises(CheckpointError, match=reason):
        FLAX.open(sharded)


def test_a_shard_is_missing_or_left_over(sharded):
    shard = sorted(sharded.glob("*.msgpack"))[0]
    other = sharded / "flax_model.msgpack"
    other.write_bytes(shard.read_bytes())
    with pytest.raises(CheckpointError, match=r"not in the index \(1\): flax_model.msgpack"):
        FLAX.open(sharded)
    other.unlink()
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"Missing .1.: {shard.name}"):
        FLAX.open(sharded)
    shard.write_bytes(content)
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"holds shards .* and no flax_model\.msgpack\.index"):
        FLAX.open(sharded)


def test_an_array_in_two_shards_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    table = msgpack.unpackb((sharded / last).read_bytes(), strict_map_key=False)
    table["model"] |= msgpack.unpackb((sharded / first).read_bytes())["model"]
    (sharded / last).unlink()
    file_of(table, sharded / last)
    with pytest.raises(CheckpointError, match=r"In more than one file \(1\): model/embed_tokens"):
        FLAX.open(sharded)


def test_pipes_are_not_waited_for(make_opened, tmp_path):
    folder = written(make_opened(), tmp_path / "flax")
    (folder / "flax_model.msgpack").unlink()
    os.mkfifo(folder / "flax_model.msgpack")
    assert not FLAX.detect(folder)
    with pytest.raises(CheckpointError, match="is not a file"):
        FLAX.open(folder)


def test_a_config_of_far_too_many_layers(make_opened, tmp_path):
    opened = make_opened()
    folder = written(opened, tmp_path / "flax")
    config = dataclasses.replace(opened.config, num_hidden_layers=10_000)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"29 arrays, and its config 10,000 layers"):
        FLAX.open(folder)
    assert time.process_time() - start < 1
    assert "10000 layers" in FLAX.objections(config, "base", PLAIN)[0]


def test_links_into_a_cache_are_read(make_opened, sharded, assert_same):
    for file in list(sharded.glob("*.msgpack")):
        blob = sharded.parent / f"blob-{file.name}"
        file.rename(blob)
        file.symlink_to(blob)
    assert_same(FLAX.open(sharded).weights, make_opened().weights)


def test_a_classifier_is_refused(make_opened, tmp_path):
    opened = make_opened()
    folder = written(opened, tmp_path / "flax")
    stated = opened.config.to_dict("sequence_classification")
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match="no Flax Gemma"):
        FLAX.open(folder)


def test_tensors_that_do_not_fit_are_named(make_opened, tmp_path):
    opened = make_opened()
    folder = written(opened, tmp_path / "flax")
    stated = dataclasses.replace(opened.config, intermediate_size=48).to_dict()
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"gate_proj/kernel is \(24, 40\), expected \(24, 48"):
        FLAX.open(folder)


def test_a_short_fuzz():
    command = [sys.executable, str(FUZZ), "--runs", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
