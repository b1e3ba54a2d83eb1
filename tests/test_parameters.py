"""The canonical parameter tree, and Weights over arrays."""

import ml_dtypes
import numpy as np
import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import (
    DTYPES,
    ArrayWeights,
    Weights,
    check_weights,
    parameter_shapes,
    shape_origin,
)

CONFIG = GemmaConfig(
    vocab_size=50,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


def with_changes(**changes) -> dict:
    return parameter_shapes(GemmaConfig(**({k: getattr(CONFIG, k) for k in FIELDS} | changes)))


FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def test_names_and_shapes_of_a_model():
    layer = {
        "self_attn.q_proj.weight": (24, 12),
        "self_attn.k_proj.weight": (12, 12),
        "self_attn.v_proj.weight": (12, 12),
        "self_attn.o_proj.weight": (12, 24),
        "mlp.gate_proj.weight": (20, 12),
        "mlp.up_proj.weight": (20, 12),
        "mlp.down_proj.weight": (12, 20),
        "input_layernorm.weight": (12,),
        "post_attention_layernorm.weight": (12,),
    }
    expected = {"model.embed_tokens.weight": (50, 12)}
    for i in range(2):
        expected |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    expected["model.norm.weight"] = (12,)
    assert parameter_shapes(CONFIG) == expected
    assert list(parameter_shapes(CONFIG)) == list(expected)


@pytest.mark.parametrize(("name", "count"), [("gemma-2b", 164), ("gemma-7b", 254)])
def test_released_models_have_the_published_number_of_tensors(name, count):
    assert len(parameter_shapes(GemmaConfig.preset(name))) == count


def test_shapes_of_the_7b_model():
    shapes = parameter_shapes(GemmaConfig.preset("gemma-7b"))
    assert shapes["model.layers.27.self_attn.q_proj.weight"] == (4096, 3072)
    assert shapes["model.layers.27.self_attn.o_proj.weight"] == (3072, 4096)


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"tie_word_embeddings": False}, {"lm_head.weight": (50, 12)}),
        (
            {"attention_bias": True, "num_hidden_layers": 1},
            {
                "model.layers.0.self_attn.q_proj.bias": (24,),
                "model.layers.0.self_attn.k_proj.bias": (12,),
                "model.layers.0.self_attn.v_proj.bias": (12,),
                "model.layers.0.self_attn.o_proj.bias": (12,),
            },
        ),
        (
            {"use_qk_norm": True, "num_hidden_layers": 1},
            {
                "model.layers.0.self_attn.q_norm.weight": (6,),
                "model.layers.0.self_attn.k_norm.weight": (6,),
            },
        ),
    ],
)
def test_parameters_that_a_config_adds(changes, added):
    plain = with_changes(num_hidden_layers=changes.get("num_hidden_layers", 2))
    assert dict(with_changes(**changes).items() - plain.items()) == added


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("model.embed_tokens.weight", "vocab_size=50, hidden_size=12"),
        (
            "model.layers.1.self_attn.k_proj.weight",
            "num_key_value_heads=2, head_dim=6, hidden_size=12",
        ),
        ("model.layers.0.mlp.down_proj.weight", "hidden_size=12, intermediate_size=20"),
        ("model.norm.weight", "hidden_size=12"),
    ],
)
def test_fields_that_a_shape_comes_from(name, origin):
    assert shape_origin(CONFIG, name) == origin


def test_array_weights_are_weights():
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros(2, DTYPES["bfloat16"]),
    }
    weights = ArrayWeights(arrays)
    assert isinstance(weights, Weights)
    assert weights.names() == ("a", "b")
    assert weights.shape("a") == (2, 3)
    assert (weights.dtype("a"), weights.dtype("b")) == ("float32", "bfloat16")
    assert weights.read("a") is arrays["a"]
    assert np.shares_memory(weights.read("a", slice(1, None)), arrays["a"])
    assert weights.read("a", (slice(None), 1)).tolist() == [1.0, 4.0]
    assert isinstance(weights.read("a", (1, 2)), np.ndarray)


def test_array_weights_do_not_see_later_names():
    arrays = {"a": np.zeros(2, np.float32)}
    weights = ArrayWeights(arrays)
    arrays["b"] = np.zeros(2, np.float32)
    assert weights.names() == ("a",)


@pytest.mark.parametrize(
    "dtype", [np.int32, np.bool_, np.complex64, ">f4", np.longdouble, ml_dtypes.float8_e4m3fn]
)
def test_array_weights_of_another_type(dtype):
    with pytest.raises(CheckpointError, match=r"x holds .*; expected one of float64, float32"):
        ArrayWeights({"x": np.zeros(2, dtype)})


def test_unknown_name_in_array_weights():
    weights = ArrayWeights({"model.norm.weight": np.zeros(2, np.float32)})
    for method in (weights.read, weights.shape, weights.dtype):
        with pytest.raises(
            CheckpointError, match=r"'model\.norms\.weight'\. Did you mean 'model\.n"
        ):
            method("model.norms.weight")


def test_weights_that_do_not_fit_are_refused_by_name():
    shapes = parameter_shapes(CONFIG)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    check_weights(CONFIG, "causal_lm", ArrayWeights(arrays | {"surplus": np.zeros(1)}))
    norm = "model.norm.weight"
    less = ArrayWeights({name: array for name, array in arrays.items() if name != norm})
    with pytest.raises(CheckpointError, match=rf"missing: {norm}\. Give the config.json"):
        check_weights(CONFIG, "causal_lm", less)
    other = ArrayWeights(arrays | {norm: np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match=rf"wrong shape: {norm} \(1,\) instead of \("):
        check_weights(CONFIG, "causal_lm", other)
