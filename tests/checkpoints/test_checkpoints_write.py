"""save_checkpoint writes the whole checkpoint or nothing, and what it writes is read back."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_bit_equal(folder: Path, arrays) -> None:
    weights = open_checkpoint(folder).weights
    assert set(weights.names()) == set(arrays)
    for name, array in arrays.items():
        assert weights.read(name).dtype == array.dtype
        assert weights.read(name).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 1500, 1])
def test_round_trip_is_bit_equal(tmp_path, config, make_arrays, dtype, max_shard_bytes):
    arrays = make_arrays(dtype)
    arrays[Q_PROJ].reshape(-1)[:5] = np.array([0.0, -0.0, np.inf, np.nan, 1e-40])
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays), max_shard_bytes=max_shard_bytes)
    assert_bit_equal(tmp_path / "out", arrays)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config == dataclasses.replace(config, dtype=dtype)


def test_the_safetensors_library_reads_the_file(tmp_path, config, arrays):
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays))
    file = tmp_path / "out" / "model.safetensors"
    read = load_file(file)
    assert {name: array.tobytes() for name, array in read.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    with safe_open(file, framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_tensor_data_begins_at_a_line_of_the_processors_cache(tmp_path, config, arrays):
    save_checkpoint(tmp_path / "model", config, ArrayWeights(arrays))
    with (tmp_path / "model" / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    assert (8 + length) % 64 == 0
    assert json.loads(header)  # spaces behind it are JSON too


def test_files_of_a_single_file_checkpoint(tmp_path, config, arrays):
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays))
    assert set(content(tmp_path / "out")) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def test_shards_are_filled_in_order_up_to_the_size(tmp_path, config, arrays):
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays), max_shard_bytes=1500)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert list(index["weight_map"])
    assert set(index["weight_map"]) == set(arrays)
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert [index["weight_map"][name] for name in arrays] == sorted(index["weight_map"].values())
    sizes = [sum(a.nbytes for a in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 1500
    assert all(one + other > 1000 for one, other in itertools.pairwise(sizes))


def test_mixed_types_are_aligned(tmp_path, config):
    odd = dataclasses.replace(config, vocab_size=23, hidden_size=9)
    mixed = {
        name: np.ones(shape, np.float32 if "norm" in name else DTYPES["bfloat16"])
        for name, shape in parameter_shapes(odd).items()
    }
    save_checkpoint(tmp_path / "out", odd, ArrayWeights(mixed))
    assert_bit_equal(tmp_path / "out", mixed)
    weights = open_checkpoint(tmp_path / "out").weights
    for name in mixed:
        assert np.shares_memory(weights.read(name), weights.read(name)), name
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["torch_dtype"] == "bfloat16"


def test_eos_list_and_absent_ids(tmp_path, config, arrays):
    chat = dataclasses.replace(config, eos_token_id=(1, 7), bos_token_id=None)
    save_checkpoint(tmp_path / "out", chat, ArrayWeights(arrays))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, 7], "pad_token_id": 0}
    assert open_checkpoint(tmp_path / "out").eos_token_ids == (1, 7)


def test_files_are_copied_and_a_generation_config_is_kept(tmp_path, config, arrays):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 9], "top_k": 64}')
    files = [tmp_path / "tokenizer.model", str(tmp_path / "generation_config.json")]
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays), files=files)
    written = content(tmp_path / "out")
    assert written["tokenizer.model"] == b"pieces"
    assert written["generation_config.json"] == b'{"eos_token_id": [1, 9], "top_k": 64}'
    assert open_checkpoint(tmp_path / "out").eos_token_ids == (1, 9)


def test_tensors_of_any_layout_in_memory(tmp_path, config, make_arrays):
    arrays = make_arrays("float32")
    strange = dict(arrays)
    strange[Q_PROJ] = np.asfortranarray(arrays[Q_PROJ])
    strange["model.norm.weight"] = np.repeat(arrays["model.norm.weight"], 2)[::2]
    save_checkpoint(tmp_path / "out", config, ArrayWeights(strange))
    assert_bit_equal(tmp_path / "out", arrays)


def test_progress_counts_every_byte(tmp_path, config, arrays):
    seen = []
    save_checkpoint(
        tmp_path / "out",
        config,
        ArrayWeights(arrays),
        max_shard_bytes=1500,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(array.nbytes for array in arrays.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(set(seen))
    assert len(seen) == len(arrays)


# -- what is refused, before anything is written ---------------------------------------------------


def test_weights_that_do_not_fit_the_config(tmp_path, config, make_arrays):
    arrays = make_arrays()
    arrays["extra"] = arrays.pop("model.norm.weight")
    arrays[Q_PROJ] = arrays[Q_PROJ].T
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays))
    assert str(caught.value).splitlines()[1:] == [
        "  Missing (1): model.norm.weight.",
        "  Unexpected (1): extra.",
        f"  Misshapen (1): {Q_PROJ} is (12, 32), expected (32, 12) from num_attention_heads=4, "
        "head_dim=8, hidden_size=12.",
    ]
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_copied(tmp_path, config, arrays):
    weights = ArrayWeights(arrays)
    with pytest.raises(CheckpointNotFoundError, match=r"no file .*tokenizer"):
        save_checkpoint(tmp_path / "out", config, weights, files=[tmp_path / "tokenizer.model"])
    (tmp_path / "a").mkdir()
    for name in ("config.json", "model.safetensors", INDEX, "tokenizer.model"):
        (tmp_path / "a" / name).write_text("{}")
        twice = [tmp_path / "a" / name] * 2
        with pytest.raises(CheckpointError, match=f"{name} cannot be copied"):
            save_checkpoint(tmp_path / "out", config, weights, files=twice)
    assert not (tmp_path / "out").exists()


def test_malformed_generation_config_is_not_copied(tmp_path, config, arrays):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        save_checkpoint(
            tmp_path / "out",
            config,
            ArrayWeights(arrays),
            files=[tmp_path / "generation_config.json"],
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["generation_config.json"]


def test_weights_that_read_as_something_else(tmp_path, config, make_arrays):
    class Wrong(ArrayWeights):
        def read(self, name, index=None):
            return super().read(name, index).astype(np.float32)

    with pytest.raises(CheckpointError, match=r"announced as bfloat16 .* reads as float32"):
        save_checkpoint(tmp_path / "out", config, Wrong(make_arrays()))
    assert not list(tmp_path.iterdir())


def test_target_that_exists(tmp_path, config, arrays, make_arrays):
    weights = ArrayWeights(arrays)
    save_checkpoint(tmp_path / "out", config, weights)
    before = content(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out exists already.*overwrite=True"):
        save_checkpoint(tmp_path / "out", config, weights)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file"):
        save_checkpoint(tmp_path / "file", config, weights, overwrite=True)
    assert content(tmp_path / "out") == before


def test_empty_target_is_taken(tmp_path, config, arrays):
    (tmp_path / "out").mkdir()
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays))
    assert_bit_equal(tmp_path / "out", arrays)


def test_parent_folders_are_made(tmp_path, config, arrays):
    save_checkpoint(tmp_path / "a" / "b" / "out", config, ArrayWeights(arrays))
    assert_bit_equal(tmp_path / "a" / "b" / "out", arrays)


def test_overwrite_replaces_the_whole_folder(tmp_path, config, make_arrays):
    save_checkpoint(tmp_path / "out", config, ArrayWeights(make_arrays()), max_shard_bytes=1500)
    arrays = make_arrays("float32")
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays), overwrite=True)
    assert_bit_equal(tmp_path / "out", arrays)
    assert set(content(tmp_path / "out")) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_overwrite_through_a_link(tmp_path, config, make_arrays):
    save_checkpoint(tmp_path / "real", config, ArrayWeights(make_arrays()))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    arrays = make_arrays("float32")
    save_checkpoint(tmp_path / "link", config, ArrayWeights(arrays), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert_bit_equal(tmp_path / "real", arrays)


def test_overwrite_of_the_folder_that_the_weights_are_mapped_from(tmp_path, config, arrays):
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays))
    mapped = open_checkpoint(tmp_path / "out").weights
    save_checkpoint(tmp_path / "out", config, mapped, overwrite=True, max_shard_bytes=1500)
    assert_bit_equal(tmp_path / "out", arrays)
    assert mapped.read(Q_PROJ).tobytes() == arrays[Q_PROJ].tobytes()


@pytest.mark.parametrize("name", ["notes.txt", "config.json/x", "src/main.py"])
def test_overwrite_spares_what_is_not_a_checkpoint(tmp_path, config, arrays, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    if name.startswith("src"):
        (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not replaced: it h"):
        save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays), overwrite=True)
    assert file.read_text() == "years of work"


# -- failures half-way -----------------------------------------------------------------------------


def test_full_disk(tmp_path, config, make_arrays):
    save_checkpoint(tmp_path / "out", config, ArrayWeights(make_arrays()))
    before = content(tmp_path / "out")
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write past the limit fails half-way, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"out cannot be written: .*\d bytes of disk"):
            save_checkpoint(
                tmp_path / "out", config, ArrayWeights(make_arrays("float64")), overwrite=True
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path / "out") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, config, make_arrays):
    save_checkpoint(tmp_path / "out", config, ArrayWeights(make_arrays()))
    before = content(tmp_path / "out")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(
            tmp_path / "out",
            config,
            ArrayWeights(make_arrays("float32")),
            overwrite=True,
            progress=interrupt,
        )
    assert content(tmp_path / "out") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_failed_rename_brings_the_old_checkpoint_back(tmp_path, config, make_arrays, monkeypatch):
    save_checkpoint(tmp_path / "out", config, ArrayWeights(make_arrays()))
    before = content(tmp_path / "out")
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_checkpoint(
            tmp_path / "out", config, ArrayWeights(make_arrays("float32")), overwrite=True
        )
    assert content(tmp_path / "out") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, sys
from pathlib import Path
from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
old = open_checkpoint(sys.argv[1])
save_checkpoint(sys.argv[2], old.config, old.weights, overwrite=True,
                progress=lambda done, total: os._exit(9) if done * 2 > total else None)
"""


@pytest.mark.parametrize("is_there", [True, False])
def test_process_killed_half_way(tmp_path, config, make_arrays, is_there):
    arrays = make_arrays()
    save_checkpoint(tmp_path / "source", config, ArrayWeights(make_arrays("float32")))
    if is_there:
        save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "source"), str(tmp_path / "out")]
    assert subprocess.run(command, env=dict(os.environ), check=False).returncode == 9
    if is_there:
        assert_bit_equal(tmp_path / "out", arrays)
    else:
        assert not (tmp_path / "out").exists()
