"""The ordinary folder as a format: what it opens, what it leaves out, the files that it writes."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.checkpoints.formats.huggingface import HuggingFace
from gemma_hub.checkpoints.formats.interface import CheckpointFormat, WriteOptions
from gemma_hub.config import ARCHITECTURES
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

FUZZ = Path(__file__).with_name("fuzz_safetensors.py")
FORMAT = HuggingFace()
PLAIN = WriteOptions()
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def for_task(opened, task, **changes):
    config = dataclasses.replace(opened.config, **changes)
    draw = np.random.default_rng(9).normal
    arrays = {n: draw(size=s).astype("float32") for n, s in parameter_shapes(config, task).items()}
    weights = ArrayWeights(arrays)
    return dataclasses.replace(opened, config=config, task=task, weights=weights)


def written(opened, folder, options=PLAIN, progress=None):
    folder.mkdir()
    FORMAT.write(folder, opened, options, progress)
    return folder


def add(folder, **arrays):
    """Store more tensors in the single file, under names whose "__" stands for a dot."""
    stored = load_file(folder / SINGLE)
    stored |= {name.replace("__", "."): array for name, array in arrays.items()}
    (folder / SINGLE).unlink()
    save_file(stored, folder / SINGLE)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_it_is_a_format(tmp_path):
    assert isinstance(FORMAT, CheckpointFormat)
    assert not FORMAT.detect(tmp_path)
    assert not FORMAT.detect(tmp_path / "nothing")
    for name in (SINGLE, INDEX):
        (tmp_path / name).touch()
        assert FORMAT.detect(tmp_path)
        assert not FORMAT.detect(tmp_path / name)
        (tmp_path / name).unlink()


def test_there_and_back(any_opened, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "x")
    assert FORMAT.detect(folder)
    again = FORMAT.open(folder)
    assert (again.config, again.task) == (any_opened.config, "causal_lm")
    assert (again.dropped, again.notes) == ({}, ())
    assert_same(again.weights, any_opened.weights)
    assert set(again.files) == {"tokenizer.model", "generation_config.json"}
    assert_same(FORMAT.tensors(any_opened, PLAIN), any_opened.weights)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("size", [None, 4000])
@pytest.mark.parametrize("task", ARCHITECTURES)
def test_every_task_there_and_back(make_opened, task, size, is_tied, tmp_path, assert_same):
    opened = for_task(make_opened(), task, tie_word_embeddings=is_tied)
    folder = written(opened, tmp_path / "x", WriteOptions(max_shard_bytes=size))
    assert (folder / INDEX).exists() == (size is not None)
    assert FORMAT.detect(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a new head would be one
        again = FORMAT.open(folder)
    assert (again.config, again.task, again.dropped) == (opened.config, task, {})
    assert_same(again.weights, opened.weights)


@pytest.mark.parametrize("size", [None, 4000])
@pytest.mark.parametrize("task", ARCHITECTURES)
def test_the_files_are_those_of_save_checkpoint(make_opened, task, size, tmp_path):
    opened = for_task(make_opened(), task)
    told, expected = [], []
    folder = written(
        opened, tmp_path / "x", WriteOptions(max_shard_bytes=size), lambda *now: told.append(now)
    )
    save_checkpoint(
        tmp_path / "y",
        opened.config,
        opened.weights,
        task=task,
        files=list(opened.files.values()),
        progress=lambda *now: expected.append(now),
        **({} if size is None else {"max_shard_bytes": size}),
    )
    assert contents(folder) == contents(tmp_path / "y")
    assert told == expected


def test_files_go_by_the_names_that_they_shall_have(make_opened, tmp_path):
    opened = make_opened()
    source = tmp_path / "vocabulary.spm"
    source.write_bytes(b"pieces")
    generation = tmp_path / "other.json"
    generation.write_text(json.dumps({"eos_token_id": [1, 7]}))
    files = {"tokenizer.model": source, "generation_config.json": generation}
    folder = written(dataclasses.replace(opened, files=files), tmp_path / "x")
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    assert open_checkpoint(folder).eos_token_ids == (1, 7)


# -- what is left out ------------------------------------------------------------------------------


def test_a_second_copy_and_constants_are_dropped(make_opened, tmp_path, assert_same):
    opened = make_opened()
    folder = written(opened, tmp_path / "x")
    embedding = opened.weights.read("model.embed_tokens.weight")
    constants = {"model__layers__0__self_attn__rotary_emb__inv_freq": np.ones(3, np.float32)}
    add(folder, lm_head__weight=embedding, **constants)
    again = FORMAT.open(folder)
    assert again.dropped == {
        "lm_head.weight": "a second copy of the embedding, which the head is tied to",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "a constant that follows from the config",
    }
    assert_same(again.weights, opened.weights)


def test_the_only_copy_is_not_dropped(make_opened, tmp_path, assert_same):
    opened = make_opened()
    folder = written(opened, tmp_path / "x")
    stored = load_file(folder / SINGLE)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    (folder / SINGLE).unlink()
    save_file(stored, folder / SINGLE)
    again = FORMAT.open(folder)
    assert again.dropped == {}
    assert_same(again.weights, opened.weights)


@pytest.mark.parametrize("task", ARCHITECTURES)
def test_heads_of_other_tasks_are_dropped(make_opened, task, tmp_path, assert_same):
    opened = for_task(make_opened(), task)
    folder = written(opened, tmp_path / "x")
    if task in ("base", "causal_lm"):
        add(folder, score__weight=np.ones((2, 24), np.float32))
        expected = {"score.weight": "the head of a classifier, which the task"}
    else:
        add(folder, lm_head__weight=np.ones((50, 24), np.float32))
        expected = {"lm_head.weight": "the head of a causal language model, which the task"}
    again = FORMAT.open(folder)
    assert list(again.dropped) == list(expected)
    assert all(again.dropped[name].startswith(reason) for name, reason in expected.items())
    assert_same(again.weights, opened.weights)


def test_names_without_their_prefix_are_parameters(make_opened, tmp_path, assert_same):
    opened = for_task(make_opened(), "base")
    folder = written(opened, tmp_path / "x")
    stored = {name.removeprefix("model."): v for name, v in load_file(folder / SINGLE).items()}
    (folder / SINGLE).unlink()
    save_file(stored, folder / SINGLE)
    add(folder, layers__0__self_attn__rotary_emb__inv_freq=np.ones(3, np.float32))
    again = FORMAT.open(folder)
    assert list(again.dropped) == ["layers.0.self_attn.rotary_emb.inv_freq"]
    assert_same(again.weights, opened.weights)


# -- what is refused -------------------------------------------------------------------------------


def test_another_config_is_refused(make_opened, tmp_path, assert_same):
    opened = make_opened()
    folder = written(opened, tmp_path / "x")
    assert_same(FORMAT.open(folder, opened.config).weights, opened.weights)
    other = dataclasses.replace(opened.config, rope_theta=5e5)
    with pytest.raises(CheckpointError, match=r"config\.json is the config.*edit the file"):
        FORMAT.open(folder, other)


def test_without_a_config_nothing_is_opened(make_opened, tmp_path):
    folder = written(make_opened(), tmp_path / "x")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json"):
        FORMAT.open(folder)


def test_there_are_no_padded_rows(make_opened, tmp_path):
    opened = make_opened()
    assert FORMAT.objections(opened.config, "causal_lm", PLAIN) == ()
    with pytest.raises(CheckpointError, match=r"50 entries.*pad_vocab_to is 64"):
        written(opened, tmp_path / "x", WriteOptions(pad_vocab_to=64))
    assert not list((tmp_path / "x").iterdir())


def test_pipes_are_not_waited_for(make_opened, tmp_path):
    folder = written(make_opened(), tmp_path / "x")
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)
    assert not FORMAT.detect(folder)
    with pytest.raises(CheckpointError, match="is not a file"):
        FORMAT.open(folder)


def test_a_short_fuzz():
    command = [sys.executable, str(FUZZ), "--runs", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "index: bytes" in done.stdout
