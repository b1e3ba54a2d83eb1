"""Checkpoints of gemma_pytorch: there and back bit for bit, int8, released shapes. No torch."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest

from gemma_hub.checkpoints.formats import torch_writer
from gemma_hub.checkpoints.formats.gemma_pytorch import GemmaPytorch
from gemma_hub.checkpoints.formats.interface import CheckpointFormat, WriteOptions
from gemma_hub.checkpoints.formats.pytorch_bin import PytorchBin
from gemma_hub.checkpoints.formats.torch_file import TorchFile
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError

CKPT = GemmaPytorch()
PLAIN = WriteOptions()
INDEX = "pytorch_model.bin.index.json"
QKV = "model.layers.1.self_attn.qkv_proj.weight"


def written(opened, folder, options=PLAIN, progress=None):
    folder.mkdir()
    CKPT.write(folder, opened, options, progress)
    return folder


def arrays_of(opened):
    """The tensors of the state dict that is written for a model."""
    weights = CKPT.tensors(opened, PLAIN)
    return {name: weights.read(name) for name in weights.names()}


def save(path, arrays, wrapper="model_state_dict", **more):
    """A file of {wrapper: arrays, **more}, of any type, as torch.save writes it."""
    stored = {**{(wrapper, name): array for name, array in arrays.items()}, **more}
    tables = {None: b""} if wrapper is None else {wrapper: b"", None: b""}
    with zipfile.ZipFile(path, "w") as out:
        for i, (key, array) in enumerate(stored.items()):
            table, name = key if isinstance(key, tuple) else (None, key)
            tensor = torch_writer._tensor(array.shape, array.dtype.name, str(i))
            tables[table] += torch_writer._text(name) + tensor
            out.writestr(f"model/data/{i}", array.tobytes())
        root = tables[None]
        if wrapper is not None:
            root += torch_writer._text(wrapper) + b"}(" + tables[wrapper] + b"u"
        out.writestr("model/data.pkl", b"\x80\x02}(" + root + b"u.")
        out.writestr("model/version", b"3\n")
    return path


def assert_round_trip(opened, path, assert_same):
    again = CKPT.open(path)
    assert again.config == opened.config
    assert again.task == opened.task
    assert again.dropped == {}
    assert again.notes == ()
    assert_same(again.weights, opened.weights)
    assert again.files["tokenizer.model"].read_bytes() == b"not a real vocabulary"


def test_it_is_a_format(tmp_path):
    assert isinstance(CKPT, CheckpointFormat)
    assert not CKPT.detect(tmp_path)
    assert not CKPT.detect(tmp_path / "nothing")
    assert not CKPT.detect(tmp_path / "x\0y")
    (tmp_path / "some.ckpt").touch()
    assert CKPT.detect(tmp_path)
    assert CKPT.detect(tmp_path / "some.ckpt")


def test_there_and_back(any_opened, tmp_path, assert_same):
    folder = written(any_opened, tmp_path / "ckpt")
    assert CKPT.detect(folder)
    assert CKPT.detect(folder / "model.ckpt")
    assert not PytorchBin().detect(folder)
    assert_round_trip(any_opened, folder, assert_same)
    assert_round_trip(any_opened, folder / "model.ckpt", assert_same)


@pytest.mark.parametrize("layout", ["sharded", None])
def test_shards(any_opened, layout, tmp_path, assert_same):
    options = WriteOptions(layout=layout, max_shard_bytes=8000)
    folder = written(any_opened, tmp_path / "ckpt", options)
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards[0] == f"pytorch_model-00001-of-{len(shards):05}.bin"
    assert "embedder.weight" in index["weight_map"]
    for shard in shards:  # flat, as gemma_pytorch wants them
        assert all(index["weight_map"][name] == shard for name in TorchFile(folder / shard).tensors)
    assert CKPT.detect(folder)
    assert not PytorchBin().detect(folder)
    assert_round_trip(any_opened, folder, assert_same)


def test_layouts_and_sizes(make_opened, tmp_path):
    opened = make_opened()
    files = {
        "one shard": ({"layout": "sharded"}, "pytorch_model-00001-of-00001.bin"),
        "single": ({"layout": "single"}, "model.ckpt"),
        "small": ({"max_shard_bytes": 1 << 30}, "model.ckpt"),
    }
    for name, (options, file) in files.items():
        folder = written(opened, tmp_path / name, WriteOptions(**options))
        assert (folder / file).is_file()
        assert (folder / INDEX).is_file() == (name == "one shard")
    with pytest.raises(CheckpointError, match="'single' is one file"):
        written(opened, tmp_path / "x", WriteOptions(layout="single", max_shard_bytes=6000))


def test_what_is_announced_is_written(any_opened, tmp_path):
    weights = CKPT.tensors(any_opened, PLAIN)
    done = []
    folder = written(any_opened, tmp_path / "ckpt", progress=lambda *told: done.append(told))
    file = TorchFile(folder / "model.ckpt")
    assert list(file.tensors) == [f"model_state_dict/{name}" for name in weights.names()]
    for name in weights.names():
        tensor = file.tensors[f"model_state_dict/{name}"]
        assert (tensor.shape, tensor.dtype) == (weights.shape(name), weights.dtype(name))
    total = sum(array.nbytes for array in arrays_of(any_opened).values())
    assert done[-1] == (total, total)
    assert [told[0] for told in done] == sorted(told[0] for told in done)


def test_queries_keys_and_values_are_one_tensor(make_opened, tmp_path):
    opened = make_opened("gqa")
    file = TorchFile(written(opened, tmp_path / "ckpt") / "model.ckpt")
    parts = [opened.weights.read(QKV.replace("qkv", letter)) for letter in "qkv"]
    assert np.array_equal(file.read(f"model_state_dict/{QKV}"), np.concatenate(parts))


def test_tables_are_dropped_and_what_is_beside_the_model(make_opened, tmp_path, assert_same):
    opened = make_opened()
    tables = {"freqs_cis": np.ones((4, 3), np.complex64)}
    path = save(tmp_path / "x.ckpt", arrays_of(opened) | tables, extra=np.ones(2))
    again = CKPT.open(path, opened.config)
    assert again.dropped == {
        "freqs_cis": "a table that follows from the config",
        "extra": "beside model_state_dict, which alone is the model",
    }
    assert_same(again.weights, opened.weights)


def test_a_file_without_the_wrapper(make_opened, tmp_path, assert_same):
    opened = make_opened()
    for name in ("flat.pt", "pytorch_model.bin"):
        path = save(tmp_path / name, arrays_of(opened), None)
        assert CKPT.detect(path)
        assert_same(CKPT.open(path, opened.config).weights, opened.weights)
    assert CKPT.detect(tmp_path)
    assert not PytorchBin().detect(tmp_path)
    assert_same(CKPT.open(tmp_path, opened.config).weights, opened.weights)


def test_padded_rows(make_opened, tmp_path, assert_same):
    opened = make_opened()
    folder = written(opened, tmp_path / "ckpt", WriteOptions(pad_vocab_to=64))
    embedding = TorchFile(folder / "model.ckpt").read("model_state_dict/embedder.weight")
    assert embedding.shape == (64, 24)
    assert not embedding[50:].any()
    again = CKPT.open(folder)
    assert again.dropped == {"embedder.weight[50:64]": "rows past vocab_size, for padding"}
    assert_same(again.weights, opened.weights)


def test_a_base_model(make_opened, tmp_path, assert_same):
    opened = dataclasses.replace(make_opened(), task="base")
    assert_round_trip(opened, written(opened, tmp_path / "ckpt"), assert_same)


# -- int8 ------------------------------------------------------------------------------------------


def quantised(opened, kind=np.float32):
    """int8 matrices and their scalers, norms as they are; and what the matrices stand for."""
    draw = np.random.default_rng(9)
    tensors, expected = {}, {}
    for name, array in arrays_of(opened).items():
        tensors[name] = expected[name] = array
        if array.ndim == 2:
            tensors[name] = draw.integers(-128, 128, array.shape).astype(np.int8)
            scaler = draw.uniform(0.001, 0.1, array.shape[0]).astype(kind)
            tensors[f"{name}_scaler"] = scaler
            expected[name] = tensors[name] * scaler.astype(np.float32)[:, None]
    return tensors, expected


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_int8_is_read_as_gemma_pytorch_computes_with_it(make_opened, kind, tmp_path):
    opened = make_opened("gqa", "bfloat16")
    tensors, expected = quantised(opened, kind)
    again = CKPT.open(save(tmp_path / "q.ckpt", tensors), opened.config)
    assert again.dropped == {}
    assert len(again.notes) == 1
    assert again.notes[0].startswith("16 of its tensors are quantised (int8)")
    assert again.weights.dtype("model.norm.weight") == "bfloat16"
    found = again.weights.read("model.embed_tokens.weight")
    assert found.dtype == np.float32
    assert np.array_equal(found, expected["embedder.weight"])
    parts = [again.weights.read(QKV.replace("qkv", letter)) for letter in "qkv"]
    assert np.array_equal(np.concatenate(parts), expected[QKV])
    rows = again.weights.read("model.layers.0.mlp.up_proj.weight", (slice(3, 5), 2))
    assert np.array_equal(rows, expected["model.layers.0.mlp.up_proj.weight"][3:5, 2])


SCALERS = {
    "float32 .23,.; expected": lambda t: t.update({f"{QKV}_scaler": t[f"{QKV}_scaler"][:23]}),
    "int32 .48,.; expected": lambda t: t.update(
        {f"{QKV}_scaler": t[f"{QKV}_scaler"].astype(np.int32)}
    ),
    "row of model.layers.1.self_attn.qkv": lambda t: t.update({QKV: t[QKV].astype(np.float32)}),
    "for each row of": lambda t: t.pop(QKV),
    "embedder.weight is int8": lambda t: t.pop("embedder.weight_scaler"),
}


@pytest.mark.parametrize("reason", SCALERS)
def test_wrong_scalers(make_opened, reason, tmp_path):
    opened = make_opened("gqa")
    tensors, _ = quantised(opened)
    SCALERS[reason](tensors)
    with pytest.raises(CheckpointError, match=reason):
        CKPT.open(save(tmp_path / "q.ckpt", tensors), opened.config)


# -- the config ------------------------------------------------------------------------------------


def save_shapes(path, config, rows):
    """A file with the tensors of a model, all of them parts of one storage, which is a hole."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    D, F = config.hidden_size, config.intermediate_size
    shapes = {"embedder.weight": (rows, D), "model.norm.weight": (D,)}
    layer = {
        "self_attn.qkv_proj.weight": ((N + 2 * K) * H, D), "self_attn.o_proj.weight": (D, N * H),
        "mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
    }  # fmt: skip
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    w, count = torch_writer, rows * D
    items = b""
    for name, shape in shapes.items():
        whole = w._tensor((count,), "bfloat16", "0")
        axes = [w._tuple(*map(w._number, part)) for part in (shape, (*shape[1:], 1))]
        own = [w._tuple(*map(w._number, part)) for part in ((count,), (1,))]
        items += w._text(name) + whole.replace(b"".join(own), b"".join(axes))
    pickle = b"\x80\x02}" + w._text("model_state_dict") + b"}(" + items + b"us."
    with path.open("wb") as file:
        entries = [w._written(file, "data.pkl", pickle), w._written(file, "version", b"3")]
        hole = w._write_record(file, "data/0", 2 * count, [])
        with pytest.raises(StopIteration) as end:
            next(hole)
        file.seek(2 * count, 1)
        w._write_directory(file, [*entries, end.value.value])
    return path


@pytest.mark.parametrize(
    ("preset", "rows", "vocabulary"),
    [("gemma-2b", 256_000, 256_000), ("gemma-7b", 256_128, 256_000), ("gemma-2b", 9**5, 9**5)],
)
def test_the_config_of_a_released_model(preset, rows, vocabulary, tmp_path):
    expected = GemmaConfig.preset(preset)
    opened = CKPT.open(save_shapes(tmp_path / "gemma.ckpt", expected, rows))
    assert opened.config == dataclasses.replace(expected, vocab_size=vocabulary, dtype=None)
    assert len(opened.notes) == 1
    assert "There is no config.json; the shapes say" in opened.notes[0]
    assert len(opened.dropped) == (rows > vocabulary)
    assert opened.weights.shape("model.layers.3.self_attn.k_proj.weight")[1] == expected.hidden_size


def test_another_model_needs_a_config(make_opened, tmp_path, assert_same):
    opened = make_opened()
    folder = written(opened, tmp_path / "ckpt")
    (folder / "config.json").unlink()
    for path in (folder, folder / "model.ckpt"):
        with pytest.raises(CheckpointNotFoundError, match=r"no config\.json.*number of heads"):
            CKPT.open(path)
        again = CKPT.open(path, opened.config)
        assert again.config == opened.config
        assert_same(again.weights, opened.weights)


def test_a_wrong_config_and_a_deep_one(make_opened, tmp_path):
    opened = make_opened("gqa")
    folder = written(opened, tmp_path / "ckpt")
    wrong = dataclasses.replace(opened.config, head_dim=8)
    with pytest.raises(CheckpointError, match=r"qkv_proj.weight is \(48, 24\), expected \(64, 24"):
        CKPT.open(folder, wrong)
    with pytest.raises(CheckpointError, match=r"Missing .1.: a place for lm_head.weight"):
        CKPT.open(folder, dataclasses.replace(opened.config, tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match="a model of 10,000 layers has 90,002 parameters"):
        CKPT.open(folder, dataclasses.replace(opened.config, num_hidden_layers=10_000))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.pre_feedforward_layernorm.weight",
        "model.layers.0.self_attn.query_norm.weight",
        "mm_input_projection.weight",
    ],
)
def test_later_generations_are_named(make_opened, name, tmp_path):
    path = save(tmp_path / "x.ckpt", arrays_of(make_opened()) | {name: np.ones(24)})
    with pytest.raises(CheckpointError, match=f"holds {name}, which are of a later generation"):
        CKPT.open(path)


# -- what is there ---------------------------------------------------------------------------------


def test_several_checkpoints_in_a_folder(make_opened, tmp_path, assert_same):
    opened = make_opened()
    folder = written(opened, tmp_path / "ckpt", WriteOptions(layout="sharded"))
    save(folder / "a.ckpt", arrays_of(opened))
    with pytest.raises(CheckpointError, match=rf"several checkpoints: a.ckpt, {INDEX}"):
        CKPT.open(folder)
    (folder / "b.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several checkpoints: a\.ckpt, b\.ckpt"):
        CKPT.open(folder)
    assert_same(CKPT.open(folder / "a.ckpt").weights, opened.weights)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="There is no checkpoint at"):
        CKPT.open(tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointNotFoundError, match="empty folder"):
        CKPT.open(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"x.ckpt is not a complete file"):
        CKPT.open(tmp_path)


def test_a_wrapped_shard_is_refused(make_opened, tmp_path):
    # gemma_pytorch would load nothing of it, and say nothing.
    opened = make_opened()
    folder = written(opened, tmp_path / "ckpt", WriteOptions(layout="sharded"))
    save(folder / "pytorch_model-00001-of-00001.bin", arrays_of(opened))
    with pytest.raises(CheckpointError, match=r"In no file \(23\): embedder.weight"):
        CKPT.open(folder)


OBJECTIONS = {
    "the embedding; this model has another": {"tie_word_embeddings": False},
    "no biases": {"attention_bias": True},
    "norm of queries": {"use_qk_norm": True},
    r"0 \+ weight": {"rms_norm_offset": 0.0},
    "sliding windows": {"layer_types": ("sliding_attention",) * 3, "sliding_window": 4},
    "positions of RoPE": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "RoPE base of 10000; this model's is 500000": {"rope_theta": 5e5},
    r"hidden size \(24\) that is no multiple": {"num_attention_heads": 10},
}


@pytest.mark.parametrize("reason", OBJECTIONS)
def test_objections(make_opened, reason, tmp_path):
    opened = make_opened()
    assert CKPT.objections(opened.config, "causal_lm", PLAIN) == ()
    config = dataclasses.replace(opened.config, **OBJECTIONS[reason])
    assert len(CKPT.objections(config, "base", PLAIN)) == 1
    with pytest.raises(CheckpointError, match=reason):
        written(dataclasses.replace(opened, config=config), tmp_path / "ckpt")
    assert not list((tmp_path / "ckpt").iterdir())


def test_caps_and_scales_are_no_objection(make_opened):
    # gemma_pytorch computes with those of its own config.
    changes = {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 24.0}
    assert CKPT.objections(make_opened(**changes).config, "causal_lm", PLAIN) == ()


def test_objections_to_classifiers(make_opened):
    config = make_opened().config
    for task in ("sequence_classification", "token_classification"):
        assert any(task in text for text in CKPT.objections(config, task, PLAIN))
