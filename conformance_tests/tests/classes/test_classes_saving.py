"""What the model classes write, transformers reads bit for bit; and which checkpoints they read."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gemma_hub.config import ARCHITECTURES
from gemma_hub.errors import CheckpointError, InputError, NewHeadWarning

TASKS = tuple(ARCHITECTURES)
SHARD = 20_000
# What transformers must read from our config.json as it was in its own.
FIELDS = """
    attention_bias bos_token_id eos_token_id head_dim hidden_act hidden_size id2label
    intermediate_size max_position_embeddings num_attention_heads num_hidden_layers
    num_key_value_heads num_labels pad_token_id problem_type rms_norm_eps rope_parameters
    tie_word_embeddings vocab_size
"""
IDS = np.random.default_rng(5).integers(6, 61, (3, 11))


def read_by_transformers(task: str, path: Path) -> Any:
    model, info = getattr(transformers, ARCHITECTURES[task]).from_pretrained(
        path, dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def assert_same(model: Any, original: Any, dtype: torch.dtype = torch.float32) -> None:
    expected = original.state_dict()
    got = model.state_dict()
    assert list(got) == list(expected)
    for name, tensor in got.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, expected[name].to(dtype)), name
    for field in FIELDS.split():
        ours, theirs = getattr(model.config, field), getattr(original.config, field)
        assert ours == theirs, field


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(IDS))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", TASKS)
def test_transformers_reads_what_a_class_saves(
    written: Any, models: Any, task: str, dtype: str, tmp_path: Path
) -> None:
    original, path = written(task)
    model = models.read(task, path, dtype=dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_bytes=SHARD)
    assert len(list((tmp_path / "saved").glob("model-*-of-*.safetensors"))) > 2
    again = read_by_transformers(task, tmp_path / "saved")
    assert type(again).__name__ == ARCHITECTURES[task]
    assert_same(again, original, getattr(torch, dtype))
    if dtype == "float32":
        assert torch.equal(answer(again), answer(original))


@pytest.mark.parametrize("shape", ["mqa", "gqa", "mha"])
@pytest.mark.parametrize("task", TASKS)
def test_a_model_comes_back_from_its_way_through_both_frameworks(
    written: Any, both: Any, task: str, shape: str, tmp_path: Path
) -> None:
    labels = {} if task in {"base", "causal_lm"} else {"id2label": {0: "no", 1: "yes"}}
    extra = {"problem_type": "regression"} if task == "sequence_classification" else {}
    original, path = written(task, shape, **labels, **extra, num_labels=(len(labels) and 2) or 3)
    for number, models in enumerate(both):
        model = models.framework.kind(task).from_pretrained(path)
        path = tmp_path / str(number)
        model.save_pretrained(path)
    again = read_by_transformers(task, path)
    assert_same(again, original)
    assert torch.equal(answer(again), answer(original))


@pytest.mark.parametrize("shape", ["mqa", "gqa"])
def test_files_with_and_without_the_prefix_load_into_either_kind(
    written: Any, models: Any, shape: str
) -> None:
    bare, with_prefix = written("base", shape), written("causal_lm", shape)
    assert any(name == "embed_tokens.weight" for name in tensor_names(bare[1]))
    assert any(name == "model.embed_tokens.weight" for name in tensor_names(with_prefix[1]))
    model = models.read("base", with_prefix[1])
    for name, value in models.parameters(model).items():
        expected = with_prefix[0].model.get_parameter(name)
        assert np.array_equal(value, expected.detach().numpy()), name
    if not bare[0].config.tie_word_embeddings:
        with pytest.raises(CheckpointError, match=r"Missing \(1\): lm_head.weight"):
            models.read("causal_lm", bare[1])
        return
    model = models.read("causal_lm", bare[1])
    for name, value in models.parameters(model).items():
        expected = bare[0].get_parameter(name.removeprefix("model."))
        assert np.array_equal(value, expected.detach().numpy()), name


def tensor_names(path: Path) -> list[str]:
    index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return list(index["weight_map"])


@pytest.mark.parametrize("source", ["base", "causal_lm"])
@pytest.mark.parametrize("task", TASKS[2:])
def test_a_new_head_is_the_same_in_both_frameworks(
    written: Any, both: Any, task: str, source: str
) -> None:
    _, path = written(source, "mqa")
    heads = []
    for models in both:
        with pytest.raises(CheckpointError, match=r"no score head.*Pass num_labels"):
            models.framework.kind(task).from_pretrained(path)
        for seed in (7, 8):
            with pytest.warns(NewHeadWarning, match=rf"num_labels=4 .* seed {seed}"):
                model = models.framework.kind(task).from_pretrained(path, num_labels=4, seed=seed)
            assert model.config.num_labels == 4
            parameters = models.parameters(model)
            heads.append({name: v for name, v in parameters.items() if name.startswith("score")})
    weights = [head["score.weight"] for head in heads]
    assert weights[0].shape == (4, 40)
    assert 0.01 < weights[0].std() < 0.03  # initializer_range
    assert np.array_equal(weights[0], weights[2])
    assert np.array_equal(weights[1], weights[3])
    assert not np.array_equal(weights[0], weights[1])
    assert ("score.bias" in heads[0]) == ("score.bias" in heads[2]) == (task == TASKS[3])


def test_a_new_head_is_used_and_saved(written: Any, models: Any, tmp_path: Path) -> None:
    _, path = written("base")
    kind = models.framework.kind("sequence_classification")
    with pytest.warns(NewHeadWarning):
        model = kind.from_pretrained(path, num_labels=4)
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings(action="error"):
        again = kind.from_pretrained(tmp_path / "saved", num_labels=4)
    first, second = (models.call(m, input_ids=IDS).logits for m in (model, again))
    assert first.shape == (3, 4)
    assert np.array_equal(first, second)
    theirs = read_by_transformers("sequence_classification", tmp_path / "saved")
    np.testing.assert_allclose(first, answer(theirs).numpy(), rtol=0, atol=1e-4)


def test_what_cannot_be_read_or_written(written: Any, models: Any, tmp_path: Path) -> None:
    _, path = written("token_classification")
    sequence, token = map(models.framework.kind, TASKS[2:])
    with pytest.raises(CheckpointError, match="a bias is a token classifier's"):
        sequence.from_pretrained(path)
    with pytest.raises(CheckpointError, match="without a bias is a sequence classifier's"):
        token.from_pretrained(written("sequence_classification")[1])
    with pytest.raises(CheckpointError, match="num_labels is 5"):
        token.from_pretrained(path, num_labels=5)
    with pytest.raises(InputError, match="the task 'causal_lm' has no labels"):
        models.framework.kind("causal_lm").from_pretrained(path, num_labels=3)
    with pytest.raises(InputError, match="dtype is 'float8'"):
        token.from_pretrained(path, dtype="float8")
    model = models.read("token_classification", path)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="exists already"):
        model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", overwrite=True)
