"""Folders of pytorch_model.bin: there and back bit for bit, heads, indexes. No torch here."""

import dataclasses
import json
import re

import numpy as np
import pytest

from gemma_hub.checkpoints.formats.interface import CheckpointFormat, WriteOptions
from gemma_hub.checkpoints.formats.pytorch_bin import PytorchBin
from gemma_hub.checkpoints.formats.torch_file import TorchFile
from gemma_hub.checkpoints.formats.torch_folder import TORCH_FILES, write_files
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

BIN = PytorchBin()
PLAIN = WriteOptions()
SINGLE, INDEX = TORCH_FILES.single, TORCH_FILES.index
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def written(opened, folder, options=PLAIN, progress=None):
    folder.mkdir()
    BIN.write(folder, opened, options, progress)
    return folder


def arrays_of(opened):
    return {name: opened.weights.read(name) for name in opened.weights.names()}


def for_task(opened, task="causal_lm", **changes):
    """The same model for another task, or with other fields of the config."""
    config = dataclasses.replace(opened.config, **changes)
    arrays, draw = arrays_of(opened), np.random.default_rng(7).normal
    for name, shape in parameter_shapes(config, task).items():
        arrays.setdefault(name, draw(size=shape).astype(np.float32))
    return dataclasses.replace(opened, config=config, task=task, weights=ArrayWeights(arrays))


def with_file(opened, folder, arrays, task=None):
    """A folder whose file holds these arrays, and the config of `opened`."""
    folder.mkdir(exist_ok=True)
    write_files(folder, ArrayWeights(arrays), TORCH_FILES, 1 << 40)
    stated = opened.config.to_dict(task or opened.task)
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def assert_round_trip(opened, folder, assert_same):
    again = BIN.open(folder)
    assert again.config == opened.config
    assert again.task == opened.task
    assert again.dropped == {}
    assert again.notes == ()
    assert_same(again.weights, opened.weights)
    assert again.files["tokenizer.model"].read_bytes() == b"not a real vocabulary"


def test_it_is_a_format(tmp_path):
    assert isinstance(BIN, CheckpointFormat)
    assert not BIN.detect(tmp_path)
    assert not BIN.detect(tmp_path / "nothing")
    assert not BIN.detect(tmp_path / "x\0y")
    (tmp_path / INDEX).touch()
    assert BIN.detect(tmp_path)
    (tmp_path / INDEX).write_text(
        '{"weight_map": {"model.layers.0.self_attn.qkv_proj.weight": ""}}'
    )
    assert not BIN.detect(tmp_path)


def test_there_and_back(any_opened, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "bin")
    assert BIN.detect(folder)
    assert_round_trip(any_opened, folder, assert_same)


TASKS = {
    "base": {},
    "sequence_classification": {"num_labels": 3, "id2label": None},
    "token_classification": {"num_labels": 4, "id2label": None},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True},
    "qk_norm": {"use_qk_norm": True},
}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("size", [None, 3000])
def test_every_model_there_and_back(make_opened, kind, size, tmp_path, assert_same):
    task = kind if kind == "base" or "classification" in kind else "causal_lm"
    opened = for_task(make_opened(), task, **TASKS[kind])
    assert BIN.objections(opened.config, task, PLAIN) == ()
    options = WriteOptions(max_shard_bytes=size)
    assert_round_trip(opened, written(opened, tmp_path / "bin", options), assert_same)


def test_shards(any_opened, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "bin", WriteOptions(max_shard_bytes=6000))
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards[0] == f"pytorch_model-00001-of-{len(shards):05}.bin"
    assert sorted(f.name for f in folder.glob("*.bin")) == shards
    assert set(index["weight_map"]) == set(any_opened.weights.names())
    arrays = arrays_of(any_opened).values()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays)
    assert BIN.detect(folder)
    assert_round_trip(any_opened, folder, assert_same)


def test_what_is_announced_is_written(any_opened, tmp_path):
    weights = BIN.tensors(any_opened, PLAIN)
    done = []
    folder = written(any_opened, tmp_path / "bin", progress=lambda *told: done.append(told))
    file = TorchFile(folder / SINGLE)
    assert list(file.tensors) == list(weights.names())
    for name in weights.names():
        tensor = file.tensors[name]
        assert (tensor.shape, tensor.dtype) == (weights.shape(name), weights.dtype(name))
    total = sum(array.nbytes for array in arrays_of(any_opened).values())
    assert done[-1] == (total, total)
    assert [told[0] for told in done] == sorted(told[0] for told in done)


def test_padded_rows_are_refused(make_opened, tmp_path):
    with pytest.raises(CheckpointError, match="pad_vocab_to is 64"):
        written(make_opened(), tmp_path / "bin", WriteOptions(pad_vocab_to=64))
    assert not list((tmp_path / "bin").iterdir())


# -- heads, buffers, prefixes ----------------------------------------------------------------------


def test_a_tied_head_that_is_stored_all_the_same(make_opened, tmp_path, assert_same):
    opened = make_opened()
    arrays = arrays_of(opened)
    folder = with_file(opened, tmp_path / "bin", {**arrays, HEAD: arrays[EMBEDDING]})
    again = BIN.open(folder)
    assert again.dropped == {HEAD: "a second copy of the embedding, which the head is tied to"}
    assert_same(again.weights, opened.weights)
    changed = arrays[EMBEDDING].copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    for head in (changed, changed[:-1], changed.astype(np.float16)):
        with_file(opened, folder, {**arrays, HEAD: head})
        with pytest.raises(CheckpointError, match=r"lm_head.weight is not equal.*set tie_word"):
            BIN.open(folder)


def test_a_tied_embedding_may_be_stored_as_the_head_only(make_opened, tmp_path, assert_same):
    opened = make_opened()
    arrays = arrays_of(opened)
    arrays[HEAD] = arrays.pop(EMBEDDING)
    for task in ("causal_lm", "base"):
        again = BIN.open(with_file(opened, tmp_path / "bin", arrays, task))
        assert again.dropped == {}
        assert_same(again.weights, opened.weights)


def test_heads_of_other_tasks_are_left_alone(make_opened, tmp_path, assert_same):
    opened = make_opened()
    arrays = arrays_of(opened)
    more = {HEAD: arrays[EMBEDDING] * 2, "score.weight": np.zeros((2, 24), np.float32)}
    folder = with_file(opened, tmp_path / "bin", arrays | more, "base")
    again = BIN.open(folder)
    assert again.task == "base"
    assert set(again.dropped) == set(more)
    assert_same(again.weights, opened.weights)


def test_constants_of_older_versions_are_left_alone(make_opened, tmp_path, assert_same):
    opened = make_opened()
    constant = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    again = BIN.open(with_file(opened, tmp_path / "bin", arrays_of(opened) | constant))
    assert again.dropped == dict.fromkeys(constant, "a constant that follows from the config")
    assert_same(again.weights, opened.weights)


def test_the_names_of_a_base_model_alone(make_opened, tmp_path, assert_same):
    opened = for_task(make_opened(), "base")
    bare = {name.removeprefix("model."): array for name, array in arrays_of(opened).items()}
    again = BIN.open(with_file(opened, tmp_path / "bin", bare))
    assert_same(again.weights, opened.weights)
    mixed = bare | {"model.norm.weight": bare["norm.weight"]}
    with_file(opened, tmp_path / "bin", mixed)
    with pytest.raises(CheckpointError, match=r"Unexpected .*norm.weight"):
        BIN.open(tmp_path / "bin")


def test_a_config_is_needed_and_may_be_given(make_opened, tmp_path, assert_same):
    models = {
        "causal_lm": make_opened(),
        "base": for_task(make_opened(), "base"),
        "sequence_classification": for_task(make_opened(), "sequence_classification"),
        "token_classification": for_task(make_opened(), "token_classification"),
    }
    for task, opened in models.items():
        arrays = {
            name.removeprefix("model.") if task == "base" else name: array
            for name, array in arrays_of(opened).items()
        }
        folder = with_file(opened, tmp_path / task, arrays)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"no config\.json.*pass the model's"):
            BIN.open(folder)
        again = BIN.open(folder, opened.config)
        assert again.task == task
        assert_same(again.weights, opened.weights)


# -- what does not fit -----------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named(make_opened, tmp_path):
    opened = make_opened()
    arrays = arrays_of(opened)
    folder = with_file(for_task(opened, intermediate_size=48), tmp_path / "bin", arrays)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is \(40, 24\), expected \(48, 24"):
        BIN.open(folder)
    del arrays["model.norm.weight"]
    with_file(opened, folder, arrays | {"model.extra": np.zeros(2)})
    with pytest.raises(CheckpointError, match=r"Missing .1.: model.norm(?s:.)*1.: model.extra"):
        BIN.open(folder)


def test_a_config_of_far_more_layers_is_refused_in_time(make_opened, tmp_path):
    opened = make_opened()
    deep = dataclasses.replace(opened.config, num_hidden_layers=10_000)
    folder = with_file(dataclasses.replace(opened, config=deep), tmp_path / "b", arrays_of(opened))
    with pytest.raises(CheckpointError, match="29 tensors, and a model of 10,000 layers"):
        BIN.open(folder)


@pytest.fixture
def sharded(make_opened, tmp_path):
    return written(make_opened(), tmp_path / "bin", WriteOptions(max_shard_bytes=6000))


NORM = "model.norm.weight"
INDEXES = {
    "plain name": lambda places: places.update({NORM: f"../{SINGLE}"}),
    r"expected the plain name of a \*.bin": lambda places: places.update({NORM: "/x.bin"}),
    r"that model.norm.weight is in 7": lambda places: places.update({NORM: 7}),
    "in 'x.ckpt'": lambda places: places.update({NORM: "x.ckpt"}),
    r"Missing \(1\): x.bin": lambda places: places.update({NORM: "x.bin"}),
    r"Missing \(1\): loop.bin": lambda places: places.update({NORM: "loop.bin"}),
    r"In no file \(1\): model.x": lambda places: places.update({"model.x": places[NORM]}),
    r"Not in the index \(1\): model.norm": lambda places: places.pop(NORM),
    r"In another file \(1\): model.norm": lambda places: places.update({NORM: places[EMBEDDING]}),
    "no weight_map": lambda places: places.clear(),
}


@pytest.mark.parametrize("reason", INDEXES)
def test_wrong_indexes(sharded, reason):
    (sharded / "loop.bin").symlink_to("loop.bin")
    index = json.loads((sharded / INDEX).read_text())
    INDEXES[reason](index["weight_map"])
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=reason):
        BIN.open(sharded)


def test_a_tensor_in_two_files(sharded, make_opened):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra"] = "more.bin"
    (sharded / INDEX).write_text(json.dumps(index))
    norm = make_opened().weights.read(NORM)
    write_files(sharded, ArrayWeights({NORM: norm, "model.extra": norm}), TORCH_FILES, 1 << 40)
    (sharded / SINGLE).rename(sharded / "more.bin")
    with pytest.raises(CheckpointError, match=r"In more than one file \(1\): model.norm.*more.bin"):
        BIN.open(sharded)


def test_a_shard_is_missing_or_left_over(sharded):
    shard = sorted(sharded.glob("pytorch_model-*.bin"))[0]
    content = shard.read_bytes()
    (sharded / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not in the index \(1\): pytorch_model.bin"):
        BIN.open(sharded)
    (sharded / SINGLE).unlink()
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"Missing \(1\): {shard.name}"):
        BIN.open(sharded)
    shard.write_bytes(content)
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"and no {re.escape(INDEX)}"):
        BIN.open(sharded)


def test_links_into_a_cache_are_read(make_opened, sharded, assert_same):
    for file in list(sharded.glob("*.bin")):
        blob = sharded.parent / f"blob-{file.name}"
        file.rename(blob)
        file.symlink_to(blob)
    assert_same(BIN.open(sharded).weights, make_opened().weights)


def test_an_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"empty folder; expected pytorch_model\.bin"):
        BIN.open(tmp_path)
    (tmp_path / "optimizer.bin").touch()
    with pytest.raises(CheckpointError, match=r"holds optimizer.bin; expected pytorch_model.bin"):
        BIN.open(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint folder"):
        BIN.open(tmp_path / "nothing")
