"""Keras presets: there and back bit for bit, as keras-hub has them, and what is refused.

keras_hub/ beside this file is what keras-hub wrote and computed; record_keras.py made it.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

import gemma_hub
from gemma_hub.checkpoints.formats.hdf5_file import Hdf5File
from gemma_hub.checkpoints.formats.interface import CheckpointFormat, WriteOptions
from gemma_hub.checkpoints.formats.keras import KerasPreset
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

h5py = pytest.importorskip("h5py", reason="presets are written with it")

KERAS = KerasPreset()
PLAIN = WriteOptions()
INDEX = "model.weights.json"
RECORDED = Path(__file__).with_name("keras_hub")
FUZZ = Path(__file__).with_name("fuzz_keras.py")
WIDTHS = {"V": 50, "D": 24, "N": 4, "K": 2, "H": 6, "F": 40}
SIZES = {
    "vocab_size": 48, "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip


def written(opened, folder, options=PLAIN, progress=None):
    folder.mkdir()
    KERAS.write(folder, opened, options, progress)
    return folder


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def tree_of(path):
    """{path: dataset's value} as h5py reads it, opaque pairs of bytes as bfloat16."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            is_marked = item.attrs.get("dtype") == "bfloat16"
            found[name] = item[()].view(DTYPES["bfloat16"]) if is_marked else item[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def assert_round_trip(opened, folder, assert_same):
    again = KERAS.open(folder)
    assert again.config == opened.config
    assert again.task == opened.task
    assert again.dropped == {}
    assert again.notes == ()
    assert_same(again.weights, opened.weights)
    assert again.files["tokenizer.model"].read_bytes() == b"not a real vocabulary"


@pytest.fixture
def preset(make_opened, tmp_path):
    return written(make_opened(), tmp_path / "preset")


def test_it_is_a_format(tmp_path):
    assert isinstance(KERAS, CheckpointFormat)
    assert not KERAS.detect(tmp_path)
    assert not KERAS.detect(tmp_path / "nothing")
    (tmp_path / INDEX).touch()
    assert KERAS.detect(tmp_path)


# -- there and back --------------------------------------------------------------------------------


def test_there_and_back(any_opened, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "preset")
    assert KERAS.detect(folder)
    assert files_of(folder) == [
        "assets/tokenizer/vocabulary.spm", "config.json", "metadata.json", "model.weights.h5",
        "preprocessor.json", "task.json", "tokenizer.json",
    ]  # fmt: skip
    assert_round_trip(any_opened, folder, assert_same)


@pytest.mark.parametrize("size", [1, 6000])
def test_shards(any_opened, size, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "preset", WriteOptions(max_shard_bytes=size))
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model_{i:05}.weights.h5" for i in range(len(shards))]
    assert len(shards) > 1
    assert sorted(f.name for f in folder.glob("*.h5")) == shards
    for group, shard in index["weight_map"].items():
        with h5py.File(folder / shard) as file:
            assert list(file[group]) == ["0"]
    arrays = [any_opened.weights.read(n) for n in any_opened.weights.names()]
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays)
    assert KERAS.detect(folder)
    assert_round_trip(any_opened, folder, assert_same)


def test_a_size_that_fits_makes_one_file(make_opened, tmp_path):
    opened = make_opened()
    size = sum(opened.weights.read(n).nbytes for n in opened.weights.names())
    folder = written(opened, tmp_path / "one", WriteOptions(max_shard_bytes=size))
    assert not (folder / INDEX).exists()
    folder = written(opened, tmp_path / "two", WriteOptions(max_shard_bytes=size - 1))
    assert (folder / INDEX).exists()


def test_other_models_there_and_back(make_opened, tmp_path, assert_same):
    changes = {
        "max_position_embeddings": 32, "eos_token_id": (1, 7), "pad_token_id": 3,
        "query_pre_attn_scalar": 6.0, "dtype": "float64",
    }  # fmt: skip
    opened = make_opened(dtype="float64")
    opened = dataclasses.replace(opened, config=dataclasses.replace(opened.config, **changes))
    for task in ("causal_lm", "base"):
        opened = dataclasses.replace(opened, task=task)
        folder = written(opened, tmp_path / task)
        assert_round_trip(opened, folder, assert_same)
        assert (folder / "task.json").exists() == (task == "causal_lm")
    preprocessor = json.loads((folder / "preprocessor.json").read_text())
    assert preprocessor["config"]["sequence_length"] == 32


def test_several_types_in_one_file(make_opened, tmp_path, assert_same):
    opened = make_opened()
    arrays = {n: opened.weights.read(n) for n in opened.weights.names()}
    types = ["bfloat16", "float32", "float16"]
    arrays = {n: a.astype(types[i % 3]) for i, (n, a) in enumerate(arrays.items())}
    opened = dataclasses.replace(opened, weights=ArrayWeights(arrays))
    folder = written(opened, tmp_path / "preset")
    assert_round_trip(opened, folder, assert_same)
    policy = json.loads((folder / "config.json").read_text())["config"]["dtype"]
    assert policy["config"]["name"] == "float32"


def test_a_model_without_a_vocabulary(make_opened, tmp_path):
    opened = dataclasses.replace(make_opened(), files={})
    folder = written(opened, tmp_path / "preset")
    assert files_of(folder) == ["config.json", "metadata.json", "model.weights.h5", "task.json"]
    assert json.loads((folder / "task.json").read_text())["config"]["preprocessor"] is None
    assert KERAS.open(folder).files == {}


def test_files_of_transformers_go_where_keras_does_not_look(make_opened, tmp_path):
    opened = make_opened()
    more = tmp_path / "tokenizer.json"
    more.write_text('{"of": "Transformers"}')
    opened = dataclasses.replace(opened, files={**opened.files, "tokenizer.json": more})
    folder = written(opened, tmp_path / "preset")
    assert json.loads((folder / "tokenizer.json").read_text())["class_name"] == "GemmaTokenizer"
    files = KERAS.open(folder).files
    assert sorted(files) == ["tokenizer.json", "tokenizer.model"]
    assert files["tokenizer.json"].read_text() == '{"of": "Transformers"}'


def test_what_is_announced_is_written(any_opened, tmp_path):
    weights = KERAS.tensors(any_opened, PLAIN)
    done = []
    folder = written(any_opened, tmp_path / "preset", progress=lambda *told: done.append(told))
    tensors = Hdf5File(folder / "model.weights.h5").tensors
    assert set(tensors) == set(weights.names())
    for name in weights.names():
        assert (tensors[name].shape, tensors[name].dtype) == (
            weights.shape(name),
            weights.dtype(name),
        )
    assert done[-1] == (sum(weights.read(n).nbytes for n in weights.names()),) * 2
    assert [told[0] for told in done] == sorted(told[0] for told in done)


class OneAtATime(ArrayWeights):
    """Says how many of the arrays that it gave away are alive."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.given, self.most = [], 0

    def read(self, name, index=None):
        array = super().read(name, index).copy()
        self.given.append(weakref.ref(array))
        self.most = max(self.most, sum(ref() is not None for ref in self.given))
        return array


def test_one_tensor_is_in_memory_at_a_time(make_opened, tmp_path):
    opened = make_opened()
    weights = OneAtATime({n: opened.weights.read(n) for n in opened.weights.names()})
    written(dataclasses.replace(opened, weights=weights), tmp_path / "preset")
    assert len(weights.given) == len(weights.names())
    assert weights.most == 1


def test_a_full_disk_is_an_os_error(make_opened, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (4096, 60_000):  # while HDF5 writes, and later
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                written(make_opened(), tmp_path / str(limit))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_reading_needs_no_h5py_and_writing_says_so(make_opened, preset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    KERAS.open(preset)
    with pytest.raises(CheckpointError, match=r"needs h5py.*gemma-hub\[keras\]"):
        written(make_opened(), tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


# -- as h5py and keras-hub see it ------------------------------------------------------------------

LAYER = {
    "attention/query_dense": "NDH", "attention/key_dense": "KDH", "attention/value_dense": "KDH",
    "attention/output_dense": "NHD", "gating_ffw": "DF", "gating_ffw_2": "DF", "ffw_linear": "FD",
    "pre_attention_norm": "D", "pre_ffw_norm": "D",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_h5py_finds_keras_s_variables(make_opened, dtype, tmp_path):
    opened = make_opened("gqa", dtype)
    path = written(opened, tmp_path / "preset") / "model.weights.h5"
    blocks = ["gemma_decoder_block", "gemma_decoder_block_1", "gemma_decoder_block_2"]
    shapes = {f"{block}/{name}": axes for block in blocks for name, axes in LAYER.items()}
    shapes |= {"reversible_embedding": "VD", "rms_normalization": "D"}
    found = tree_of(path)
    assert {name: array.shape for name, array in found.items()} == {
        f"layers/{name}/vars/0": tuple(WIDTHS[axis] for axis in axes)
        for name, axes in shapes.items()
    }
    assert {array.dtype.name for array in found.values()} == {dtype}
    read = opened.weights.read
    name = "layers/gemma_decoder_block_1/"
    query = read("model.layers.1.self_attn.q_proj.weight").reshape(4, 6, 24)
    expected = {
        f"{name}attention/query_dense/vars/0": query.swapaxes(1, 2),
        f"{name}gating_ffw_2/vars/0": read("model.layers.1.mlp.up_proj.weight").T,
        f"{name}pre_ffw_norm/vars/0": read("model.layers.1.post_attention_layernorm.weight"),
    }
    for variable, value in expected.items():
        assert np.array_equal(found[variable], value), variable


@pytest.mark.parametrize("name", ["float32", "bfloat16_sharded"])
def test_recorded_presets_are_read(name):
    opened = KERAS.open(RECORDED / name)
    assert opened.config == GemmaConfig(**SIZES, dtype=name.removesuffix("_sharded"))
    assert opened.task == "causal_lm"
    assert opened.dropped == {}
    assert [note[:52] for note in opened.notes] == [
        "A Keras preset does not state max_position_embedding"
    ]
    assert list(opened.files) == (["tokenizer.model"] if name == "float32" else [])
    recorded = np.load(RECORDED / "expected.npz")
    read = opened.weights.read
    name_of = {"token_embedding/embeddings": read("model.embed_tokens.weight")}
    for i in range(2):
        block, layer = f"decoder_block_{i}", f"model.layers.{i}"
        down = read(f"{layer}.mlp.down_proj.weight").T
        key = read(f"{layer}.self_attn.k_proj.weight").reshape(2, 6, 20).swapaxes(1, 2)
        output = read(f"{layer}.self_attn.o_proj.weight").T.reshape(4, 6, 20)
        name_of |= {
            f"{block}/ffw_linear/kernel": down,
            f"{block}/attention/key/kernel": key,
            f"{block}/attention/attention_output/kernel": output,
            f"{block}/pre_attention_norm/scale": read(f"{layer}.input_layernorm.weight"),
        }
    for variable, value in name_of.items():
        assert np.array_equal(recorded[variable].astype(value.dtype), value), variable


@pytest.mark.parametrize("name", ["float32", "bfloat16_sharded"])
def test_every_file_of_keras_is_read_as_h5py_reads_it(name):
    for path in (RECORDED / name).glob("*.h5"):
        file, expected = Hdf5File(path), tree_of(path)
        assert set(file.tensors) == set(expected)
        for tensor, value in expected.items():
            assert file.read(tensor).dtype == value.dtype
            assert np.array_equal(file.read(tensor), value)


def test_logits_are_keras_s():
    pytest.importorskip("gemma_hub_numpy")
    recorded = np.load(RECORDED / "expected.npz")
    lm = gemma_hub.Gemma.load(RECORDED / "float32", backend="numpy", dtype="float64")
    logits = lm.forward(recorded["ids"].tolist()).to_numpy().logits
    assert np.abs(recorded["logits"]).max() > 1
    # Keras computed in float32; measured is a sixth of this.
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-5)


def test_json_files_are_keras_s(tmp_path):
    """Those that Keras reads are equal to its own, except for the default sequence length."""
    folder = written(KERAS.open(RECORDED / "float32"), tmp_path / "preset")
    assert files_of(folder) == files_of(RECORDED / "float32")
    for name in ("config.json", "task.json", "tokenizer.json", "preprocessor.json"):
        text = (RECORDED / "float32" / name).read_text()
        expected = json.loads(text.replace('"sequence_length": 16', '"sequence_length": 1024'))
        assert json.loads((folder / name).read_text()) == expected, name
    metadata = json.loads((folder / "metadata.json").read_text())
    recorded = json.loads((RECORDED / "float32" / "metadata.json").read_text())
    for key in ("parameter_count", "tasks"):
        assert metadata[key] == recorded[key]


def marks_of(folder):
    """{variable: the attributes of its dataset} in all files."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = dict(item.attrs)

    for path in folder.glob("*.h5"):
        with h5py.File(path) as file:
            file.visititems(visit)
    return found


def test_variables_and_marks_are_keras_s(tmp_path):
    recorded = RECORDED / "bfloat16_sharded"
    folder = written(KERAS.open(recorded), tmp_path / "preset", WriteOptions(max_shard_bytes=7000))
    values = [
        {
            name: array.tobytes()
            for path in one.glob("*.h5")
            for name, array in tree_of(path).items()
        }
        for one in (folder, recorded)
    ]
    assert values[0] == values[1]
    assert marks_of(folder) == marks_of(recorded)
    assert marks_of(folder) == {name: {"dtype": "bfloat16"} for name in values[0]}


# -- other properties ---------------------------------------------------------------------------


def test_reads_are_views_and_writable(preset):
    path = preset / "model.weights.h5"
    before = path.read_bytes()
    file = Hdf5File(path)
    whole = np.frombuffer(file.pages, np.uint8)
    for name, tensor in file.tensors.items():
        part = file.read(name, slice(0, 2))
        assert np.shares_memory(part, whole), name
        assert part.shape[1:] == tensor.shape[1:]
        assert math.prod(tensor.shape) * 4 == tensor.nbytes
        part[:] = 0
    assert path.read_bytes() == before
    embedding = KERAS.open(preset).weights.read("model.embed_tokens.weight")
    assert not embedding.flags.owndata


def test_every_parameter_is_there(preset):
    opened = KERAS.open(preset)
    assert set(opened.weights.names()) == set(parameter_shapes(opened.config))
    with pytest.raises(CheckpointError, match="no parameter"):
        opened.weights.read("x")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_short_fuzz():
    command = [sys.executable, str(FUZZ), "--runs", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
