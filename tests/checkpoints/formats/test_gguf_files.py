"""GGUF: which files it takes, and damaged and hostile ones, each of which is an error at once."""

import dataclasses
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_hub.checkpoints.formats.gguf import Gguf
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

FUZZ = Path(__file__).with_name("fuzz_gguf.py")
Make = Callable[..., Opened]


def written(opened: Opened, folder: Path) -> Path:
    """The file, without a vocabulary."""
    folder.mkdir()
    Gguf().write(folder, dataclasses.replace(opened, files={}), WriteOptions())
    return folder / "model.gguf"


# -- which files -----------------------------------------------------------------------------------


def test_detect(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(), tmp_path / "out")
    form = Gguf()
    assert form.detect(path)
    assert form.detect(path.parent)
    assert form.detect(path.rename(path.with_name("no-suffix")))
    assert not form.detect(path.parent)
    assert not form.detect(path)  # not there
    (tmp_path / "text.txt").write_text("GGU")
    assert not form.detect(tmp_path / "text.txt")
    assert not form.detect(Path("no\0name"))
    for i in (1, 2):
        (path.parent / f"part-0000{i}-of-00002.gguf").touch()
    assert form.detect(path.parent)
    with pytest.raises(CheckpointError, match=r"2 parts.*llama-gguf-split --merge"):
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
ALIGNED_TEXT = text(b"general.alignment") + struct.pack("<I", 8) + text(b"32")
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
    "alignment of a text": header(n_keys=1) + ALIGNED_TEXT,
    "dimensions": header(1) + text(b"t") + struct.pack("<I", 2**32 - 1) + bytes(99),
    "no dimensions": header(1) + info(b"t", []) + bytes(99),
    "a size of 0": header(1) + info(b"t", [0, 4]) + bytes(99),
    "a size of 2**63": header(1) + info(b"t", [HUGE, 2]) + bytes(99),
    "sizes that overflow": header(1) + info(b"t", [2**32, 2**32]) + bytes(99),
    "beyond the file": header(1) + info(b"t", [1000]) + bytes(99),
    "an offset of 2**63": header(1) + info(b"t", [4], offset=HUGE) + bytes(99),
    "misaligned": header(1) + info(b"t", [4], offset=4) + bytes(99),
    "overlapping": header(2) + info(b"t", [16]) + info(b"u", [16], offset=32) + bytes(256),
    "a gap": header(2) + info(b"t", [8]) + info(b"u", [8], offset=64) + bytes(256),
    "in another order": header(2) + info(b"t", [8], offset=32) + info(b"u", [8]) + bytes(256),
    "more than the tensors": header(1) + info(b"t", [8]) + bytes(99 + 32),
    "padding that is data": header(1) + info(b"t", [8]) + b"\1" * 99,
    "a long name": header(1) + info(b"t" * 251, [4]) + bytes(99),
    "a name twice": header(2) + info(b"t", [4]) * 2 + bytes(99),
    "a type unknown": header(1) + info(b"t", [4], kind=2**32 - 1) + bytes(99),
    "rows of no blocks": header(1) + info(b"t", [33], kind=8) + bytes(999),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[case])
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"GGUF|types that are not read"):
        Gguf().open(path)
    assert time.process_time() - start < 1


def test_many_real_values_take_no_second(tmp_path: Path) -> None:
    """The limits themselves: 8 MB of empty texts, and so many keys, all there."""
    path = tmp_path / "model.gguf"
    keys = b"".join(text(b"%d" % i) + struct.pack("<IB", 0, 1) for i in range(9_999))
    texts = text(b"k") + array(8, 1_000_000) + bytes(8 * 1_000_000)
    path.write_bytes(header(n_keys=10_000) + keys + texts)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="architecture None"):
        Gguf().open(path)
    assert time.process_time() - start < 1


VALUES: dict[str, Any] = {
    "numbers": [1, 2],
    "texts": ["a", "b"],
    "a long text": "x" * 1_000_000,
    "many texts": ["x" * 99] * 20_000,
    "a truth": True,
    "NaN": float("nan"),
    "a negative number": -1,
}
READ_KEYS = """
    general.architecture split.count gemma.context_length gemma.embedding_length gemma.block_count
    gemma.feed_forward_length gemma.attention.head_count gemma.attention.head_count_kv
    gemma.attention.key_length gemma.attention.value_length gemma.rope.dimension_count
    gemma.attention.layer_norm_rms_epsilon gemma.rope.freq_base gemma.rope.scaling.type
    gemma.rope.scaling.factor gemma.rope.scale_linear gemma.vocab_size gemma_hub.config
    gemma_hub.norms tokenizer.ggml.model tokenizer.ggml.tokens tokenizer.ggml.scores
    tokenizer.ggml.token_type tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id
    tokenizer.ggml.padding_token_id tokenizer.ggml.unknown_token_id
    tokenizer.ggml.add_space_prefix tokenizer.chat_template
""".split()


@pytest.fixture
def model(make_opened: Make, tmp_path: Path) -> Path:
    """A file with all keys that are read."""
    folder = tmp_path / "model"
    folder.mkdir()
    Gguf().write(folder, dataclasses.replace(make_opened(), files={}), WriteOptions())
    return folder / "model.gguf"


@pytest.mark.parametrize("key", READ_KEYS)
def test_values_of_another_kind(
    model: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is refused, noted or without effect, at once and in few words."""
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / "cache"))
    for value in VALUES.values():
        path = with_value(model, key, value)
        start = time.process_time()
        try:
            notes = Gguf().open(path).notes
        except CheckpointError as error:
            assert len(str(error)) < 2_000  # noqa: PT017
        else:
            assert sum(map(len, notes)) < 2_000
        assert time.process_time() - start < 1


def with_value(path: Path, key: str, value: Any) -> Path:
    """A copy with a vocabulary, and with another value of one key."""
    reader = gguf.GGUFReader(path)
    target = path.with_name("other.gguf")
    target.unlink(missing_ok=True)  # the one before is still mapped
    writer = gguf.GGUFWriter(target, "gemma")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"piece {i}" for i in range(50)])
    writer.add_token_scores([-1.0 * i for i in range(50)])
    writer.add_token_types([1] * 50)
    values = writer.kv_data[0]
    for name, field in reader.fields.items():
        if name.startswith("gemma"):
            kinds = (*field.types, None)
            values[name] = gguf.GGUFValue(field.contents(), kinds[0], kinds[1])
    values[key] = gguf.GGUFValue(value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for path in (tmp_path / "model.gguf", tmp_path / "model"):
        os.mkfifo(path)
        assert not Gguf().detect(path)
        with pytest.raises(CheckpointError, match="is not a file"):
            Gguf().open(path)
    with pytest.raises(CheckpointError, match="is not a file"):
        Gguf().open(tmp_path)


def test_every_alignment_is_read(make_opened: Make, tmp_path: Path) -> None:
    path = written(make_opened(), tmp_path / "out")
    reader = gguf.GGUFReader(path)
    for alignment in (8, 16, 64, 4096):
        target = tmp_path / f"{alignment}.gguf"
        writer = gguf.GGUFWriter(target, "gemma")
        writer.add_custom_alignment(alignment)
        for name, field in reader.fields.items():
            if name.startswith("gemma"):
                writer.add_key_value(name, field.contents(), *(*field.types, None)[:2])
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found, expected = Gguf().open(target).weights, Gguf().open(path).weights
        for name in expected.names():
            assert found.read(name).tobytes() == expected.read(name).tobytes()


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


def test_a_short_fuzz() -> None:
    runs = os.environ.get("GGUF_FUZZ_RUNS", "3000")
    command = [sys.executable, str(FUZZ), "--runs", runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded" in done.stdout
    assert "refused" in done.stdout
