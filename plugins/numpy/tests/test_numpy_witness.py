"""Witnesses: legal, of the right size, different by seed and the same for one seed."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import DTYPES, ArrayWeights
from gemma_hub_numpy.model import Reference, Witness, round_randomly

UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def cast(weights, dtype):
    """The weights in a type, so that rounding them is no part of the error."""
    return ArrayWeights(
        {name: weights.read(name).astype(DTYPES[dtype]) for name in weights.names()}
    )


def error(actual, expected):
    """Root mean square over tokens of the relative error of a token's vector."""
    lengths = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return np.sqrt((lengths**2).mean())


@pytest.mark.parametrize("dtype", UNIT)
def test_a_witness_is_off_by_rounding_noise(dtype, config, weights, ids, ragged_mask):
    held = cast(weights, dtype)
    inputs = ModelInputs.prepare(config, ids, ragged_mask)
    expected = Reference(config, held).run(inputs).logits[inputs.attention_mask]
    errors = []
    for seed in range(6):
        logits = Witness(config, held, dtype, seed).run(inputs).logits[inputs.attention_mask]
        errors.append(error(logits, expected) / UNIT[dtype])
    assert min(errors) > 0.1
    assert max(errors) < 40  # float32 sums add their own rounding to that of storing
    assert max(errors) < 1.5 * min(errors)  # one distribution, not a lucky draw


@pytest.mark.parametrize("dtype", UNIT)
def test_witnesses_average_to_the_reference(dtype, config, weights, ids):
    held = cast(weights, dtype)
    inputs = ModelInputs.prepare(config, ids)
    expected = Reference(config, held).run(inputs).logits
    drawn = [Witness(config, held, dtype, seed).run(inputs).logits for seed in range(16)]
    alone = np.mean([error(logits, expected) for logits in drawn])
    assert error(np.mean(drawn, axis=0), expected) < 0.5 * alone  # 1/4 if they are independent


@pytest.mark.parametrize("dtype", UNIT)
def test_one_seed_is_one_implementation(dtype, config, weights, ids):
    inputs = ModelInputs.prepare(config, ids)
    model = Witness(config, weights, dtype, 3)
    first, again = model.run(inputs).logits, model.run(inputs).logits
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, Witness(config, weights, dtype, 3).run(inputs).logits)
    assert (first != Witness(config, weights, dtype, 4).run(inputs).logits).mean() > 0.3


@pytest.mark.parametrize("dtype", UNIT)
def test_what_is_stored_fits_the_type(dtype, config, weights, ids):
    inputs = ModelInputs.prepare(config, ids, output_hidden_states=True)
    model = Witness(config, weights, dtype, 0)
    outputs = model.run(inputs)
    embeddings = model.parameter("model.embed_tokens.weight")
    for array in (outputs.logits, *outputs.hidden_states, embeddings):
        np.testing.assert_array_equal(array, array.astype(DTYPES[dtype]).astype(np.float64))


def test_angles_and_scores_are_float32_whatever_the_type(config, weights):
    model = Witness(config, weights, "bfloat16", 0)
    random = np.random.default_rng(0)
    positions = random.integers(0, 8192, (3, 23))
    q, k = model.store(random.normal(size=(2, 3, 23, 6, 16)))
    for array in (model.angles(positions, 0), model.scores(q, k[:, :, :2])):
        np.testing.assert_array_equal(array, array.astype(np.float32).astype(np.float64))
        assert (array != array.astype(ml_dtypes.bfloat16).astype(np.float64)).mean() > 0.5


@pytest.mark.parametrize("dtype", UNIT)
def test_parameters_are_rounded_to_nearest(dtype, config, weights):
    name = "model.layers.1.mlp.up_proj.weight"
    nearest = weights.read(name).astype(DTYPES[dtype]).astype(np.float64)
    np.testing.assert_array_equal(Witness(config, weights, dtype, 0).parameter(name), nearest)


@pytest.mark.parametrize(
    ("dtype", "width", "scale"),
    [("bfloat16", 3072, 55.5), ("float16", 3072, 55.4375), ("bfloat16", 2048, 45.25)],
)
def test_the_embedding_scale_is_rounded(dtype, width, scale, config, weights):
    wide = dataclasses.replace(config, hidden_size=width)
    assert Witness(wide, weights, dtype, 0).embedding_scale() == scale


def test_sums_are_taken_in_float32_in_another_order(config, weights):
    model = Witness(config, weights, "bfloat16", 0)
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 5, 300)).astype(np.float32), random.normal(size=(7, 300))
    b = b.astype(np.float32)
    drawn = np.stack([model.contract("bti,oi->bto", a, b) for _ in range(8)])
    exact = np.einsum("bti,oi->bto", a.astype(np.float64), b.astype(np.float64))
    scale = np.einsum("bti,oi->bto", np.abs(a), np.abs(b))
    assert drawn.std(axis=0).max() > 0
    np.testing.assert_array_equal(drawn, drawn.astype(np.float32).astype(np.float64))
    assert (np.abs(drawn - exact) / scale).max() < 300 * UNIT["float32"]


@pytest.mark.parametrize("dtype", UNIT)
def test_rounding_is_to_a_neighbour_and_unbiased(dtype):
    random = np.random.default_rng(0)
    kind = DTYPES[dtype]
    value = random.normal(size=1000) * 2.0 ** random.integers(-12, 12, 1000)
    nearest = value.astype(kind)
    below = np.where(nearest <= value, nearest, np.nextafter(nearest, kind.type(-np.inf)))
    above = np.where(below == value, below, np.nextafter(below.astype(kind), kind.type(np.inf)))
    drawn = np.stack([round_randomly(value, dtype, random) for _ in range(400)])
    assert ((drawn == below) | (drawn == above)).all()
    step = above.astype(np.float64) - below.astype(np.float64)
    bias = (drawn.mean(axis=0) - value) / step
    assert np.abs(bias).max() < 0.125  # five standard deviations of a mean of 400 draws
    assert abs(bias.mean()) < 0.005


@pytest.mark.parametrize("dtype", UNIT)
def test_rounding_at_the_ends_of_the_range(dtype):
    random = np.random.default_rng(0)
    kind = ml_dtypes.finfo(DTYPES[dtype])
    largest, tiny = float(kind.max), float(kind.smallest_subnormal)
    kept = np.array([0.0, -0.0, 1.0, -1.5, largest, -largest, tiny, np.inf, -np.inf])
    np.testing.assert_array_equal(round_randomly(kept, dtype, random), kept)
    past = round_randomly(np.array([largest * 2, -largest * 2]), dtype, random)
    np.testing.assert_array_equal(past, [np.inf, -np.inf])
    small = round_randomly(np.full(100, tiny / 2), dtype, random)
    assert set(small) == {0.0, tiny}
    assert np.isnan(round_randomly(np.array([np.nan]), dtype, random)).all()


def test_a_witness_of_transformers_size(config, weights, ids, ragged_mask):
    """Transformers in float32 is a legal implementation, so its error is that of a witness."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = config.to_dict()
    raw["attn_implementation"] = "eager"
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**raw)).eval()
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta
    state = {name: torch.tensor(weights.read(name)) for name in weights.names()}
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    inputs = ModelInputs.prepare(config, ids, ragged_mask)
    real = inputs.attention_mask
    with torch.no_grad():
        theirs = model(
            torch.tensor(ids),
            attention_mask=torch.tensor(ragged_mask),
            position_ids=torch.tensor(inputs.position_ids.astype(np.int64)),
        ).logits.numpy()[real]
    expected = Reference(config, weights).run(inputs).logits[real]
    floor = np.median(
        [
            error(Witness(config, weights, "float32", s).run(inputs).logits[real], expected)
            for s in range(4)
        ]
    )
    assert 0.5 < error(theirs, expected) / floor < 1.5


def test_past_the_range_of_float16(config, weights, ids):
    """Infinity and NaN as in any framework, and no warning, which this suite makes an error."""
    arrays = {name: weights.read(name) for name in weights.names()}
    arrays["model.layers.1.mlp.up_proj.weight"] = arrays["model.layers.1.mlp.up_proj.weight"] * 1e6
    logits = Witness(config, ArrayWeights(arrays), "float16", 0).run(
        ModelInputs.prepare(config, ids)
    )
    assert not np.isfinite(logits.logits).all()
