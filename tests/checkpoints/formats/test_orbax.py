"""Orbax checkpoints: there and back bit for bit, and what is read. No orbax here."""

import dataclasses
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

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
DATABASE, KINDS = SCRIPT["DATABASE"], SCRIPT["KINDS"]


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
