"""The designed checkpoints are what they are for: every dimension, norm and score counts."""

import itertools

import numpy as np
import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, TINY_ROW_ID
from gemma_hub_numpy.model import Reference


def _arrays(name: str) -> dict[str, np.ndarray]:
    weights = CHECKPOINTS[name].weights()
    return {each: weights.read(each) for each in weights.names()}


def test_the_main_one_has_no_two_equal_dimensions_and_no_default_value():
    config, default = GQA.config, GemmaConfig()
    sizes = [config.vocab_size, config.hidden_size, config.intermediate_size]
    sizes += [config.num_attention_heads * config.head_dim, config.num_attention_heads]
    sizes += [config.num_key_value_heads * config.head_dim, config.num_key_value_heads]
    sizes += [config.head_dim, config.num_hidden_layers, 23]
    assert len(set(sizes)) == len(sizes)
    for field in ("rms_norm_eps", "rope_theta", "max_position_embeddings", "pad_token_id"):
        assert getattr(config, field) != getattr(default, field)


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_norms_differ_and_are_neither_zero_nor_constant(name):
    norms = [array for key, array in _arrays(name).items() if "norm" in key]
    for norm in norms:
        assert norm.std() > 0.5
        assert np.all(norm != 0)
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(norms, 2))


def test_one_embedding_row_is_tiny():
    rows = np.linalg.norm(_arrays("gqa")["model.embed_tokens.weight"], axis=1)
    assert rows[TINY_ROW_ID] < 1e-3 * np.delete(rows, TINY_ROW_ID).min()


def test_numbers_have_full_float32_mantissas():
    for array in _arrays("gqa").values():
        assert array.dtype == np.float32
        assert np.mean(array.view(np.uint32) & 0xFFFF == 0) < 0.01


def test_scores_are_large_and_gates_reach_where_the_gelu_forms_differ():
    seen: dict[str, list[np.ndarray]] = {"scores": [], "gates": []}

    class Watched(Reference):
        def softmax(self, scores, visible):
            seen["scores"].append(scores[0][:, visible[0]])
            return super().softmax(scores, visible)

        def activation(self, x):
            seen["gates"].append(x)
            return super().activation(x)

    inputs = ModelInputs.prepare(GQA.config, [list(range(12, 35))])
    Watched(GQA.config, GQA.weights()).run(inputs)
    assert min(np.std(scores) for scores in seen["scores"]) > 1
    gates = np.concatenate([gate.ravel() for gate in seen["gates"]])
    assert np.mean(np.abs(np.abs(gates) - 2.7) < 0.5) > 0.05


def test_the_weights_are_the_same_every_time_and_other_for_another_name():
    one = _arrays("gqa")["model.norm.weight"]
    assert one[0] == np.float32(CHECKPOINTS["linear_rope"].weights().read("model.norm.weight")[0])
    other = CHECKPOINTS["untied"].weights().read("model.norm.weight")
    assert not np.array_equal(one, other)


def test_the_sharded_one_comes_back_from_several_files():
    weights = CHECKPOINTS["shards"].weights()
    expected = _arrays("gqa")
    assert set(weights.names()) == set(expected)
    assert all(np.array_equal(weights.read(name), array) for name, array in expected.items())
    assert "ArrayWeights" not in type(weights).__name__
