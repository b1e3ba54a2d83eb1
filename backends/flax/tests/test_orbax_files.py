"""orbax-checkpoint restores what the core writes, and the core reads what it saves, bit for bit."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from gemma_hub import GemmaConfig
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.checkpoints.formats.orbax import Orbax
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

FORMAT = Orbax()
CONFIG = GemmaConfig(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
SETTINGS = [(ocdbt, zarr3) for ocdbt in (True, False) for zarr3 in (True, False)]


def make(dtype="bfloat16", **changes):
    config = dataclasses.replace(CONFIG, dtype=dtype, **changes)
    draw = np.random.default_rng(11).normal
    arrays = {
        name: draw(size=shape).astype(DTYPES[dtype])
        for name, shape in parameter_shapes(config).items()
    }
    return Opened(path=Path(), config=config, task="causal_lm", weights=ArrayWeights(arrays))


def tree_of(opened, layout="nested", pad=None):
    """The tree that the layout has, as Google's library builds it: its keys, not ours."""
    weights = FORMAT.tensors(opened, WriteOptions(layout=layout, pad_vocab_to=pad))
    flat = {}
    for name in weights.names():
        keys = name.split("/") if layout == "nested" else name.rsplit("/", 1)
        flat[tuple(keys)] = weights.read(name)
    return unflatten_dict(flat)


def assert_same_trees(found, expected):
    found, expected = flatten_dict(found), flatten_dict(expected)
    assert set(found) == set(expected)
    for keys, array in expected.items():
        assert found[keys].dtype == array.dtype, keys
        assert found[keys].shape == array.shape, keys
        assert np.asarray(found[keys]).tobytes() == array.tobytes(), keys


def assert_read(path, opened, config=None):
    assert FORMAT.detect(path)
    again = FORMAT.open(path, config)
    for name in opened.weights.names():
        found, expected = again.weights.read(name), opened.weights.read(name)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes(), name
    return again


@pytest.fixture(params=FORMAT.layouts)
def layout(request):
    return request.param


# -- Orbax reads what we write ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_orbax_restores_what_we_write(layout, dtype, tmp_path):
    opened = make(dtype)
    (tmp_path / "x").mkdir()
    FORMAT.write(tmp_path / "x", opened, WriteOptions(layout=layout, pad_vocab_to=64))
    expected = tree_of(opened, layout, 64)
    assert_same_trees(ocp.PyTreeCheckpointer().restore(tmp_path / "x"), expected)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same_trees(checkpointer.restore(tmp_path / "x"), expected)
        # Onto a device, as Google's library does.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device), expected
        )
        restored = checkpointer.restore(tmp_path / "x", target)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
        assert_same_trees(restored, expected)
        described = flatten_dict(checkpointer.metadata(tmp_path / "x").item_metadata.tree)
    shapes = {keys: array.shape for keys, array in flatten_dict(expected).items()}
    assert {keys: leaf.shape for keys, leaf in described.items()} == shapes


def test_our_tree_is_described_as_orbax_does(layout, tmp_path):
    opened = make()
    (tmp_path / "ours").mkdir()
    FORMAT.write(tmp_path / "ours", opened, WriteOptions(layout=layout))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    ocp.Checkpointer(handler).save(tmp_path / "theirs", tree_of(opened, layout))
    ours, theirs = (
        json.loads((tmp_path / name / "_METADATA").read_text()) for name in ("ours", "theirs")
    )
    assert ours == theirs
    folders = {
        name: {p.parent.relative_to(tmp_path / name) for p in (tmp_path / name).rglob(".zarray")}
        for name in ("ours", "theirs")
    }
    assert folders["ours"] == folders["theirs"]
    for folder in folders["ours"]:
        one, other = (
            json.loads((tmp_path / name / folder / ".zarray").read_text()) for name in folders
        )
        assert one == other | {"compressor": None}


def test_the_flat_tree_nests_to_the_nested_one():
    # In a flat tree the keys are paths; those of "mlp" have the array a level deeper.
    opened = make()
    nested = {}
    for path, leaves in tree_of(opened, "flat").items():
        (name, array), *_ = leaves.items()
        keys = path.removeprefix("transformer/").split("/")
        nested[(*keys,) if "mlp" in keys else (*keys, name)] = array
    assert_same_trees(unflatten_dict(nested), tree_of(opened))


# -- we read what Orbax writes ---------------------------------------------------------------------


@pytest.mark.parametrize(("ocdbt", "zarr3"), SETTINGS)
@pytest.mark.parametrize("chunk", [None, 500])
def test_we_read_what_orbax_saves(layout, ocdbt, zarr3, chunk, tmp_path):
    opened = make()
    tree = jax.tree.map(jnp.asarray, tree_of(opened, layout))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk), tree)
    ocp.Checkpointer(handler).save(tmp_path / "x", tree, save_args=arguments)
    again = assert_read(tmp_path / "x", opened)
    assert again.config == dataclasses.replace(CONFIG, dtype=None)
    (tmp_path / "x" / "_METADATA").unlink()
    assert_read(tmp_path / "x", opened)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types_and_checkpointers(layout, dtype, tmp_path):
    opened = make(dtype, num_key_value_heads=4)
    tree = tree_of(opened, layout)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", {"params": tree})
    ocp.PyTreeCheckpointer().save(tmp_path / "pytree", tree)
    for name in ("standard", "pytree"):
        assert_read(tmp_path / name, opened)


def test_values_of_zero_are_there(tmp_path):
    opened = make()
    arrays = {name: opened.weights.read(name) * 0 for name in opened.weights.names()}
    zero = dataclasses.replace(opened, weights=ArrayWeights(arrays))
    for number, (ocdbt, zarr3) in enumerate(SETTINGS):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
        ocp.Checkpointer(handler).save(tmp_path / f"{number}", tree_of(zero))
        assert_read(tmp_path / f"{number}", zero)


def test_a_step_of_a_training(tmp_path):
    opened = make()
    state = {
        "params": tree_of(opened),
        "opt_state": {"mu": tree_of(opened), "count": np.int32(7), "empty": {}, "none": None},
        "collections": {},
        "step": 12,
    }
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(3, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    for path in (
        tmp_path / "steps",
        tmp_path / "steps" / "3",
        tmp_path / "steps" / "3" / "default",
    ):
        again = assert_read(path, opened)
        assert "step" in again.dropped
        assert all(name.startswith(("opt_state/", "step")) for name in again.dropped)


_SHARDED = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
tree = dict(np.load(sys.argv[1]))
tree = {name: array.view(jax.numpy.bfloat16) for name, array in tree.items()}

def placed(array):
    axes = [
        name if size % count == 0 else None
        for size, (name, count) in zip(array.shape[-2:], (("x", 4), ("y", 2)))
    ]
    spec = PartitionSpec(*[None] * max(array.ndim - 2, 0), *axes)
    return jax.device_put(array, NamedSharding(mesh, spec))

def nested(tree):
    root = {}
    for name, array in tree.items():
        *parents, last = name.split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = placed(array)
    return root

for number, (ocdbt, zarr3) in enumerate([(1, 1), (1, 0), (0, 1), (0, 0)]):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=bool(ocdbt), use_zarr3=bool(zarr3))
    ocp.Checkpointer(handler).save(f"{sys.argv[2]}/{number}", nested(tree))
"""


def test_what_eight_devices_save(tmp_path):
    opened = make()
    weights = FORMAT.tensors(opened, WriteOptions())
    stored = {name: weights.read(name).view(np.uint16) for name in weights.names()}
    np.savez(tmp_path / "tree.npz", **stored)
    subprocess.run(
        [sys.executable, "-c", _SHARDED, tmp_path / "tree.npz", tmp_path],
        check=True,
        capture_output=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        timeout=300,
    )
    for number in range(4):
        assert_read(tmp_path / f"{number}", opened)
    chunks = [path.name for path in (tmp_path / "3" / "layer_0.mlp.linear").iterdir()]
    assert len(chunks) == 1 + 8


def test_the_folder_of_a_download(tmp_path):
    # As the first releases are on Kaggle and Hugging Face: a flat tree, padded, with no config.
    opened = make()
    tree = jax.tree.map(jnp.asarray, tree_of(opened, "flat", 64))
    ocp.PyTreeCheckpointer().save(tmp_path / "2b", tree)
    (tmp_path / "tokenizer.model").write_bytes(b"Google's")
    again = assert_read(tmp_path, opened, CONFIG)
    assert list(again.dropped) == ["embedder/input_embedding[48:64]"]
    assert again.files == {"tokenizer.model": tmp_path / "tokenizer.model"}


@pytest.mark.parametrize(("ocdbt", "zarr3"), SETTINGS)
def test_files_that_are_gone_are_missed(ocdbt, zarr3, tmp_path):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "x", tree_of(make()))
    names = {"array_metadatas", "_sharding", "_CHECKPOINT_METADATA", "commit_success.txt"}
    # With OCDBT, what processes wrote is merged: their own manifests and trees are not used again.
    files = sorted(p for p in (tmp_path / "x").rglob("*") if p.is_file())
    missed = 0
    for path in files:
        shutil.copytree(tmp_path / "x", tmp_path / "y")
        (tmp_path / "y" / path.relative_to(tmp_path / "x")).unlink()
        try:
            assert_read(tmp_path / "y", make())
        except CheckpointError:
            missed += 1
        else:
            is_used = not names.intersection(path.relative_to(tmp_path / "x").parts)
            assert ocdbt or not is_used or path.name == "_METADATA", path
        shutil.rmtree(tmp_path / "y")
    assert missed >= (3 if ocdbt else 2 * 16)
