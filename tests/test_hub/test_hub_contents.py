"""Repositories that are refused for what they hold, before their weights are fetched."""

import json

import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from gemma_hub.source import resolved
from gemma_hub.tokenizers import GemmaTokenizer

NAME = "google/gemma-test"
INDEX = "model.safetensors.index.json"


def refused(hub, files, text=NAME, error=CheckpointNotFoundError, **about):
    """The message about a repository whose weights are not asked for."""
    hub.add(NAME, files, **about)
    hub.forget()
    with pytest.raises(error) as caught:
        resolved(text)
    assert not [name for name in hub.fetched if not name.endswith("json")]
    return str(caught.value)


def test_gguf_only(hub):
    message = refused(hub, {"README.md": b"", "b.gguf": b"GGUF", "a.gguf": b"GGUF"})
    assert "no model.safetensors" in message
    assert "a.gguf, b.gguf. Name one of them, as in 'google/gemma-test:a.gguf'" in message
    assert hub.fetched == []


@pytest.mark.parametrize(
    "files",
    [
        ("config.json", "model.weights.h5", "metadata.json", "assets/tokenizer/vocabulary.spm"),
        ("config.json", "flax_model.msgpack", "tokenizer.model"),
        ("2b/_METADATA", "2b/layer_0.attn.w/.zarray", "tokenizer.model"),
        ("README.md", "adapter_model.safetensors", "adapter_config.json"),
    ],
)
def test_other_formats_are_named_and_left_alone(hub, files):
    message = refused(hub, dict.fromkeys(files, b"{}"))
    assert "no model.safetensors; it holds " in message
    assert all(name in message for name in files)
    assert "hf download google/gemma-test --local-dir gemma-test" in message
    assert hub.fetched == []


def test_an_empty_repository(hub):
    assert "it is empty" in refused(hub, {})


def test_no_config(hub, single):
    files = {name: content for name, content in single.items() if name != "config.json"}
    assert "has weights and no config.json" in refused(hub, files)


def test_no_tokenizer_and_no_config(hub):
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(CheckpointNotFoundError, match=r"no tokenizer.model or tokenizer.json; it"):
        GemmaTokenizer.from_pretrained(NAME)
    hub.add(NAME, {"model.safetensors": b""})
    with pytest.raises(CheckpointNotFoundError, match=r"has no config.json; it holds"):
        GemmaConfig.from_pretrained(NAME)
    assert hub.fetched == []


def test_no_such_file(hub):
    message = refused(hub, {"a.gguf": b"GGUF"}, f"{NAME}:b.gguf")
    assert "no file 'b.gguf'; it holds a.gguf" in message


def test_shards_without_an_index(hub, shards):
    files = {name: content for name, content in shards.items() if name != INDEX}
    assert f"and no {INDEX}" in refused(hub, files)


def test_another_kind_of_model_is_refused_before_its_weights(hub, single):
    config = json.dumps({"model_type": "mistral"}).encode()
    message = refused(hub, single | {"config.json": config}, error=ConfigError)
    assert "model_type is 'mistral'" in message


@pytest.mark.parametrize(
    "place",
    [
        *("../model.safetensors", "/etc/model.safetensors", "a/model.safetensors"),
        *("..\\model.safetensors", "C:model.safetensors", "a\0.safetensors"),
        *("../../../../../../etc/passwd", "..", "", "pytorch_model.bin", "config.json"),
        *(3, None, ["x"]),
    ],
)
def test_an_index_that_names_what_is_elsewhere(hub, shards, place):
    index = json.loads(shards[INDEX])
    index["weight_map"]["model.norm.weight"] = place
    files = {**shards, INDEX: json.dumps(index).encode()}
    # The list of files has it too, so that it is refused for what it is.
    listing = {"siblings": [{"rfilename": name} for name in [*files, place] if type(name) is str]}
    message = refused(hub, files, error=CheckpointError, listing=listing)
    assert INDEX in message
    assert "No weights were fetched" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "malformed"),
        (b"{", "malformed"),
        (b"[]", "malformed"),
        (b"{}", "malformed"),
        (b'{"weight_map": []}', "malformed"),
        (b'{"weight_map": {}}', "empty"),
        (b"[" * 100_000, "malformed"),
        (b"\xff\xfe", "malformed"),
    ],
)
def test_a_malformed_index(hub, shards, content, words):
    message = refused(hub, {**shards, INDEX: content}, error=CheckpointError)
    assert f"{words} {INDEX}" in message


def test_an_index_of_files_that_are_not_there(hub, shards):
    lacking = "model-00002-of-00002.safetensors"
    files = {name: content for name, content in shards.items() if name != lacking}
    index = json.loads(shards[INDEX])
    index["weight_map"]["model.norm.weight"] = lacking
    files[INDEX] = json.dumps(index).encode()
    message = refused(hub, files, error=CheckpointError)
    assert f"lacks files that its {INDEX} names: {lacking}" in message


def test_a_list_of_files_elsewhere(hub, single):
    """Nothing of it is ever asked for, whatever else is fetched."""
    hostile = ["../config.json", "/etc/passwd", "a/../../b.safetensors", "x\x1b[2J.gguf"]
    listing = {"siblings": [{"rfilename": name} for name in [*hostile, *single]]}
    hub.add(NAME, single, listing=listing)
    resolved(NAME)
    assert hub.fetched == sorted(single)
    message = refused(hub, {}, listing={"siblings": [{"rfilename": name} for name in hostile]})
    assert "\x1b" not in message


@pytest.mark.parametrize("sha", ["../../../../x", "", None, "main", "A" * 40, "0" * 39, 7])
def test_a_commit_that_is_none(hub, single, sha):
    message = refused(hub, single, error=CheckpointError, listing={"sha": sha})
    assert "expected 40 hexadecimal digits" in message
