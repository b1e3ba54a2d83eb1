"""The error model: noise passes, a systematic error does not, an empty comparison is refused."""

import math

import numpy as np
import pytest

from gemma_hub.error_model import (
    OUTPUT_ROUNDING,
    RATIO_LIMIT,
    WORST_RATIO_LIMIT,
    expected_maximum,
    judge,
    noise_band,
    token_errors,
)
from gemma_hub.errors import InputError

B, T, V = 3, 7, 31
NOISE = 1e-6


def _noisy(reference: np.ndarray, seed: int, size: float = NOISE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return reference + size * rng.standard_normal(reference.shape)


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((B, T, V))


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.ones((B, T), np.bool_)
    mask[1, :3] = False
    mask[2, 5:] = False
    return mask


@pytest.fixture
def band(reference, mask):
    return noise_band(reference, [_noisy(reference, seed) for seed in range(1, 9)], mask)


def test_token_errors_are_relative_l2_norms():
    reference = np.array([[3.0, 4.0], [0.0, 2.0]])
    candidate = np.array([[3.0, 4.5], [0.0, 2.0]])
    np.testing.assert_allclose(token_errors(candidate, reference), [0.1, 0.0])


@pytest.mark.parametrize("seed", range(100, 120))
def test_fresh_noise_of_the_same_size_passes_with_a_ratio_near_one(reference, mask, band, seed):
    judgement = judge(_noisy(reference, seed), reference, band, mask)
    assert judgement.passed
    assert 0.8 < judgement.ratio < 1.25
    assert 0.5 < judgement.worst_ratio < 1.6


def test_the_verdict_does_not_depend_on_the_scale_of_the_logits(reference, mask, band):
    candidate = _noisy(reference, 50, 3 * NOISE)
    scaled_band = noise_band(
        1000 * reference, [1000 * _noisy(reference, seed) for seed in range(1, 9)], mask
    )
    once = judge(candidate, reference, band, mask)
    scaled = judge(1000 * candidate, 1000 * reference, scaled_band, mask)
    assert scaled.ratio == pytest.approx(once.ratio)
    assert scaled.worst_ratio == pytest.approx(once.worst_ratio)


def test_larger_noise_fails_by_its_ratio(reference, mask, band):
    judgement = judge(_noisy(reference, 50, 3 * RATIO_LIMIT * NOISE), reference, band, mask)
    assert not judgement.passed
    assert judgement.ratio == pytest.approx(3 * RATIO_LIMIT, rel=0.2)


def test_an_even_error_fails_although_no_element_stands_out(reference, mask, band):
    signs = np.sign(np.random.default_rng(9).standard_normal(reference.shape))
    judgement = judge(reference + 2 * RATIO_LIMIT * NOISE * signs, reference, band, mask)
    assert judgement.worst_ratio < WORST_RATIO_LIMIT
    assert not judgement.passed


def test_one_wrong_element_fails_and_is_named(reference, mask, band):
    candidate = _noisy(reference, 50)
    candidate[2, 3, 17] += 50 * NOISE
    judgement = judge(candidate, reference, band, mask)
    assert judgement.ratio < RATIO_LIMIT
    assert not judgement.passed
    assert judgement.worst_index == (2, 3, 17)
    assert "(2, 3, 17)" in judgement.reason


def test_padding_is_not_compared(reference, mask, band):
    candidate = _noisy(reference, 50)
    candidate[1, :3] = np.nan
    assert judge(candidate, reference, band, mask).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails(reference, mask, band, value):
    candidate = _noisy(reference, 50)
    candidate[0, 0, 0] = value
    judgement = judge(candidate, reference, band, mask)
    assert not judgement.passed
    assert judgement.ratio == math.inf
    assert "1 of 496 values at real tokens are NaN or infinite" in judgement.reason


def test_another_shape_fails(reference, mask, band):
    judgement = judge(reference[:, :, :-1], reference, band, mask)
    assert not judgement.passed
    assert "the shape is (3, 7, 30); expected (3, 7, 31)" in judgement.reason


def test_exact_witnesses_still_allow_the_rounding_of_the_output(reference):
    band = noise_band(reference, [reference, reference])
    assert band.rms == OUTPUT_ROUNDING
    assert judge(reference.astype(np.float32), reference, band).passed
    assert not judge(reference * (1 + 1e-6), reference, band).passed


def test_one_noisy_token_does_not_hide_another_token_s_error(reference):
    # Token 0 is a thousand times noisier than the rest, so the rms ratio sees only token 0.
    size = np.full((B, T, 1), NOISE)
    size[0, 0] = 1000 * NOISE
    band = noise_band(reference, [_noisy(reference, seed, size) for seed in range(1, 9)])
    candidate = _noisy(reference, 50, size)
    candidate[2, 6] += 40 * NOISE
    judgement = judge(candidate, reference, band)
    assert judgement.ratio < 2
    assert not judgement.passed
    assert judgement.worst_index[:2] == (2, 6)


def test_the_witnesses_of_one_policy_agree_among_themselves(band):
    assert len(band.witness_ratios) == 8
    assert all(0.8 < ratio < 1.25 for ratio in band.witness_ratios)


def test_bfloat16_arrays_are_judged_like_any_other(reference):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    witnesses = [_noisy(reference, seed, 2**-9 * np.abs(reference)) for seed in range(1, 9)]
    band = noise_band(reference, witnesses)
    assert judge(reference.astype(ml_dtypes.bfloat16), reference, band).passed


def test_expected_maximum_is_about_the_largest_of_normal_numbers():
    rng = np.random.default_rng(3)
    largest = np.abs(rng.standard_normal((200, 1000))).max(axis=1).mean()
    assert expected_maximum(1000) == pytest.approx(largest, rel=0.2)
    assert expected_maximum(1) == 1.0


def test_too_few_witnesses_are_refused(reference):
    with pytest.raises(InputError, match="Got 1 witnesses; a noise band needs at least 2"):
        noise_band(reference, [reference])


def test_a_witness_of_another_shape_is_refused(reference):
    with pytest.raises(InputError, match=r"Witness 1 has shape \(3, 6, 31\)"):
        noise_band(reference, [reference, reference[:, 1:]])


def test_an_empty_mask_is_refused(reference):
    with pytest.raises(InputError, match="no real token to compare"):
        noise_band(reference, [reference, reference], np.zeros((B, T), np.bool_))


def test_a_witness_that_overflows_is_refused(reference):
    broken = reference.copy()
    broken[0, 0, 0] = np.inf
    with pytest.raises(InputError, match="overflows in this precision"):
        noise_band(reference, [reference, broken])
