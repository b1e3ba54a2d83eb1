"""GGUF: against the gguf package, which reads what we write and writes what we read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_hub.checkpoints.formats.gguf import Gguf, unfolded
from gemma_hub.checkpoints.formats.gguf_file import GgufFile
from gemma_hub.checkpoints.formats.interface import CheckpointFormat, Opened, WriteOptions
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights, Weights, parameter_shapes

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

Make = Callable[..., Opened]
Same = Callable[[Weights, Weights], None]


def written(opened: Opened, folder: Path) -> Path:
    """The file, without a vocabulary."""
    folder.mkdir()
    Gguf().write(folder, dataclasses.replace(opened, files={}), WriteOptions())
    return folder / "model.gguf"


def rewritten(path: Path, changes: dict[str, Any], **tensors: np.ndarray | None) -> Path:
    """A copy by the gguf package, with other key-values (None for none) and tensors."""
    reader = gguf.GGUFReader(path)
    target = path.with_name("rewritten") / "model.gguf"
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)  # a former one may still be mapped
    writer = gguf.GGUFWriter(target, changes.pop("architecture", "gemma"))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in changes:
            continue
        kinds = (*field.types, None)
        writer.add_key_value(key, field.contents(), kinds[0], kinds[1])
    for key, value in changes.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    arrays = {t.name: (t.data, t.tensor_type) for t in reader.tensors}
    for name, array in tensors.items():
        arrays[name] = (array, None)
    for name, (array, kind) in arrays.items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


# -- there and back --------------------------------------------------------------------------------


def test_it_is_a_format() -> None:
    assert isinstance(Gguf(), CheckpointFormat)


def test_a_round_trip_is_equal_bit_for_bit(
    any_opened: Opened, tmp_path: Path, assert_same: Same
) -> None:
    path = written(any_opened, tmp_path / "out")
    found = Gguf().open(path)
    assert_same(found.weights, any_opened.weights)
    assert found.config == any_opened.config
    assert (found.task, found.dropped, found.notes, found.files) == ("causal_lm", {}, (), {})
    assert Gguf().open(path.parent).config == found.config  # the folder says the same


def test_every_field_of_the_config_comes_back(make_opened: Make, tmp_path: Path) -> None:
    opened = make_opened(
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
        attention_dropout=0.25,
        initializer_range=0.125,
        eos_token_id=(7, 9),
        bos_token_id=None,
        pad_token_id=3,
        query_pre_attn_scalar=None,
    )
    assert Gguf().open(written(opened, tmp_path / "out")).config == opened.config


def test_norms_that_do_not_survive_the_sum_come_back(
    make_opened: Make, tmp_path: Path, assert_same: Same
) -> None:
    opened = make_opened(dtype="bfloat16")
    name = "model.norm.weight"
    arrays = {n: np.array(opened.weights.read(n)) for n in opened.weights.names()}
    arrays[name][:4] = [1e-20, -0.0, 3e-9, np.nan]
    opened = dataclasses.replace(opened, weights=ArrayWeights(arrays))
    path = written(opened, tmp_path / "out")
    assert "gemma_hub.norms" in gguf.GGUFReader(path).fields
    found = Gguf().open(path)
    assert_same(found.weights, opened.weights)
    assert unfolded(opened) == unfolded(found) == 3
    # A part of a norm, too.
    assert found.weights.read(name, slice(0, 2)).tobytes() == arrays[name][:2].tobytes()


def test_norms_of_another_type_than_the_matrices_come_back(
    make_opened: Make, tmp_path: Path, assert_same: Same
) -> None:
    opened = make_opened(dtype="bfloat16")
    arrays = {
        name: (opened.weights.read(name) if "norm" not in name else np.ones(24, np.float32))
        for name in opened.weights.names()
    }
    opened = dataclasses.replace(opened, weights=ArrayWeights(arrays))
    assert_same(Gguf().open(written(opened, tmp_path / "out")).weights, opened.weights)


def test_matrices_of_several_types_come_back(
    make_opened: Make, tmp_path: Path, assert_same: Same
) -> None:
    opened = make_opened(dtype="bfloat16")
    types = ("float16", "bfloat16", "float32")
    arrays = {
        name: opened.weights.read(name).astype(DTYPES[types[i % 3]])
        for i, name in enumerate(opened.weights.names())
    }
    config = dataclasses.replace(opened.config, dtype="float16")
    opened = dataclasses.replace(opened, weights=ArrayWeights(arrays), config=config)
    found = Gguf().open(written(opened, tmp_path / "out"))
    assert_same(found.weights, opened.weights)
    assert found.config == config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_value_that_a_norm_can_have_comes_back(
    tmp_path: Path, dtype: str, assert_same: Same
) -> None:
    config = GemmaConfig(
        vocab_size=4, hidden_size=2**16, intermediate_size=2, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=2, dtype=dtype,
    )  # fmt: skip
    arrays = {
        name: np.ones(shape, DTYPES[dtype]) for name, shape in parameter_shapes(config).items()
    }
    every = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    arrays["model.norm.weight"] = every
    weights = ArrayWeights(arrays)
    opened = Opened(path=tmp_path, config=config, task="causal_lm", weights=weights)
    assert_same(Gguf().open(written(opened, tmp_path / "out")).weights, weights)
    with np.errstate(all="ignore"):
        wide = every.astype(np.float32)
        sums = wide + np.float32(1)
        back = sums - np.float32(1)
    lost = sum(a.tobytes() != b.tobytes() for a, b in zip(wide, back, strict=True))
    assert unfolded(opened) == lost > 0
    stored = GgufFile(tmp_path / "out" / "model.gguf").raw_bytes("output_norm.weight")
    assert stored.tobytes() == sums.tobytes()


def test_norms_that_survive_are_not_kept_twice(make_opened: Make, tmp_path: Path) -> None:
    opened = make_opened(dtype="bfloat16")
    path = written(opened, tmp_path / "out")
    assert unfolded(opened) == 0
    assert "gemma_hub.norms" not in gguf.GGUFReader(path).fields


@pytest.mark.parametrize("change", ["norm", "blob", "kind", "size"])
def test_kept_norms_that_do_not_belong_are_ignored(
    make_opened: Make, tmp_path: Path, change: str
) -> None:
    opened = make_opened(dtype="float32")
    path = written(opened, tmp_path / "out")
    norm = np.full(24, 3, np.float32)
    if change == "norm":
        path = rewritten(path, {}, **{"output_norm.weight": norm})
    else:
        blobs = {"blob": b"not safetensors", "kind": "a text", "size": bytes(99_999)}
        blob = blobs[change]
        path = rewritten(path, {"gemma_hub.norms": blob})
    found = Gguf().open(path)
    assert "gemma_hub.norms" in " ".join(found.notes)
    expected = opened.weights.read("model.norm.weight") + np.float32(1) - np.float32(1)
    expected = norm - 1 if change == "norm" else expected
    assert found.weights.read("model.norm.weight").tobytes() == expected.tobytes()


# -- what we write, by the gguf package ------------------------------------------------------------


def test_the_package_reads_what_we_write(any_opened: Opened, tmp_path: Path) -> None:
    path = written(any_opened, tmp_path / "out")
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = any_opened.config
    arch = gguf.MODEL_ARCH.GEMMA
    expected = {"token_embd.weight", "output_norm.weight"} | {
        f"{gguf.TENSOR_NAMES[kind].format(bid=i)}.weight"
        for kind in gguf.MODEL_TENSORS[arch]
        for i in range(config.num_hidden_layers)
        if "{bid}" in gguf.TENSOR_NAMES[kind]
    }
    assert found.keys() == expected
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name in any_opened.weights.names():
        array = any_opened.weights.read(name)
        tensor = found[names.get_name(name.removesuffix(".weight")) + ".weight"]
        assert tuple(reversed(tensor.shape.tolist())) == array.shape
        if array.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            assert np.array_equal(tensor.data, array.astype(np.float32) + np.float32(1))
        else:
            kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
            assert tensor.tensor_type.name == kinds[config.dtype or ""]
            assert tensor.data.tobytes() == array.tobytes()
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    assert metadata["general.architecture"] == "gemma"
    kinds = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    assert metadata["general.file_type"] == gguf.LlamaFileType[kinds[config.dtype or ""]]
    assert metadata["gemma.context_length"] == 64
    assert metadata["gemma.attention.head_count"] == config.num_attention_heads
    assert metadata["gemma.attention.head_count_kv"] == config.num_key_value_heads
    assert metadata["gemma.attention.key_length"] == config.head_dim
    assert metadata["gemma.attention.value_length"] == config.head_dim
    assert metadata["gemma.vocab_size"] == 50
    assert metadata["tokenizer.ggml.model"] == "none"


def test_only_one_tensor_is_in_memory(make_opened: Make, tmp_path: Path) -> None:
    import tracemalloc

    rows = 40_000  # 3.8 MB an embedding
    opened = make_opened("mqa", vocab_size=rows)

    class Fresh(ArrayWeights):
        """Makes each tensor when it is read, as a file does."""

        def read(self, name: str, index: Any = None) -> np.ndarray:
            return np.array(super().read(name, index))

    arrays = {name: opened.weights.read(name) for name in opened.weights.names()}
    opened = dataclasses.replace(opened, weights=Fresh(arrays))
    seen: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    bare = dataclasses.replace(opened, files={})
    tracemalloc.start()
    Gguf().write(tmp_path / "out", bare, WriteOptions(), lambda *done: seen.append(done))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * rows * 24 * 4
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == 3 * 9 + 2


# -- what the package writes -----------------------------------------------------------------------


def test_we_read_what_the_package_writes(make_opened: Make, tmp_path: Path) -> None:
    """As llama.cpp's converter writes it: without a RoPE base, with Q8_0 matrices."""
    opened = make_opened("mha", head_dim=32, hidden_size=64, intermediate_size=96)
    source = written(opened, tmp_path / "out")
    path = rewritten(source, {"gemma.rope.freq_base": None, "gemma_hub.norms": None})
    reader = gguf.GGUFReader(path)
    target = tmp_path / "q8.gguf"
    writer = gguf.GGUFWriter(target, "gemma")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), *field.types[:2])
    q8 = gguf.GGMLQuantizationType.Q8_0
    expected: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        if tensor.data.ndim == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            data = gguf.quants.quantize(tensor.data, q8)
            expected[tensor.name] = gguf.quants.dequantize(data, q8)
            writer.add_tensor(tensor.name, data, raw_dtype=q8)
    writer.add_tensor("rope_freqs.weight", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Gguf().open(target)
    embedding = found.weights.read("model.embed_tokens.weight")
    assert embedding.tobytes() == expected["token_embd.weight"].tobytes()
    down = found.weights.read("model.layers.1.mlp.down_proj.weight", (slice(2, 5), slice(3, 7)))
    assert np.array_equal(down, expected["blk.1.ffn_down.weight"][2:5, 3:7])
    assert found.weights.dtype("model.embed_tokens.weight") == found.config.dtype == "float32"
    assert found.dropped == {"rope_freqs.weight": "follows from the config"}
    notes = " ".join(found.notes)
    assert "Q8_0" in notes
    assert "rope.freq_base" in notes
    assert found.config.rope_theta == 10_000


def test_every_block_of_q8_0_is_the_packages(tmp_path: Path) -> None:
    """Scales of every bit pattern: infinities, NaN, both zeros, subnormal; and values of every."""
    scales = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    values = np.random.default_rng(0).integers(0, 256, (2**16, 32), np.uint8)
    values[::7, :4] = [0, 127, 128, 255]
    blocks = np.hstack([scales, values]).reshape(2**13, 8 * 34)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma")
    writer.add_tensor("t", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    file = GgufFile(tmp_path / "x.gguf")
    assert file.shape("t") == expected.shape == (2**13, 256)
    for index in (None, 5, slice(3, 9), (slice(2, 4), slice(30, 70)), (slice(0, 9, 2), 7)):
        found, wanted = file.read("t", index), expected[... if index is None else index]
        assert found.dtype == np.float32
        assert found.tobytes() == wanted.tobytes()


def test_reading_copies_nothing_and_writes_to_no_file(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(dtype="bfloat16"), tmp_path / "out")
    before = path.read_bytes()
    weights = Gguf().open(path).weights
    one = weights.read("model.embed_tokens.weight")
    assert not one.flags.owndata
    one[0, 0] = 17
    assert weights.read("model.embed_tokens.weight")[0, 0] == 17  # the same pages
    assert path.read_bytes() == before


def test_a_head_that_is_the_embedding_is_dropped(make_opened: Make, tmp_path: Path) -> None:
    opened = make_opened()
    path = written(opened, tmp_path / "out")
    embedding = opened.weights.read("model.embed_tokens.weight")
    found = Gguf().open(rewritten(path, {}, **{"output.weight": embedding}))
    assert list(found.dropped) == ["output.weight"]
    with pytest.raises(CheckpointError, match=r"output\.weight, that differs"):
        Gguf().open(rewritten(path, {}, **{"output.weight": embedding + 1}))


# -- refusals --------------------------------------------------------------------------------------


def test_other_types_are_refused_by_name(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(), tmp_path / "out")
    wide = np.zeros((50, 24), np.float64)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight \(F64\).*F32, F16, BF16, Q8_0"):
        Gguf().open(rewritten(path, {}, **{"token_embd.weight": wide}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma2"}, "'gemma2'"),
        ({"architecture": "llama"}, "'llama'"),
        ({"split.count": 3}, "llama-gguf-split"),
        ({"gemma.block_count": 2}, "Unexpected"),
        ({"gemma.block_count": 4}, r"Missing.*blk\.3"),
        ({"gemma.block_count": 9_999}, "9999 layers"),
        ({"gemma.block_count": None}, "block_count"),
        ({"gemma.block_count": "3"}, "num_hidden_layers is '3'"),
        ({"gemma.embedding_length": 25}, "Misshapen"),
        ({"gemma.attention.head_count": [4, 4, 4]}, "head_count an array of 3"),
        ({"gemma.vocab_size": 51}, "vocab_size 51; expected 50"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "2 pieces.*50 rows"),
        ({"gemma.attention.value_length": 7}, "value_length"),
        ({"gemma.rope.scaling.type": "yarn"}, "yarn"),
        ({"gemma.rope.freq_base": float("nan")}, "rope_theta"),
        ({"gemma_hub.config": "{"}, "JSON"),
    ],
)
def test_metadata_of_other_models(
    make_opened: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = written(make_opened(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"(?s){message}"):
        Gguf().open(rewritten(path, dict(changes)))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"scaling.type": None}, 4.0),  # a factor alone is that of linear scaling
        ({"scaling.type": None, "scaling.factor": None, "scale_linear": 2.0}, 2.0),
        ({"scale_linear": 2.0}, 4.0),
        ({"scaling.factor": None}, None),
        ({"scaling.factor": 0.0}, None),
        ({"scaling.type": "none"}, None),
    ],
)
def test_scaling_is_what_llama_cpp_takes_it_for(
    make_opened: Make, tmp_path: Path, changes: dict[str, Any], factor: float | None
) -> None:
    opened = make_opened(rope_scaling={"rope_type": "linear", "factor": 4.0})
    keys = {f"gemma.rope.{key}": value for key, value in changes.items()}
    found = Gguf().open(rewritten(written(opened, tmp_path / "out"), keys))
    assert found.config.rope_factor == (factor or 1.0)
    assert (found.config.rope_scaling is None) == (factor is None)
    assert not found.notes


def test_a_given_config_counts(make_opened: Make, tmp_path: Path) -> None:
    opened = make_opened(rope_theta=7e3)
    path = rewritten(written(opened, tmp_path / "out"), {"gemma.block_count": None})
    config = dataclasses.replace(opened.config, rope_theta=9e3)
    assert Gguf().open(path, config).config is config


def test_unknown_keys_are_noted(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(), tmp_path / "out")
    found = Gguf().open(rewritten(path, {"gemma.final_logit_softcapping": 30.0}))
    assert "gemma.final_logit_softcapping" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("changes", "task", "options", "word"),
    [
        ({}, "causal_lm", {}, None),
        ({}, "base", {}, None),
        ({"query_pre_attn_scalar": 6.0}, "causal_lm", {}, None),
        ({"layer_types": ("full_attention",) * 3, "sliding_window": 4}, "causal_lm", {}, None),
        ({}, "sequence_classification", {}, "sequence_classification"),
        ({"tie_word_embeddings": False}, "causal_lm", {}, "head"),
        ({"attention_bias": True}, "causal_lm", {}, "biases"),
        ({"use_qk_norm": True}, "causal_lm", {}, "queries"),
        ({"rms_norm_offset": 0.0}, "causal_lm", {}, "adds 0"),
        ({"attn_logit_softcapping": 50.0}, "causal_lm", {}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "causal_lm", {}, "final_logit_softcapping"),
        ({"query_pre_attn_scalar": 7.0}, "causal_lm", {}, "query_pre_attn_scalar"),
        ({"rope_theta": 10_000.000001}, "causal_lm", {}, "rope_theta"),
        ({"num_hidden_layers": 101}, "causal_lm", {}, "101 layers"),
        ({"max_position_embeddings": 2**32}, "causal_lm", {}, "32 bits"),
        ({}, "causal_lm", {"pad_vocab_to": 64}, "padding"),
        (
            {"layer_types": ("sliding_attention",) * 3, "sliding_window": 4},
            "causal_lm", {}, "window",
        ),
    ],
)  # fmt: skip
def test_objections(
    make_opened: Make, changes: dict[str, Any], task: str, options: dict[str, Any], word: str | None
) -> None:
    config = dataclasses.replace(make_opened().config, **changes)
    found = Gguf().objections(config, task, WriteOptions(**options))
    assert len(found) == (word is not None), found
    assert not word or word in found[0]


def test_float64_is_refused(make_opened: Make, tmp_path: Path) -> None:
    opened = make_opened(dtype="float64")
    with pytest.raises(CheckpointError, match="float64"):
        Gguf().tensors(opened, WriteOptions())
    with pytest.raises(CheckpointError, match="float64"):
        Gguf().write(tmp_path, opened, WriteOptions())


def test_a_released_config_has_no_objections() -> None:
    for name in ("gemma-2b", "gemma-7b"):
        config = GemmaConfig.preset(name)
        assert Gguf().objections(config, "causal_lm", WriteOptions()) == ()
