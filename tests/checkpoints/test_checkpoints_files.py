"""A wrong index, a damaged file, and a folder that is no checkpoint are errors by name."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_hub.checkpoints import describe_checkpoint, open_checkpoint
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError

EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3))


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def move_in_index(folder: Path, **moves: str) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(moves))


# -- index -----------------------------------------------------------------------------------------


def test_missing_shard(sharded):
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=rf"Missing \(1\): {SECOND}"):
        open_checkpoint(sharded)


def test_shard_that_is_a_dangling_link(sharded):
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=rf"Missing \(1\): {SECOND}"):
        open_checkpoint(sharded)


def test_shard_that_the_index_does_not_name(sharded, arrays):
    save_file({"model.norm.weight": arrays["model.norm.weight"]}, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not in the index \(1\): model\.safetensors"):
        open_checkpoint(sharded)


def test_other_safetensors_files_do_not_matter(sharded, arrays):
    save_file({"lora_A": np.ones(3)}, sharded / "adapter_model.safetensors")
    assert set(open_checkpoint(sharded).weights.names()) == set(arrays)


def test_tensor_in_another_shard_than_the_index_says(sharded):
    move_in_index(sharded, **{EMBEDDING: THIRD})
    with pytest.raises(
        CheckpointError, match=rf"In another file \(1\): {EMBEDDING} \(in {FIRST}, not"
    ):
        open_checkpoint(sharded)


def test_index_with_a_tensor_that_no_shard_has(sharded):
    move_in_index(sharded, ghost=FIRST)
    with pytest.raises(CheckpointError, match=r"In no file \(1\): ghost"):
        open_checkpoint(sharded)


def test_shard_with_a_tensor_that_the_index_lacks(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(EMBEDDING))
    with pytest.raises(CheckpointError, match=rf"Not in the index \(1\): {EMBEDDING}"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded, arrays):
    part = {name: arrays[name] for name in ("model.norm.weight", EMBEDDING)}
    save_file(part, sharded / THIRD)
    with pytest.raises(
        CheckpointError, match=rf"more than one file \(1\): {EMBEDDING} \({FIRST}, {THIRD}"
    ):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "C:x.safetensors",
     "a\\b.safetensors", "model.bin", "", "a\0.safetensors", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_index_that_leaves_the_folder(sharded, file):
    outside = sharded.parent / "model.safetensors"
    (sharded / FIRST).rename(outside)
    move_in_index(sharded, **{EMBEDDING: file})
    with pytest.raises(CheckpointError, match="expected the plain name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_index_without_a_map(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "JSON list; expected an object"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a key twice: a"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_index(sharded, content, message):
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_shards_without_an_index(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"holds shards .*{FIRST}.* no {INDEX}"):
        open_checkpoint(sharded)


def test_shards_beside_a_single_file_without_an_index(sharded, arrays):
    (sharded / INDEX).unlink()
    save_file(arrays, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors and shards .* left over"):
        open_checkpoint(sharded)


# -- files -----------------------------------------------------------------------------------------


def with_header(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        with_header(b""),
        with_header(b"{"),
        with_header(b"[]"),
        with_header(b"{}", length=2**63),
        with_header(b"{}", length=3),
        with_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', data=b"1234"),
        with_header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', data=b"1234"),
        with_header(b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}', data=b"1234"),
        with_header(b'{"\xff":1}'),
        b"PK\x03\x04 a zip archive, as PyTorch writes",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4945242264\n",
    ],
)
def test_file_that_is_not_safetensors(write, arrays, content):
    folder = write(arrays)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"0"])
def test_file_of_another_length_than_its_header_says(write, arrays, change):
    file = write(arrays) / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match="not fully covered"):
        open_checkpoint(file.parent)


def test_tensor_twice_in_one_header(write, arrays):
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    folder = write(arrays)
    content = with_header(b"{" + entry + b"," + entry + b"}", data=b"1234")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"header of .* gives a key twice: a"):
        open_checkpoint(folder)


def test_weights_that_are_a_folder(write, arrays):
    folder = write(arrays)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        open_checkpoint(folder)


# -- folder ----------------------------------------------------------------------------------------


def test_path_that_does_not_exist(write, arrays):
    folder = write(arrays, name="gemma-2b")
    with pytest.raises(
        CheckpointNotFoundError, match=r"no checkpoint folder.*Did you mean '.*gemma-2b'"
    ):
        open_checkpoint(folder.with_name("gema-2b"))
    with pytest.raises(FileNotFoundError, match="does not exist either"):
        open_checkpoint(folder / "nothing" / "here")


def test_path_that_is_a_file(write, arrays):
    folder = write(arrays)
    with pytest.raises(CheckpointError, match=f"is a file;.*Pass the folder, {folder}"):
        open_checkpoint(folder / "model.safetensors")


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="is an empty folder; expected model"):
        open_checkpoint(tmp_path)


def test_folder_without_weights(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(CheckpointNotFoundError, match="holds no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "source"),
    [("pytorch_model.bin", "PyTorch", ""), ("gemma-2b.ckpt", "PyTorch", "/gemma-2b.ckpt"),
     ("gemma.gguf", "GGUF", "/gemma.gguf"), ("flax_model.msgpack", "Flax", ""),
     ("model.weights.h5", "Keras", ""), ("manifest.ocdbt", "Orbax", "")],
)  # fmt: skip
def test_folder_in_another_format(tmp_path, name, kind, source):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(
        CheckpointError,
        match=f"holds {name}, .* another format: {kind}.*gemma-hub convert {tmp_path}{source} OUT",
    ):
        open_checkpoint(tmp_path)
    assert "gemma-hub convert" in describe_checkpoint(tmp_path).problems[0]


@pytest.mark.parametrize("name", ["gemma.gguf", "gemma.ckpt"])
def test_file_in_another_format(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=f"{name} is a .*gemma-hub convert {path} OUT"):
        open_checkpoint(path)


def test_an_index_that_names_what_no_file_can_be_called(sharded):
    path = sharded / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = f"{'m' * 5000}.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"Missing \(1\): m"):
        open_checkpoint(sharded)


def test_weights_of_another_name(tmp_path):
    (tmp_path / "gemma.safetensors").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"holds gemma\.safetensors; .*Rename"):
        open_checkpoint(tmp_path)


def test_folder_without_a_config(write, arrays):
    folder = write(arrays)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json at"):
        open_checkpoint(folder)
