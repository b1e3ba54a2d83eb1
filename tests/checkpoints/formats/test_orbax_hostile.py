"""Orbax checkpoints that are damaged or hostile, and where links may lead. No orbax here."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gemma_hub.checkpoints.formats import file_listing
from gemma_hub.checkpoints.formats.interface import WriteOptions
from gemma_hub.checkpoints.formats.orbax import Orbax
from gemma_hub.errors import CheckpointError

tensorstore = pytest.importorskip("tensorstore", reason="the reader of Orbax is not installed")

ORBAX = Orbax()
FUZZ = Path(__file__).with_name("fuzz_orbax.py")
SCRIPT = runpy.run_path(str(FUZZ))
DATABASE, KINDS = SCRIPT["DATABASE"], SCRIPT["KINDS"]


def by_tensorstore(opened, folder, layout="nested", **kind):
    return SCRIPT["written_by_tensorstore"](folder, opened, layout, **kind)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    folder = tmp_path / "orbax"
    folder.mkdir()
    ORBAX.write(folder, make_opened(), WriteOptions())
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
