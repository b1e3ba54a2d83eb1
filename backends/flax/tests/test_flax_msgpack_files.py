"""flax.serialization reads what the core writes, and the core what it writes, bit for bit."""

import dataclasses
import json
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from gemma_hub import GemmaConfig
from gemma_hub.checkpoints.formats import msgpack_file
from gemma_hub.checkpoints.formats.flax_msgpack import FlaxMsgpack
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

FORMAT = FlaxMsgpack()
# Rows enough that some shapes need one, and some more bytes, in the file.
CONFIG = GemmaConfig(
    vocab_size=300,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    tie_word_embeddings=False,
)


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def opened(request, tmp_path):
    draw = np.random.default_rng(11).normal
    arrays = {
        name: draw(size=shape).astype(DTYPES[request.param])
        for name, shape in parameter_shapes(CONFIG).items()
    }
    config = dataclasses.replace(CONFIG, dtype=request.param)
    return Opened(path=tmp_path, config=config, task="causal_lm", weights=ArrayWeights(arrays))


@pytest.fixture(params=[2**30, 700], ids=["whole", "chunked"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(msgpack_file, "MAX_CHUNK_BYTES", request.param)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", request.param)


def tree_of(opened):
    weights = FORMAT.tensors(opened, WriteOptions())
    return unflatten_dict({n: weights.read(n) for n in weights.names()}, sep="/")


def written(opened, folder: Path, size: int | None = None) -> Path:
    folder.mkdir()
    FORMAT.write(folder, opened, WriteOptions(max_shard_bytes=size))
    return folder


def assert_same_trees(one, other):
    one, other = flatten_dict(one, sep="/"), flatten_dict(other, sep="/")
    assert set(one) == set(other)
    for name in other:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name


@pytest.mark.usefixtures("chunks")
def test_flax_reads_what_we_write(opened, tmp_path):
    content = (written(opened, tmp_path / "x") / "flax_model.msgpack").read_bytes()
    expected = tree_of(opened)
    assert_same_trees(flax.serialization.msgpack_restore(content), expected)
    target = jax.tree_util.tree_map(jnp.zeros_like, expected)
    assert_same_trees(flax.serialization.from_bytes(target, content), expected)


@pytest.mark.usefixtures("chunks")
def test_we_write_the_very_bytes_of_flax(opened, tmp_path):
    content = (written(opened, tmp_path / "x") / "flax_model.msgpack").read_bytes()
    assert content == flax.serialization.to_bytes(tree_of(opened))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("is_on_device", [False, True])
def test_we_read_what_flax_writes(opened, tmp_path, is_on_device):
    tree = tree_of(opened)
    tree = jax.tree_util.tree_map(jnp.asarray, tree) if is_on_device else tree
    (tmp_path / "config.json").write_text(json.dumps(opened.config.to_dict()))
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    again = FORMAT.open(tmp_path)
    assert again.config == opened.config
    for name in opened.weights.names():
        found, expected = again.weights.read(name), opened.weights.read(name)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes(), name


@pytest.mark.usefixtures("chunks")
def test_shards_are_put_together_as_transformers_does(opened, tmp_path):
    # transformers 4.57, load_flax_sharded_weights: each restored, flattened, joined, unflattened.
    folder = written(opened, tmp_path / "x", 4000)
    index = json.loads((folder / "flax_model.msgpack.index.json").read_text())
    state = {}
    for shard in sorted(set(index["weight_map"].values())):
        restored = flax.serialization.msgpack_restore((folder / shard).read_bytes())
        flat = flatten_dict(restored, sep="/")
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(flat)
        state |= flat
    assert_same_trees(unflatten_dict(state, sep="/"), tree_of(opened))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in state.values())


def test_scalars_and_small_arrays(tmp_path):
    # The shortest headers that msgpack has, and types that parameters are seldom of.
    tree = {
        f"{dtype}-{size}": np.arange(size).astype(kind)
        for dtype, kind in DTYPES.items()
        for size in (0, 1, 2, 3, 31, 32, 130, 40_000)
    }
    tree |= {"scalar": np.float32(3.5), "axes": np.zeros((1, 2, 0, 3), np.float16)}
    path = tmp_path / "x.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    file = msgpack_file.MsgpackFile(path)
    for name, array in tree.items():
        assert file.read(name).dtype == array.dtype
        assert file.read(name).shape == array.shape
        assert file.read(name).tobytes() == array.tobytes(), name
    weights = ArrayWeights({name: np.asarray(array) for name, array in tree.items()})
    with (tmp_path / "y.msgpack").open("wb") as out:
        list(msgpack_file.write_msgpack(out, weights, list(tree)))
    restored = flax.serialization.msgpack_restore((tmp_path / "y.msgpack").read_bytes())
    assert_same_trees(restored, {name: np.asarray(array) for name, array in tree.items()})


def test_arrays_are_chunked_from_the_same_size_on():
    assert flax.serialization.MAX_CHUNK_SIZE == msgpack_file.MAX_CHUNK_BYTES
