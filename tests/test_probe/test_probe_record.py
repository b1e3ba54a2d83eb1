"""gemma_hub_probe.json: what is written, and what a damaged or hostile one gives."""

import copy
import json
import random

import numpy as np
import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes
from gemma_hub.probe import PROBE_FILE, needed_probe, read_probe, reference_probe

SIZES = {
    "vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
TASKS = {
    "causal_lm": (32, 32),
    "base": (32, 24),
    "sequence_classification": (8, 2),
    "token_classification": (32, 2),
}


def make(task="causal_lm", dtype="float32", **changes):
    config = GemmaConfig(**{**SIZES, **changes})
    draw = np.random.default_rng(3).normal
    arrays = {
        name: draw(size=shape, scale=0.5).astype(DTYPES[dtype])
        for name, shape in parameter_shapes(config, task).items()
    }
    return config, ArrayWeights(arrays)


@pytest.fixture
def written(tmp_path):
    """A folder with a probe, its config, and the record in it."""
    config, weights = make()
    record = reference_probe(config, "causal_lm", weights, "float32").to_dict()
    (tmp_path / PROBE_FILE).write_text(json.dumps(record))
    return tmp_path, config, record


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_there_and_back(tmp_path, task, dtype):
    config, weights = make(task, dtype)
    probe = reference_probe(config, task, weights, dtype)
    assert probe.values.shape == TASKS[task]
    assert probe.noise.dtype == ("float32" if dtype == "float64" else dtype)
    (tmp_path / PROBE_FILE).write_text(json.dumps(probe.to_dict()))
    read = read_probe(tmp_path, config)
    assert read.task == task
    assert read.dtype == "float64"
    np.testing.assert_array_equal(read.token_ids, probe.token_ids)
    np.testing.assert_array_equal(read.columns, probe.columns)
    np.testing.assert_array_equal(read.values, probe.values)
    np.testing.assert_allclose(read.noise.elements, probe.noise.elements, rtol=1e-3)
    np.testing.assert_allclose(read.noise.tokens, probe.noise.tokens, rtol=1e-3)
    assert read.made_by["backend"] == "numpy"
    assert {"gemma-hub", "gemma-hub-numpy", "Python", "numpy"} <= set(read.made_by)


def test_the_input_is_fixed_and_touches_the_whole_vocabulary():
    config, weights = make(vocab_size=5000, pad_token_id=390)
    probe = reference_probe(config, "causal_lm", weights, "float32")
    again = reference_probe(config, "causal_lm", weights, "float32")
    np.testing.assert_array_equal(probe.token_ids, again.token_ids)
    np.testing.assert_array_equal(probe.values, again.values)
    assert (probe.token_ids[:, 0] == config.bos_token_id).all()
    assert config.pad_token_id not in probe.token_ids
    assert probe.token_ids.max() > 4900
    assert not set(probe.token_ids.ravel()) & set(probe.columns) - {config.bos_token_id}


def test_values_are_log_probabilities():
    config, weights = make(vocab_size=32)
    probe = reference_probe(config, "causal_lm", weights, "float32")
    np.testing.assert_allclose(np.exp(probe.values).sum(axis=-1), 1, rtol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 5}, {"hidden_size": 2}, {"max_position_embeddings": 3}, {"bos_token_id": None}],
    ids=str,
)
def test_a_very_small_model_has_a_probe(tmp_path, changes):
    config, weights = make(**changes)
    probe = reference_probe(config, "causal_lm", weights, "float32")
    (tmp_path / PROBE_FILE).write_text(json.dumps(probe.to_dict()))
    assert read_probe(tmp_path, config).values.shape == probe.values.shape


def test_no_probe_is_made_of_results_that_are_not_finite():
    config, weights = make()
    weights.read("model.norm.weight")[3] = np.inf
    assert reference_probe(config, "causal_lm", weights, "float32") is None


def test_the_progress_reaches_the_total():
    config, weights = make()
    seen = []
    reference_probe(config, "causal_lm", weights, "float32", lambda *at: seen.append(at))
    assert seen[-1] == (4 * len(weights.names()),) * 2
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))


def test_a_folder_without_a_probe(tmp_path):
    config, _ = make()
    assert read_probe(tmp_path, config) is None
    with pytest.raises(CheckpointError, match=r"no gemma_hub_probe.json.*gemma-hub convert"):
        needed_probe(tmp_path, config)


def change(record, key, value):
    """A copy of `record` with one entry, "noise.tokens" or "values", changed."""
    changed = copy.deepcopy(record)
    *path, last = key.split(".")
    inner = changed
    for part in path:
        inner = inner[part]
    inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "version is 2"),
        ("task", "poetry", "task is 'poetry'"),
        ("task", ["causal_lm"], "task is"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("token_ids", [[2, 70]], "token_ids go from 2 to 70"),
        ("token_ids", [[-1]], "token_ids go from -1"),
        ("token_ids", [[2.5]], "no integers"),
        ("token_ids", [[2**70]], "no integers"),
        ("token_ids", [[True]], "no integers"),
        ("token_ids", [[1, 2], [3]], "is no probe"),
        ("token_ids", [2], "no integers"),
        ("token_ids", [], "no integers"),
        ("token_ids", [[1] * 257], "more than a probe may have"),
        ("columns", [70], "columns go from 70"),
        ("columns", [0] * 257, "257 columns"),
        ("values", [[0.0]], r"no numbers of shape \(32, 32\)"),
        ("values", [["x"] * 32] * 32, "no numbers"),
        ("values", [[float("nan")] * 32] * 32, "not all finite"),
        ("noise.dtype", "x", "noise's dtype is 'x'"),
        ("noise.tokens", [1.0] * 32, "noise is not between"),
        ("noise.tokens", [0.0] * 32, "noise is not between"),
        ("noise.elements", [[-1.0] * 32] * 32, "noise is not between"),
        ("noise.tokens", [1e-7] * 31, r"shape \(32,\)"),
        ("noise", [1], "is no probe"),
        ("made_by", {"x": 1}, "made_by"),
        ("made_by", "me", "made_by"),
    ],
)
def test_a_wrong_record_is_an_error(written, key, value, message):
    folder, config, record = written
    (folder / PROBE_FILE).write_text(json.dumps(change(record, key, value)))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_probe(folder, config)
    assert PROBE_FILE in str(caught.value)


def test_a_missing_entry_is_named(written):
    folder, config, record = written
    for key in record:
        (folder / PROBE_FILE).write_text(json.dumps({k: record[k] for k in record if k != key}))
        with pytest.raises(CheckpointError, match=f"it has no '{key}'"):
            read_probe(folder, config)


def test_a_probe_of_another_model_is_an_error(written):
    folder, _, _ = written
    with pytest.raises(CheckpointError, match="expected 0 to below 60"):
        read_probe(folder, GemmaConfig(**{**SIZES, "vocab_size": 60}))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (5 << 20)], ids=len
)
def test_what_is_no_record_is_an_error(written, content):
    folder, config, _ = written
    (folder / PROBE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=PROBE_FILE):
        read_probe(folder, config)


def test_mutated_files_give_a_probe_or_an_error(written):
    folder, config, record = written
    content = json.dumps(record).encode()
    random.seed(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(len(damaged))] = random.choice(b'0123456789-e.,[]{}":ntf')
        (folder / PROBE_FILE).write_bytes(damaged)
        try:
            probe = read_probe(folder, config)
        except CheckpointError:
            continue
        assert np.isfinite(probe.values).all()
