"""Orbax checkpoints: there and back bit for bit, what is read, and hostile ones. No orbax here."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gemma_hub.checkpoints.formats import file_listing
from gemma_hub.checkpoints.formats.interface import CheckpointFormat, WriteOptions
from gemma_hub.checkpoints.formats.layout import stored_weights
from gemma_hub.checkpoints.formats.orbax import Orbax, _written_column
from gemma_hub.checkpoints.formats.orbax_files import write_arrays
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import DTYPES, ArrayWeights

tensorstore = pytest.importorskip("tensorstore", reason="the reader of Orbax is not installed")

ORBAX = Orbax()
FUZZ = Path(__file__).with_name("fuzz_orbax.py")
SCRIPT = runpy.run_path(str(FUZZ))
DATABASE = {"max_inline_value_bytes": 1}
# What Orbax makes of its settings, and what it made once.
KINDS = {
    "files, zarr 2": {},
    "files, zarr 2, chunks": {"rows": 2},
    "files, zarr 2, gzip": {"compression": "gzip"},
    "files, zarr 2, raw chunks": {"compression": None, "rows": 1},
    "files, zarr 3": {"version": 3},
    "files, zarr 3, shards": {"version": 3, "rows": 2, "shard_rows": 1},
    "files, zarr 3, raw": {"version": 3, "compression": None},
    "database, zarr 2": {"database": {"max_inline_value_bytes": 1024}},
    "database, zarr 2, chunks": {"database": DATABASE, "rows": 2},
    "database, zarr 2, raw": {"database": DATABASE, "compression": None},
    "database, zarr 3": {"database": DATABASE, "version": 3},
}


def written(opened, folder, options=WriteOptions(), progress=None):  # noqa: B008  # it is frozen
    folder.mkdir()
    ORBAX.write(folder, opened, options, progress)
    return folder


def by_tensorstore(opened, folder, layout="nested", **kind):
    return SCRIPT["written_by_tensorstore"](folder, opened, layout, **kind)


def arrays_of(opened, layout="nested"):
    weights = ORBAX.tensors(opened, WriteOptions(layout=layout))
    return {name: weights.read(name) for name in weights.names()}


def tree_at(folder, arrays):
    """A folder with these arrays and nothing else but _METADATA, their keys split at "/"."""
    folder.mkdir()
    keys = {name: tuple(name.split("/")) for name in arrays}
    list(write_arrays(folder, ArrayWeights(arrays), keys))
    return folder


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_round_trip(opened, folder, assert_same):
    again = ORBAX.open(folder)
    assert again.config == opened.config
    assert again.task == opened.task
    assert again.dropped == {}
    assert again.notes == ()
    assert_same(again.weights, opened.weights)
    assert again.files["tokenizer.model"].read_bytes() == b"not a real vocabulary"


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ORBAX.layouts)
def test_there_and_back(any_opened, layout, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "orbax", WriteOptions(layout=layout))
    assert ORBAX.detect(folder)
    assert_round_trip(any_opened, folder, assert_same)


@pytest.mark.parametrize("layout", ORBAX.layouts)
@pytest.mark.parametrize("kind", KINDS)
def test_what_tensorstore_writes(make_opened, kind, layout, tmp_path, assert_same):
    opened = make_opened("mha" if layout == "flat" else "gqa", "bfloat16")
    folder = by_tensorstore(opened, tmp_path / "orbax", layout, **KINDS[kind])
    assert ORBAX.detect(folder)
    assert_round_trip(opened, folder, assert_same)
    (folder / "_METADATA").unlink()  # which old releases do not have
    assert ORBAX.detect(folder)
    assert_round_trip(opened, folder, assert_same)


@pytest.mark.parametrize("layout", ORBAX.layouts)
def test_what_is_announced_is_written(make_opened, layout, tmp_path):
    opened, done = make_opened(dtype="float16"), []
    options = WriteOptions(layout=layout, pad_vocab_to=64)
    weights = ORBAX.tensors(opened, options)
    folder = written(opened, tmp_path / "orbax", options, lambda *told: done.append(told))
    places = {re.sub("[./]", "/", str(p.parent.relative_to(folder))): p.parent
              for p in folder.rglob(".zarray")}  # fmt: skip
    assert set(places) == set(weights.names())
    for name, place in places.items():
        assert [p.name for p in place.iterdir()] in (
            [".zarray", chunk := ".".join("0" * len(weights.shape(name)))],
            [chunk, ".zarray"],
        )
        assert json.loads((place / ".zarray").read_text())["shape"] == [*weights.shape(name)]
        assert (place / chunk).read_bytes() == weights.read(name).tobytes()
    assert done[-1] == (sum(weights.read(n).nbytes for n in weights.names()),) * 2
    assert [told[0] for told in done] == sorted(told[0] for told in done)


def test_the_names_of_each_layout(make_opened):
    opened = make_opened()
    names = {layout: set(arrays_of(opened, layout)) for layout in ORBAX.layouts}
    assert {"layer_2/mlp/linear", "layer_0/attn/q_einsum/w"} < names["nested"]
    assert "transformer/layer_2/mlp/gating_einsum/w" in names["flat"]
    stacks = arrays_of(opened, "stacked")
    stack = stacks["transformer/stacked_layers/attention_type_0/mlp/linear/w"]
    assert stack.shape == (3, 40, 24)
    down = opened.weights.read("model.layers.2.mlp.down_proj.weight")
    assert np.array_equal(stack[2], down.T)


def test_padded_rows(make_opened, tmp_path, assert_same):
    opened = make_opened(dtype="bfloat16")
    folder = written(opened, tmp_path / "orbax", WriteOptions(pad_vocab_to=64))
    raw = np.fromfile(folder / "embedder.input_embedding" / "0.0", DTYPES["bfloat16"])
    assert not raw.reshape(64, 24)[50:].astype(np.float32).any()
    again = ORBAX.open(folder)
    reason = "rows past vocab_size, for padding"
    assert again.dropped == {"embedder/input_embedding[50:64]": reason}
    assert_same(again.weights, opened.weights)


def test_reads_are_views_where_they_can_be(make_opened, tmp_path):
    folder = written(make_opened(), tmp_path / "orbax", WriteOptions(layout="stacked"))
    files = {path: path.read_bytes() for path in folder.rglob("0*")}
    weights = ORBAX.open(folder).weights
    for name in weights.names():
        part = weights.read(name, slice(0, 2))
        assert part.flags.writeable
        part[:] = 0
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("kind", ["files, zarr 2, chunks", "database, zarr 3"])
def test_parts_are_as_in_numpy(make_opened, kind, tmp_path):
    opened = make_opened()
    folder = ORBAX.open(by_tensorstore(opened, tmp_path / "orbax", **KINDS[kind])).weights._stored
    name = "layer_0/attn/kv_einsum/w"
    whole = folder.read(name)
    indexes = [0, 1, -1, slice(1, 2), slice(-2, None), slice(1, 1), (1, slice(0, 1), slice(3, 9)),
               (slice(None), 1), (slice(0, 99), -1, -2)]  # fmt: skip
    for index in indexes:
        assert np.array_equal(folder.read(name, index), whole[index]), index
        assert folder.read(name, index).shape == whole[index].shape, index


def test_tensorstore_is_imported_only_where_it_is_needed(make_opened, tmp_path, monkeypatch):
    plain = written(make_opened(), tmp_path / "plain")
    packed = by_tensorstore(make_opened(), tmp_path / "packed")
    database = by_tensorstore(make_opened(), tmp_path / "database", database=DATABASE)
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    weights = ORBAX.open(plain).weights
    assert weights.read("model.norm.weight").shape == (24,)
    with pytest.raises(CheckpointError, match=r"needs tensorstore.*gemma-hub\[orbax\]"):
        ORBAX.open(packed).weights.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="needs tensorstore"):
        ORBAX.open(database)


# -- names and configs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "params/", "transformer/", "params/transformer/", "rlx_networks/policy_network/"]
)
@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_prefixes(make_opened, prefix, layout, tmp_path, assert_same):
    opened = make_opened("mha")
    arrays = {n.removeprefix("transformer/"): a for n, a in arrays_of(opened, layout).items()}
    folder = tree_at(tmp_path / "orbax", {prefix + name: array for name, array in arrays.items()})
    assert_same(ORBAX.open(folder, opened.config).weights, opened.weights)


def test_the_state_of_a_training_is_dropped(make_opened, tmp_path, assert_same):
    opened = make_opened()
    arrays = arrays_of(opened)
    trained = {f"params/{name}": array for name, array in arrays.items()}
    trained |= {f"opt_state/0/mu/{name}": array for name, array in arrays.items()}
    trained |= {"step": np.zeros(1, np.float32)}
    again = ORBAX.open(tree_at(tmp_path / "orbax", trained))
    assert set(again.dropped) == set(trained) - {f"params/{name}" for name in arrays}
    assert_same(again.weights, opened.weights)


@pytest.mark.parametrize("layout", ORBAX.layouts)
def test_gates_in_either_order(make_opened, layout, tmp_path, assert_same):
    opened = make_opened()
    arrays = arrays_of(opened, layout)
    turned = {
        name: np.ascontiguousarray(array.swapaxes(-1, -2)) if "gating" in name else array
        for name, array in arrays.items()
    }
    assert_same(ORBAX.open(tree_at(tmp_path / "orbax", turned)).weights, opened.weights)


def test_gates_that_could_be_in_either_order_are_refused(make_opened, tmp_path):
    opened = make_opened(intermediate_size=24)
    folder = written(opened, tmp_path / "orbax")
    with pytest.raises(CheckpointError, match=r"Ambiguous.*gating_einsum.*in two ways"):
        ORBAX.open(folder)


@pytest.mark.parametrize("shape", ["mqa", "gqa", "mha", "narrow"])
@pytest.mark.parametrize("layout", ORBAX.layouts)
def test_the_config_from_the_shapes(make_opened, shape, layout, tmp_path, assert_same):
    opened = make_opened(shape, max_position_embeddings=8192)
    folder = tree_at(tmp_path / "orbax", arrays_of(opened, layout))
    again = ORBAX.open(folder)
    assert again.config == dataclasses.replace(opened.config, dtype=None)
    assert len(again.notes) == 1
    assert "num_hidden_layers=3" in again.notes[0]
    assert_same(again.weights, opened.weights)


def test_the_rows_of_the_released_models_are_padded(make_opened, tmp_path):
    opened = make_opened(vocab_size=256_000, num_hidden_layers=1, dtype="float16")
    column = _written_column("flat")
    stored = stored_weights(opened.weights, column, opened.config, pad_vocab_to=256_128)
    arrays = {name: stored.read(name) for name in stored.names()}
    again = ORBAX.open(tree_at(tmp_path / "2b", arrays))
    assert again.config.vocab_size == 256_000
    assert list(again.dropped) == ["embedder/input_embedding[256000:256128]"]


def test_a_config_can_be_given(make_opened, tmp_path):
    opened = make_opened()
    folder = written(opened, tmp_path / "orbax")
    config = dataclasses.replace(opened.config, bos_token_id=7)
    assert ORBAX.open(folder, config).config == config
    with pytest.raises(CheckpointError, match=r"mlp/linear/w is \(40, 24\), expected \(48, 24\)"):
        ORBAX.open(folder, dataclasses.replace(config, intermediate_size=48))


def test_a_base_model_and_a_classifier(make_opened, tmp_path, assert_same):
    opened = dataclasses.replace(make_opened(), task="base")
    folder = written(opened, tmp_path / "orbax")
    assert_round_trip(opened, folder, assert_same)
    stated = opened.config.to_dict("token_classification")
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match="no head for"):
        ORBAX.open(folder)


@pytest.mark.parametrize("left_out", ["embedder/input_embedding", "layer_0/mlp/linear"])
def test_what_is_needed_to_tell_the_sizes(make_opened, left_out, tmp_path):
    arrays = arrays_of(make_opened())
    del arrays[left_out]
    with pytest.raises(CheckpointError, match=left_out):
        ORBAX.open(tree_at(tmp_path / "orbax", arrays))


def test_other_trees_are_refused(make_opened, tmp_path):
    arrays = arrays_of(make_opened())
    later = arrays | {"layer_0/post_attention_norm/scale": np.ones(24, np.float32)}
    with pytest.raises(
        CheckpointError, match=r"(?s)Unexpected.*post_attention_norm.*first-generation"
    ):
        ORBAX.open(tree_at(tmp_path / "later", later))
    two = arrays | {f"other/{name}": array for name, array in arrays.items()}
    with pytest.raises(CheckpointError, match="expected the tree of one Gemma"):
        ORBAX.open(tree_at(tmp_path / "two", two))
    axes = arrays | {"layer_0/mlp/linear": np.ones(24, np.float32)}
    with pytest.raises(CheckpointError, match=r"mlp/linear/w is \(24,\); expected 2 axes"):
        ORBAX.open(tree_at(tmp_path / "axes", axes))
    twice = arrays | {"layer_0/mlp/linear/w": arrays["layer_0/mlp/linear"]}
    with pytest.raises(CheckpointError, match="mlp/linear/w twice"):
        ORBAX.open(tree_at(tmp_path / "twice", twice))


# -- where it is -----------------------------------------------------------------------------------


def test_it_is_a_format(tmp_path):
    assert isinstance(ORBAX, CheckpointFormat)
    assert not ORBAX.detect(tmp_path)
    assert not ORBAX.detect(tmp_path / "nothing")
    (tmp_path / "manifest.ocdbt").touch()
    assert ORBAX.detect(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at"):
        ORBAX.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=f"Pass the folder, {tmp_path}"):
        ORBAX.open(tmp_path / "manifest.ocdbt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="holds no Orbax checkpoint"):
        ORBAX.open(tmp_path / "empty")


def test_the_folder_of_a_download(make_opened, tmp_path, assert_same):
    opened = make_opened()
    tree_at(tmp_path / "2b", arrays_of(opened, "flat"))
    (tmp_path / "tokenizer.model").write_bytes(b"Google's")
    for path in (tmp_path, tmp_path / "2b"):
        assert ORBAX.detect(path)
        again = ORBAX.open(path)
        assert again.path == tmp_path / "2b"
        assert again.files == {"tokenizer.model": tmp_path / "tokenizer.model"}
        assert_same(again.weights, opened.weights)
    (tmp_path / "2b" / "tokenizer.model").write_bytes(b"its own")
    assert ORBAX.open(tmp_path).files == {"tokenizer.model": tmp_path / "2b" / "tokenizer.model"}


def test_steps_of_a_training(make_opened, tmp_path, assert_same):
    opened = make_opened()
    for step in ("3", "7"):
        (tmp_path / step).mkdir()
        tree_at(tmp_path / step / "default", arrays_of(opened))
    assert ORBAX.detect(tmp_path)
    assert_same(ORBAX.open(tmp_path / "3").weights, opened.weights)
    with pytest.raises(CheckpointError, match="several checkpoints: 3/default, 7/default"):
        ORBAX.open(tmp_path)
    shutil.move(tmp_path / "7", tmp_path / "7.orbax-checkpoint-tmp-1")
    assert_same(ORBAX.open(tmp_path).weights, opened.weights)
    with pytest.raises(CheckpointError, match="not saved to its end"):
        ORBAX.open(tmp_path / "7.orbax-checkpoint-tmp-1")


def test_a_folder_of_other_weights_is_not_claimed(make_opened, tmp_path):
    tree_at(tmp_path / "orbax", arrays_of(make_opened()))
    assert ORBAX.detect(tmp_path)
    (tmp_path / "flax_model.msgpack").touch()
    assert not ORBAX.detect(tmp_path)


def test_a_database_that_was_not_merged(make_opened, tmp_path):
    folder = by_tensorstore(make_opened(), tmp_path / "orbax", database=DATABASE)
    (folder / "ocdbt.process_0").mkdir()
    shutil.move(folder / "manifest.ocdbt", folder / "ocdbt.process_0")
    with pytest.raises(CheckpointError, match="not saved, or not copied, to its end"):
        ORBAX.open(folder)


# -- objections ------------------------------------------------------------------------------------

OBJECTIONS = {
    "biases": {"attention_bias": True},
    "norm of queries": {"use_qk_norm": True},
    "soft caps": {"attn_logit_softcapping": 50.0},
    "sliding windows": {"layer_types": ("sliding_attention",) * 3, "sliding_window": 4},
    "Its head is the embedding": {"tie_word_embeddings": False},
    r"0 \+ weight": {"rms_norm_offset": 0.0},
    "epsilon": {"rms_norm_eps": 1e-5},
    "query_pre_attn_scalar 24": {"query_pre_attn_scalar": 24.0},
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "RoPE base": {"rope_theta": 5e5},
}


@pytest.mark.parametrize("reason", OBJECTIONS)
def test_objections(make_opened, reason, tmp_path):
    opened = make_opened()
    assert ORBAX.objections(opened.config, "causal_lm", WriteOptions()) == ()
    config = dataclasses.replace(opened.config, **OBJECTIONS[reason])
    assert len(ORBAX.objections(config, "base", WriteOptions())) == 1
    with pytest.raises(CheckpointError, match=reason):
        written(dataclasses.replace(opened, config=config), tmp_path / "orbax")
    assert not list((tmp_path / "orbax").iterdir())


def test_objections_to_options(make_opened):
    config = make_opened().config
    assert "no Gemma for" in ORBAX.objections(config, "token_classification", WriteOptions())[0]
    assert "at least" in ORBAX.objections(config, "base", WriteOptions(pad_vocab_to=40))[0]
    assert "no layout" in ORBAX.objections(config, "base", WriteOptions(layout="kauldron"))[0]


# -- damaged and hostile ---------------------------------------------------------------------------


@pytest.fixture
def files(make_opened, tmp_path):
    """A checkpoint of files in chunks, compressed by zstd."""
    return by_tensorstore(make_opened(), tmp_path / "orbax", rows=2)


@pytest.fixture
def database(make_opened, tmp_path):
    return by_tensorstore(make_opened(), tmp_path / "orbax", database=DATABASE)


def read_all(folder):
    weights = ORBAX.open(folder).weights
    for name in weights.names():
        weights.read(name)


def assert_refused(folder, reason, seconds=1.0):
    start = time.process_time()
    with pytest.raises(CheckpointError, match=reason) as raised:
        read_all(folder)
    assert str(folder) in str(raised.value)
    assert time.process_time() - start < seconds


HUGE = [2**40] * 3
METADATA_2 = {
    "its shape is": {"shape": [50], "chunks": [50, 24]},
    "a shape in it is": {"shape": [50, -24]},
    "expected whole numbers from 1 up": {"chunks": [0, 24]},
    r"\[50, 24.0\]": {"shape": [50, 24.0]},
    r"\[true, 24\]": {"chunks": [True, 24]},
    "its chunks are": {"chunks": [64, 24]},
    "lacks embedder.input_embedding/25.0": {"shape": [2**40, 24]},
    "zarr would read as zeros": {"chunks": [1, 24]},
    "is left over": {"chunks": [25, 24]},
    "embedder/input_embedding is": {"shape": HUGE, "chunks": HUGE},
    r"its order is \"F\"": {"order": "F"},
    "its filters is": {"filters": [{"id": "delta"}]},
    r"compressor is \"blosc\"": {"compressor": {"id": "blosc"}},
    "compressor is 7": {"compressor": 7},
    r"its zarr_format is 3": {"zarr_format": 3},
    "separator": {"dimension_separator": "//"},
    "lacks embedder.input_embedding/0/0": {"dimension_separator": "/"},
    r"embedder/input_embedding is \|O": {"dtype": "|O"},
    r"is \[\[\"a\", \"<f4\"\]\]": {"dtype": [["a", "<f4"]]},
    "cannot be read": {"dtype": "<f2"},
    "has more than 16,384 bytes": {"attributes": "x" * 20_000},
}


@pytest.mark.parametrize("reason", METADATA_2)
def test_metadata_of_zarr_2(files, reason):
    change_json(files / "embedder.input_embedding" / ".zarray", **METADATA_2[reason])
    assert_refused(files, reason)


@pytest.mark.parametrize("kind", ["files, zarr 2", "database, zarr 2"])
def test_chunks_that_are_said_to_be_huge(make_opened, kind, tmp_path):
    opened = make_opened()
    folder = by_tensorstore(opened, tmp_path / "orbax", **KINDS[kind])
    base = {"driver": "file", "path": f"{folder}/"}
    spec = {"driver": "ocdbt", "base": base} if "database" in KINDS[kind] else base
    store = tensorstore.KvStore.open(spec).result()
    key = "embedder.input_embedding/.zarray"
    huge = {"shape": [2**40, 24], "chunks": [2**40, 24]}  # taken as padded rows
    store[key] = json.dumps(json.loads(store[key]) | huge).encode()
    assert_refused(folder, r"float32 \(1099511627776, 24\), which cannot have")


def sharded(**changes):
    settings = {
        "chunk_shape": [50, 24],
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
        ],
    }  # fmt: skip
    return [{"name": "sharding_indexed", "configuration": settings | changes}]


METADATA_3 = {
    "its node_type is": {"node_type": "group"},
    r"expected \"?'?regular": {"chunk_grid": {"name": "variable", "configuration": {}}},
    "chunk_grid has no configuration": {"chunk_grid": {"name": "regular"}},
    "its chunk_key_encoding is": {"chunk_key_encoding": {"name": "v2"}},
    r"its codecs are \[\"transpose": {"codecs": [{"name": "transpose"}, {"name": "bytes"}]},
    "its codecs are 7": {"codecs": 7},
    "not little-endian": {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
    "are not made up of": {"codecs": sharded(chunk_shape=[7, 24])},
    "a shape in it is": {"codecs": sharded(chunk_shape=[2**41, 24])},
    r"its codecs are \[\"sharding_indexed": {"codecs": sharded(codecs=sharded())},
    "index of a shard": {"codecs": sharded(index_codecs=[{"name": "bytes"}])},
    "embedder/input_embedding is int32": {"data_type": "int32"},
}


@pytest.mark.parametrize("reason", METADATA_3)
def test_metadata_of_zarr_3(make_opened, tmp_path, reason):
    folder = by_tensorstore(make_opened(), tmp_path / "orbax", version=3)
    change_json(folder / "embedder.input_embedding" / "zarr.json", **METADATA_3[reason])
    assert_refused(folder, reason)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"shape": [1], "shape": [1]}', b"[" * 15_000, b"\xff\0"]
)
def test_metadata_that_is_no_json(files, content):
    (files / "final_norm.scale" / ".zarray").write_bytes(content)
    assert_refused(files, "final_norm.scale in .* (JSON|twice)")


def test_chunks_that_are_missing(files):
    (files / "layer_1.mlp.linear" / "4.0").unlink()
    assert_refused(files, r"lacks layer_1.mlp.linear/4.0, of the 20 chunks")


def test_chunks_that_are_missing_in_a_database(database):
    base = {"driver": "file", "path": f"{database}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    del store["layer_1.mlp.linear/0.0"]
    assert_refused(database, "lacks layer_1.mlp.linear/0.0, of the 1 chunks")


def test_chunks_that_are_missing_in_a_shard(make_opened, tmp_path):
    folder = by_tensorstore(make_opened(), tmp_path / "orbax", **KINDS["files, zarr 3, shards"])
    path = folder / "layer_1.mlp.linear"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    array = tensorstore.open(spec, open=True).result()
    array[0:1].write(np.zeros((1, 24), np.float32)).result()  # which tensorstore then leaves out
    assert_refused(folder, "layer_1.mlp.linear in .*missing")


def test_chunks_that_are_cut_short(files):
    path = files / "layer_1.mlp.linear" / "4.0"
    path.write_bytes(path.read_bytes()[:-9])
    assert_refused(files, "layer_1.mlp.linear in ")
    path.write_bytes(b"")
    assert_refused(files, "4.0 is float32 .* cannot have 0 bytes")


def test_plain_values_of_another_size(make_opened, tmp_path):
    folder = written(make_opened(), tmp_path / "orbax")
    path = folder / "layer_1.mlp.linear" / "0.0"
    path.write_bytes(path.read_bytes()[:-4])
    assert_refused(folder, r"has 3,836 bytes; float32 \(40, 24\) has 3,840")


def test_chunks_that_are_left_over(files):
    (files / "layer_1.mlp.linear" / "20.0").write_bytes(b"x")
    assert_refused(files, r"holds layer_1.mlp.linear/20.0, .*left over")


def zstd_of_zeros(blocks):
    """A frame of so many blocks of 128 KiB in 4 bytes each."""
    block = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    return bytes.fromhex("28b52ffd0050") + block * (blocks - 1) + bytes([block[0] | 1]) + block[1:]


def test_a_bomb_is_decoded_no_further_than_the_array_goes(files):
    (files / "layer_1.mlp.linear" / "4.0").write_bytes(zstd_of_zeros(100_000))  # 13 GB
    assert_refused(files, "layer_1.mlp.linear in .*End of data expected")


def test_sparse_files_are_not_read(files):
    with (files / "layer_1.mlp.linear" / "4.0").open("wb") as file:
        file.truncate(1 << 40)
    assert_refused(files, "cannot have 1,099,511,627,776 bytes")


TREES = {
    "no tree_metadata": {},
    "not as Orbax writes it": {"a": {"key_metadata": [{"key": 7}], "value_metadata": {}}},
    r"In _METADATA, and not there \(1\): a.b": {
        "a": {
            "key_metadata": [{"key": "a"}, {"key": "b"}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    },
}


@pytest.mark.parametrize("reason", TREES)
def test_damaged_trees(files, reason):
    (files / "_METADATA").write_text(json.dumps({"tree_metadata": TREES[reason]}))
    assert_refused(files, reason)


def test_a_tree_that_lacks_an_array(files):
    tree = json.loads((files / "_METADATA").read_text())
    del tree["tree_metadata"]["('layer_2', 'mlp', 'linear')"]
    (files / "_METADATA").write_text(json.dumps(tree))
    assert_refused(files, r"There, and not in _METADATA \(1\): layer_2.mlp.linear")
    (files / "_METADATA").write_text(" " * (9 << 20))
    assert_refused(files, "too large")


def test_what_is_no_array_in_a_tree_is_left_alone(files, make_opened, assert_same):
    tree = json.loads((files / "_METADATA").read_text())
    for value in ({"value_type": "None"}, {"value_type": "jax.Array", "skip_deserialize": True}):
        tree["tree_metadata"] |= {"x": {"key_metadata": [{"key": "x"}], "value_metadata": value}}
        (files / "_METADATA").write_text(json.dumps(tree))
        assert_same(ORBAX.open(files).weights, make_opened().weights)


# -- links -----------------------------------------------------------------------------------------


def test_links_out_of_the_folder(files, tmp_path):
    chunk = files / "layer_1.mlp.linear" / "4.0"
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    assert_refused(files, "Nothing outside the folder is opened")
    chunk.unlink()
    chunk.symlink_to(chunk)
    assert_refused(files, "leads nowhere")
    chunk.unlink()
    chunk.symlink_to(files / "layer_0.mlp.linear")
    assert_refused(files, "neither a file nor a folder")
    chunk.unlink()
    os.mkfifo(chunk)
    assert_refused(files, "neither a file nor a folder")


def test_links_to_folders(files, tmp_path):
    shutil.move(files / "layer_1.mlp.linear", tmp_path / "elsewhere")
    (files / "layer_1.mlp.linear").symlink_to(tmp_path / "elsewhere")
    assert_refused(files, "Nothing outside the folder is opened")
    (files / "layer_1.mlp.linear").unlink()
    (files / "layer_1.mlp.linear").symlink_to(files)
    assert_refused(files, "neither a file nor a folder")


@pytest.mark.parametrize("kind", ["files, zarr 2", "database, zarr 2"])
def test_links_into_a_cache_are_read(make_opened, kind, tmp_path, assert_same):
    cache = tmp_path / "models--google--gemma-2b-flax"
    folder = cache / "snapshots" / "0123abcd" / "2b"
    folder.parent.mkdir(parents=True)
    (cache / "blobs").mkdir()
    by_tensorstore(make_opened(), folder, **KINDS[kind])
    for number, path in enumerate([p for p in folder.rglob("*") if p.is_file()]):
        path.rename(cache / "blobs" / str(number))
        path.symlink_to(os.path.relpath(cache / "blobs" / str(number), path.parent))
    assert_same(ORBAX.open(folder.parent).weights, make_opened().weights)


def test_too_many_files_are_refused(files, monkeypatch):
    count = len(file_listing.list_files(files))
    monkeypatch.setattr(file_listing, "_MOST_FILES", count + 20)
    for number in range(30):
        (files / f"{number}").touch()
    assert_refused(files, f"more than {count + 20} files")


def test_folders_too_deep_are_refused(files):
    (files / "/".join("x" * 40)).mkdir(parents=True)
    assert_refused(files, "neither a file nor a folder within reach")


# -- databases -------------------------------------------------------------------------------------


def test_damaged_databases(database):
    manifest = database / "manifest.ocdbt"
    content = manifest.read_bytes()
    for damaged in (b"", content[:-1], content[:20], content[:-1] + b"\0", b"\0" * 200):
        manifest.write_bytes(damaged)
        assert_refused(database, "manifest.ocdbt cannot be used as a database")
    manifest.write_bytes(content)
    (data,) = [path for path in (database / "d").iterdir() if path.stat().st_size > 10_000]
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    assert_refused(database, "manifest.ocdbt cannot be (used|read)|in .*manifest.ocdbt cannot be")
    data.unlink()
    assert_refused(database, "manifest.ocdbt cannot be used")


def test_values_that_are_cut_short_are_found_when_it_is_opened(make_opened, tmp_path):
    inline = {"max_inline_value_bytes": 1024}  # what describes the arrays, and the small ones
    folder = by_tensorstore(make_opened(), tmp_path / "orbax", database=inline)
    node = max((folder / "d").iterdir(), key=lambda path: path.stat().st_size)
    # The values in one file and the tree in another, as Orbax has them after it merged processes.
    merged = folder / "ocdbt.process_0"
    merged.mkdir()
    shutil.move(folder / "d", merged)
    shutil.move(folder / "manifest.ocdbt", merged)
    context = tensorstore.Context()

    def store(path):
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
        return tensorstore.KvStore.open(spec, context=context).result()

    transaction = tensorstore.Transaction(atomic=True)
    store(merged).experimental_copy_range_to(store(folder).with_transaction(transaction)).result()
    transaction.commit_sync()
    read_all(folder)
    values = merged / "d" / node.name
    values.write_bytes(values.read_bytes()[:5000])
    with pytest.raises(
        CheckpointError, match=r"0 in .*manifest.ocdbt cannot be read.*Requested byte"
    ):
        ORBAX.open(folder)


def forged(folder, change):
    """Change the node of a database's tree, keeping its length, and make its checksum fit."""
    (data,) = [path for path in (folder / "d").iterdir() if path.stat().st_size > 1000]
    content = data.read_bytes()
    start, length = SCRIPT["node_in"](content)
    node = change(content[start : start + length])
    assert len(node) == length
    node = node[:-4] + SCRIPT["crc32c"](node[:-4]).to_bytes(4, "little")
    data.write_bytes(content[:start] + node + content[start + length :])
    return data


@pytest.mark.parametrize("target", ["../", "//x", "/tm"])
def test_a_database_does_not_leave_its_folder(make_opened, target, tmp_path):
    plain = {"compression": None, "max_inline_value_bytes": 1}
    folder = by_tensorstore(make_opened(), tmp_path / "in", database=plain)
    read_all(folder)
    # What is in d/ABC is then said to be in ../ABC..., which is there.
    old = next((folder / "d").iterdir()).name
    path = f"d/{old}".encode()
    new = (target.encode() + old.encode())[: len(path)]
    data = forged(folder, lambda node: node.replace(path, new))
    shutil.copy(data, tmp_path / new[3:].decode())
    with pytest.raises(CheckpointError, match=r"manifest.ocdbt cannot be"):
        read_all(folder)


def number_bytes(number):
    low = [number >> 7 * k & 127 for k in range((max(number.bit_length(), 1) + 6) // 7)]
    return bytes([*(part | 128 for part in low[:-1]), low[-1]])


@pytest.mark.parametrize("count", [5000, 1_000_000])
def test_a_tree_that_claims_long_keys_takes_no_memory(tmp_path, count):
    """Each of many keys is said to have 65,000 bytes in common with the one before."""
    folder = tmp_path / "orbax"
    base = {"driver": "file", "path": f"{folder}/"}
    config = {"compression": None, "max_inline_value_bytes": 1}
    spec = {"driver": "ocdbt", "base": base, "config": config}
    tensorstore.KvStore.open(spec).result().write("x", b"hello").result()
    (data,) = (folder / "d").iterdir()
    length = data.stat().st_size - 5  # of the node, behind the value
    long = number_bytes(65_000)
    keys = b"a" * 65_000 + b"".join(i.to_bytes(4, "big") for i in range(count - 1)) + b"b"
    suffixes = number_bytes(65_004) + b"\4" * (count - 2) + b"\1"
    body = b"\0\0" + number_bytes(count) + long * (count - 2) + b"\0" + suffixes + keys
    node = b"\x0c\xdb\x20\xde" + bytes(8) + b"\0\0" + body + bytes(2 * count) + bytes(4)
    node = node[:4] + len(node).to_bytes(8, "little") + node[12:]
    data.write_bytes(b"hello" + node)  # its checksum is looked at last
    manifest = (folder / "manifest.ocdbt").read_bytes()
    at = manifest.index(bytes([length]), manifest.index(b"d/") + 34)
    manifest = manifest[:at] + number_bytes(len(node)) + manifest[at + 1 : -4]
    manifest = manifest[:4] + (len(manifest) + 4).to_bytes(8, "little") + manifest[12:]
    checksum = SCRIPT["crc32c"](manifest).to_bytes(4, "little")
    (folder / "manifest.ocdbt").write_bytes(manifest + checksum)
    start = os.times()
    with pytest.raises(CheckpointError, match=r"(cannot be listed in 512 MB|checksum|keys)"):
        ORBAX.open(folder)
    used = os.times()
    assert used.children_user - start.children_user < 2


def test_a_short_fuzz():
    command = [sys.executable, str(FUZZ), "--runs", "400"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
