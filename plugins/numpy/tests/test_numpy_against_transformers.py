"""The reference against Hugging Face transformers, in float64: see `double_precision`."""

import numpy as np
import pytest

from gemma_hub.inputs import ModelInputs
from gemma_hub_numpy.model import Reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def assert_equal(actual, expected, real, tolerance=1e-12):
    """Every real token's vector equal within `tolerance`, relative to its length."""
    actual, expected = actual[real], expected.detach().numpy()[real]
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= tolerance


VARIANTS = {
    "gqa": {},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
    "mha": {"num_attention_heads": 3, "num_key_value_heads": 3, "rope_theta": 500_000.0},
    "bias": {"attention_bias": True},
    "untied": {"tie_word_embeddings": False},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "all at once": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "linear", "factor": 4},
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.usefixtures("double_precision")
def test_logits_and_every_hidden_state(
    changes, make_config, make_weights, make_transformers, run_transformers, ids, ragged_mask
):
    config = make_config(**changes)
    weights = make_weights(config)
    inputs = ModelInputs.prepare(config, ids, ragged_mask, output_hidden_states=True)
    expected = run_transformers(make_transformers(config, weights), inputs)
    actual = Reference(config, weights).run(inputs)
    assert_equal(actual.logits, expected.logits, inputs.attention_mask)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 4
    for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_equal(mine, theirs, inputs.attention_mask)


@pytest.mark.parametrize("first", [250, 4001, 8192 - 23])
@pytest.mark.usefixtures("double_precision")
def test_late_positions(first, config, weights, make_transformers, run_transformers, ids):
    positions = np.arange(first, first + 23)[None]
    inputs = ModelInputs.prepare(config, ids, position_ids=positions)
    expected = run_transformers(make_transformers(config, weights), inputs)
    # An angle of 8191 radians has 13 bits less behind the point, in either library.
    assert_equal(
        Reference(config, weights).run(inputs).logits,
        expected.logits,
        inputs.attention_mask,
        tolerance=1e-11,
    )


@pytest.mark.usefixtures("double_precision")
def test_positions_with_gaps(config, weights, make_transformers, run_transformers, ids):
    positions = np.concatenate([np.arange(9), np.arange(309, 316), np.arange(7)])[None]
    inputs = ModelInputs.prepare(config, ids, position_ids=positions)
    expected = run_transformers(make_transformers(config, weights), inputs)
    actual = Reference(config, weights).run(inputs)
    assert_equal(actual.logits, expected.logits, inputs.attention_mask)


def test_unchanged_transformers_differs_by_float32_rounding_only(
    config, weights, make_transformers, run_transformers, ids
):
    # No padding: with it, an unchanged float64 transformers gives NaN, because its mask value, the
    # least float64, is minus infinity in the softmax's float32.
    inputs = ModelInputs.prepare(config, ids)
    expected = run_transformers(make_transformers(config, weights), inputs)
    actual = Reference(config, weights).run(inputs).logits
    real = inputs.attention_mask
    assert_equal(actual, expected.logits, real, tolerance=1e-5)
    with pytest.raises(AssertionError):  # or `double_precision` would be needless
        assert_equal(actual, expected.logits, real)


@pytest.fixture
def gemma2(double_precision, make_config, make_weights):
    """Transformers' Gemma 2 with both soft-caps and windows of 5, and the reference."""
    types = ("sliding_attention", "full_attention", "sliding_attention")
    shared = {
        "query_pre_attn_scalar": 24,
        "layer_types": types,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }
    config = make_config(**shared)
    weights = make_weights(config)
    theirs = {"rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"}}
    for key in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim rms_norm_eps pad_token_id"
    ).split():
        theirs[key] = getattr(config, key)
    theirs |= shared | {"layer_types": list(types), "attn_implementation": "eager"}
    model = (
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**theirs)).to(torch.float64).eval()
    )
    state = {name: torch.tensor(weights.read(name)).double() for name in weights.names()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    result = model.load_state_dict(state, strict=False)
    assert all("feedforward_layernorm" in name for name in result.missing_keys)
    return model, Reference(config, weights)


def test_windows_and_soft_caps_of_gemma2(gemma2, run_transformers, ids, ragged_mask):
    model, reference = gemma2
    inputs = ModelInputs.prepare(reference.config, ids, ragged_mask, output_hidden_states=True)
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])),
            with_kwargs=True,
        )
    outputs = run_transformers(model, inputs)
    real = inputs.attention_mask
    assert len(seen) == 3
    for i, (x, expected) in enumerate(seen):
        actual = reference.attention(i, x.detach().numpy(), inputs.position_ids, real, 0, None)
        assert_equal(actual, expected, real)
    logits = reference.head(outputs.hidden_states[-1].detach().numpy())
    assert np.abs(logits).max() > 2  # the cap of 3 bites
    assert_equal(logits, outputs.logits, real)
