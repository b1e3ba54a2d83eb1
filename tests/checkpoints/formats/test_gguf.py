"""GGUF: against the gguf package, which reads what we write and writes what we read."""

import dataclasses
import importlib.util
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gemma_hub import GemmaTokenizer
from gemma_hub.checkpoints.formats.gguf import Gguf, unfolded
from gemma_hub.checkpoints.formats.gguf_vocabulary import vocabulary_model
from gemma_hub.checkpoints.formats.interface import CheckpointFormat, Opened, WriteOptions
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import DTYPES, ArrayWeights, Weights

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

ROOT = Path(__file__).parents[3]
TINY = ROOT / "plugins/tiny/gemma_hub_tiny/checkpoint/tokenizer.model"
LARGE = ROOT.parent / "shared/data/tokenizer/gemma1/tokenizer.rebuilt.model"
TALES = ROOT.parent / "shared/data/corpus/fairy_tales.txt"

Make = Callable[..., Opened]
Same = Callable[[Weights, Weights], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(opened: Opened, folder: Path, **files: Path) -> Path:
    """The file alone, as it is when it goes to another machine; `files` in place of the fake."""
    folder.mkdir()
    named = {name.replace("__", "."): path for name, path in files.items()}
    Gguf().write(folder, dataclasses.replace(opened, files=named), WriteOptions())
    alone = folder / "alone"
    alone.mkdir()
    return (folder / "model.gguf").rename(alone / "model.gguf")


def rewritten(path: Path, changes: dict[str, Any], **tensors: np.ndarray | None) -> Path:
    """A copy by the gguf package, with other key-values (None for none) and tensors."""
    reader = gguf.GGUFReader(path)
    target = path.with_name("rewritten.gguf")
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


def test_norms_that_survive_are_not_kept_twice(make_opened: Make, tmp_path: Path) -> None:
    opened = make_opened(dtype="bfloat16")
    path = written(opened, tmp_path / "out")
    assert unfolded(opened) == 0
    assert "gemma_hub.norms" not in gguf.GGUFReader(path).fields


@pytest.mark.parametrize("change", ["norm", "blob", "kind"])
def test_kept_norms_that_do_not_belong_are_ignored(
    make_opened: Make, tmp_path: Path, change: str
) -> None:
    opened = make_opened(dtype="float32")
    path = written(opened, tmp_path / "out")
    norm = np.full(24, 3, np.float32)
    if change == "norm":
        path = rewritten(path, {}, **{"output_norm.weight": norm})
    else:
        blob = b"not safetensors" if change == "blob" else "a text"
        path = rewritten(path, {"gemma_hub.norms": blob})
    found = Gguf().open(path)
    assert "gemma_hub.norms" in " ".join(found.notes)
    expected = opened.weights.read("model.norm.weight") + np.float32(1) - np.float32(1)
    expected = norm - 1 if change == "norm" else expected
    assert found.weights.read("model.norm.weight").tobytes() == expected.tobytes()


# -- what we write, by the gguf package ------------------------------------------------------------


def test_the_package_reads_what_we_write(any_opened: Opened, tmp_path: Path) -> None:
    path = written(any_opened, tmp_path / "out", tokenizer__model=small_model(tmp_path))
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
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is False


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


def test_files_go_beside_it(make_opened: Make, tmp_path: Path) -> None:
    opened = dataclasses.replace(make_opened(), files={"tokenizer.model": small_model(tmp_path)})
    folder = tmp_path / "out"
    folder.mkdir()
    Gguf().write(folder, opened, WriteOptions())
    assert sorted(file.name for file in folder.iterdir()) == ["model.gguf", "tokenizer.model"]
    assert Gguf().open(folder).files == {"tokenizer.model": folder / "tokenizer.model"}


# -- what the package writes -----------------------------------------------------------------------


def test_we_read_what_the_package_writes(make_opened: Make, tmp_path: Path) -> None:
    """As llama.cpp's converter writes it: without a RoPE base, with Q8_0 matrices."""
    opened = make_opened("mha", head_dim=32, hidden_size=64, intermediate_size=96)
    source = written(opened, tmp_path / "out")
    path = rewritten(source, {"gemma.rope.freq_base": None, "gemma_hub.norms": None})
    reader = gguf.GGUFReader(path)
    target = path.with_name("q8.gguf")
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
        ({"gemma.attention.head_count": [4, 4, 4]}, "num_attention_heads"),
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
        ({"num_hidden_layers": 201}, "causal_lm", {}, "201 layers"),
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


def test_a_vocabulary_that_is_none_is_refused(make_opened: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no vocabulary that a GGUF can hold"):
        Gguf().write(tmp_path, make_opened(), WriteOptions())


def test_a_vocabulary_that_is_too_large_is_refused(make_opened: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="4,096 pieces, and the config's vocab_size is 50"):
        written(make_opened(), tmp_path / "out", tokenizer__model=TINY)


# -- which files -----------------------------------------------------------------------------------


def test_detect(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(), tmp_path / "out")
    form = Gguf()
    assert form.detect(path)
    assert form.detect(path.parent)
    assert form.detect(path.rename(path.with_name("no-suffix")))
    assert not form.detect(path.parent)
    assert not form.detect(path)  # not there
    assert not form.detect(TINY)
    for i in (1, 2):
        (path.parent / f"part-0000{i}-of-00002.gguf").touch()
    assert form.detect(path.parent)
    with pytest.raises(CheckpointError, match="2 parts.*llama-gguf-split --merge"):
        form.open(path.parent)
    (path.parent / "another.gguf").touch()
    assert not form.detect(path.parent)
    with pytest.raises(CheckpointError, match="several GGUF files"):
        form.open(path.parent)
    with pytest.raises(CheckpointNotFoundError):
        form.open(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointNotFoundError):
        form.open(tmp_path / "source")


def test_without_the_package(
    make_opened: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(make_opened(), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert Gguf().detect(path)
    with pytest.raises(CheckpointError, match=r"pip install 'gemma-hub\[gguf\]'"):
        Gguf().open(path)


def test_its_import_needs_no_reader() -> None:
    code = "import sys, gemma_hub.checkpoints.formats.gguf as g; print('gguf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- damaged and hostile files ---------------------------------------------------------------------

HUGE = 2**63


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_keys)


def info(name: bytes, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + packed + struct.pack("<IQ", kind, offset)


def array(kind: int, count: int) -> bytes:
    return struct.pack("<IIQ", 9, kind, count)


ALIGNMENT = text(b"general.alignment") + struct.pack("<I", 4)
HOSTILE = {
    "empty": b"",
    "short": b"GGUF",
    "magic": b"GGML" + bytes(40),
    "version 1": header(version=1),
    "big-endian": header(version=3 << 24),
    "keys without end": header(n_keys=HUGE) + bytes(64),
    "tensors without end": header(n_tensors=HUGE) + bytes(64),
    "many keys": header(n_keys=99_999) + bytes(64),
    "a key without end": header(n_keys=1) + struct.pack("<Q", HUGE),
    "a key beyond the file": header(n_keys=1) + struct.pack("<Q", 2**64 - 1) + bytes(9),
    "a text without end": header(n_keys=1) + text(b"k") + struct.pack("<IQ", 8, HUGE),
    "an array without end": header(n_keys=1) + text(b"k") + array(4, HUGE),
    "texts without end": header(n_keys=1) + text(b"k") + array(8, HUGE),
    "many texts": header(n_keys=1) + text(b"k") + array(8, 3_999_999) + bytes(9),
    "a text in an array without end": header(n_keys=1) + text(b"k") + array(8, 2) + b"\xff" * 8,
    "an array of arrays": header(n_keys=1) + text(b"k") + array(9, 1) + array(9, 1) * 9,
    "an unknown type": header(n_keys=1) + text(b"k") + struct.pack("<I", 77),
    "a key twice": header(n_keys=2) + (text(b"k") + struct.pack("<IB", 0, 1)) * 2,
    "a key in no code": header(n_keys=1) + text(b"\xff") + struct.pack("<IB", 0, 1),
    "alignment 0": header(n_keys=1) + ALIGNMENT + struct.pack("<I", 0),
    "alignment 24": header(n_keys=1) + ALIGNMENT + struct.pack("<I", 24),
    "alignment 2**31": header(1, 1) + ALIGNMENT + struct.pack("<I", 2**31) + info(b"t", [4]),
    "dimensions": header(1) + text(b"t") + struct.pack("<I", 2**32 - 1) + bytes(99),
    "no dimensions": header(1) + info(b"t", []) + bytes(99),
    "a size of 0": header(1) + info(b"t", [0, 4]) + bytes(99),
    "a size of 2**63": header(1) + info(b"t", [HUGE, 2]) + bytes(99),
    "sizes that overflow": header(1) + info(b"t", [2**32, 2**32]) + bytes(99),
    "beyond the file": header(1) + info(b"t", [1000]) + bytes(99),
    "an offset of 2**63": header(1) + info(b"t", [4], offset=HUGE) + bytes(99),
    "misaligned": header(1) + info(b"t", [4], offset=4) + bytes(99),
    "overlapping": header(2) + info(b"t", [16]) + info(b"u", [16], offset=32) + bytes(256),
    "a name twice": header(2) + info(b"t", [4]) * 2 + bytes(99),
    "a type unknown": header(1) + info(b"t", [4], kind=2**32 - 1) + bytes(99),
    "rows of no blocks": header(1) + info(b"t", [33], kind=8) + bytes(999),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[case])
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"GGUF|types that are not read"):
        Gguf().open(path)
    assert time.perf_counter() - start < 1


def test_many_real_texts_take_no_second(tmp_path: Path) -> None:
    """The limit itself: 32 MB of empty texts, all there."""
    path = tmp_path / "model.gguf"
    path.write_bytes(header(n_keys=1) + text(b"k") + array(8, 4_000_000) + bytes(8 * 4_000_000))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="architecture None"):
        Gguf().open(path)
    assert time.perf_counter() - start < 3  # a machine under load; 0.6 s alone


def test_cut_short_anywhere(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(dtype="bfloat16"), tmp_path / "out")
    content = path.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    last = len(content) - 32  # the last tensor may end in padding
    for end in [*range(0, 3000, 41), *range(3000, last, 977)]:
        damaged.unlink(missing_ok=True)
        damaged.write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            Gguf().open(damaged)


def test_fuzz(tmp_path: Path) -> None:
    fuzz = loaded(Path(__file__).with_name("fuzz_gguf.py"))
    outcomes, _ = fuzz.run(int(os.environ.get("GGUF_FUZZ_RUNS", "3000")), 0, tmp_path)
    assert min(outcomes["loaded"], outcomes["CheckpointError"]) > 100


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the vocabulary --------------------------------------------------------------------------------


def small_model(folder: Path) -> Path:
    """A vocabulary of fewer pieces than the test models have rows."""
    import sentencepiece

    path = folder / "small.model"
    if not path.is_file():
        with path.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["abc abd abe", "bac bad bae"] * 9),
                model_writer=file, model_type="bpe", vocab_size=20, pad_id=0, eos_id=1, bos_id=2,
                unk_id=3, add_dummy_prefix=False, remove_extra_whitespaces=False,
                normalization_rule_name="identity", user_defined_symbols=["<end_of_turn>"],
                minloglevel=9, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
            )  # fmt: skip
    return path


def texts_to_encode(count: int = 2000) -> list[str]:
    tales = TALES.read_text("utf-8") if TALES.is_file() else "Once upon a time. " * 9999
    extra = (
        "  spaces   \n\ttabs\n\n <start_of_turn>user\nhi<end_of_turn> é 漢字 🙂 \x00 12345 \u2581"
    )
    step = max(1, (len(tales) - 90) // count)
    return [tales[i * step : i * step + 90] + extra[i % 40 :] for i in range(count)]


@pytest.mark.parametrize("source", [TINY, LARGE], ids=["tiny", "256k"])
def test_the_vocabulary_comes_back(make_opened: Make, tmp_path: Path, source: Path) -> None:
    import sentencepiece

    if not source.is_file():
        pytest.skip(f"{source} is not there")
    original = sentencepiece.SentencePieceProcessor(model_file=str(source))
    opened = make_opened("mqa", "bfloat16", vocab_size=original.get_piece_size())
    path = written(opened, tmp_path / "out", tokenizer__model=source)
    start = time.perf_counter()
    found = Gguf().open(path)
    taken = time.perf_counter() - start
    assert not found.notes
    model = found.files["tokenizer.model"]
    back = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = texts_to_encode()
    assert back.encode(texts) == original.encode(texts)
    assert back.decode(back.encode(texts)) == original.decode(original.encode(texts))
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(back, name)() == getattr(original, name)()
    alone = tmp_path / "tokenizer"
    alone.mkdir()
    (alone / "tokenizer.model").write_bytes(model.read_bytes())
    ours = GemmaTokenizer.from_pretrained(alone)
    (alone / "tokenizer.model").write_bytes(source.read_bytes())
    theirs = GemmaTokenizer.from_pretrained(alone)
    assert [ours.encode(t) for t in texts[::20]] == [theirs.encode(t) for t in texts[::20]]
    assert taken < 3  # a machine under load; 0.25 s alone


def test_marks_and_padding(make_opened: Make, tmp_path: Path) -> None:
    source = small_model(tmp_path)
    path = written(make_opened(), tmp_path / "out", tokenizer__model=source)
    metadata = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 50
    assert tokens[20:22] == ["[PAD20]", "[PAD21]"]
    assert metadata["tokenizer.ggml.token_type"][49] == gguf.TokenType.UNUSED
    assert tokens[metadata["tokenizer.ggml.eot_token_id"]] == "<end_of_turn>"
    assert metadata["tokenizer.ggml.token_type"][tokens.index("<end_of_turn>")] == 4
    assert metadata["tokenizer.ggml.unknown_token_id"] == 3
    assert "tokenizer.ggml.fim_pre_token_id" not in metadata
    import sentencepiece

    model = Gguf().open(path).files["tokenizer.model"]
    back = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert back.get_piece_size() == 20


def test_a_chat_template_comes_back(make_opened: Make, tmp_path: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages }} é", "utf-8")
    path = written(make_opened(), tmp_path / "out", chat_template__jinja=template)
    found = Gguf().open(path).files
    assert found["chat_template.jinja"].read_text("utf-8") == "{{ messages }} é"
    stated = tmp_path / "tokenizer_config.json"
    stated.write_text('{"chat_template": "{{ other }}"}', "utf-8")
    path = written(make_opened(), tmp_path / "other", tokenizer_config__json=stated)
    assert gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents() == "{{ other }}"


def test_a_damaged_cache_is_made_again(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(), tmp_path / "out", tokenizer__model=small_model(tmp_path))
    model = Gguf().open(path).files["tokenizer.model"]
    content = model.read_bytes()
    model.write_bytes(b"damaged")
    assert Gguf().open(path).files["tokenizer.model"].read_bytes() == content
    assert [file.name for file in model.parent.iterdir()] == [model.name]


def test_without_a_place_for_the_cache(
    make_opened: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(make_opened(), tmp_path / "out", tokenizer__model=small_model(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / "file"))
    found = Gguf().open(path)
    assert found.files == {}
    assert "cannot be written to the cache" in found.notes[0]


def test_vocabularies_of_other_kinds() -> None:
    assert vocabulary_model({}) is None
    assert vocabulary_model({"tokenizer.ggml.model": "gpt2"}) is None
    short: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [b"a", b"b"],
        "tokenizer.ggml.scores": np.zeros(1, np.float32),
        "tokenizer.ggml.token_type": np.ones(2, np.int32),
    }
    assert vocabulary_model(short) is None
    assert vocabulary_model(short | {"tokenizer.ggml.scores": np.zeros(2, np.float32)})


def test_a_released_config_has_no_objections() -> None:
    for name in ("gemma-2b", "gemma-7b"):
        config = GemmaConfig.preset(name)
        assert Gguf().objections(config, "causal_lm", WriteOptions()) == ()
