"""The sampling rules at their boundaries, and the law they follow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_hub.errors import GemmaHubError, InputError
from gemma_hub.generation.random import uniform
from gemma_hub.generation.sampling import choose, kept_weights, log_probabilities
from gemma_hub.generation.settings import GenerationSettings


def weights(logits, **chosen):
    return kept_weights(np.atleast_2d(logits), GenerationSettings(seed=0, **chosen))


def kept(logits, **chosen):
    return np.flatnonzero(weights(logits, **chosen)[0]).tolist()


def logits_of(*probabilities):
    return np.log(np.array([probabilities]))


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = np.array([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]], np.float32)
    assert choose(logits, GenerationSettings()).tolist() == [1, 0]


def test_temperature_divides_the_logits():
    np.testing.assert_allclose(
        weights([0.0, 2.0, -1.0], temperature=0.5)[0], np.exp([-4.0, 0.0, -6.0]), rtol=1e-15
    )


def test_a_tiny_temperature_is_greedy_and_finite():
    row = weights([1.0, 5.0, 4.999999], temperature=5e-324)[0]
    assert row.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3, 4])],
)
def test_top_k_keeps_exactly_k_and_the_lower_ids_of_a_tie(top_k, expected):
    assert kept([2.0, 3.0, 2.0, 3.0, 2.0], temperature=1.0, top_k=top_k) == expected


def test_top_k_acts_on_each_row():
    rows = weights([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], temperature=1.0, top_k=2)
    assert (rows > 0).tolist() == [[False, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.5, [1]),  # reached exactly: the token that reaches it is the last
        (0.5000001, [0, 1]),
        (0.75, [0, 1]),
        (0.7500001, [0, 1, 2]),  # 2 and 3 are equal: the lower id comes first
        (1e-9, [1]),  # at least one
        (0.999, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_includes_the_token_that_crosses(top_p, expected):
    logits = logits_of(0.25, 0.5, 0.125, 0.125)
    assert kept(logits, temperature=1.0, top_p=top_p) == expected


def test_top_p_of_equal_tokens_keeps_the_lower_ids():
    assert kept(np.zeros(8), temperature=1.0, top_p=0.5) == [0, 1, 2, 3]


def test_top_p_one_keeps_even_tokens_below_rounding():
    assert kept([0.0, -50.0, -700.0], temperature=1.0, top_p=1.0) == [0, 1, 2]


def test_top_p_comes_after_top_k_and_both_after_temperature():
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    # Of the three that top_k leaves, 0.4 + 0.3 of 0.9 are 0.78: enough; of all four they are not.
    assert kept(logits, temperature=1.0, top_k=3, top_p=0.75) == [0, 1]
    assert kept(logits, temperature=1.0, top_p=0.75) == [0, 1, 2]
    # At temperature 0.5 the probabilities are squared: 0.16 of 0.30 reaches 0.5.
    assert kept(logits, temperature=0.5, top_p=0.5) == [0]
    assert kept(logits, temperature=1.0, top_p=0.5) == [0, 1]


def test_the_draw_is_the_inverse_of_the_cumulative_sum_in_id_order():
    logits = np.repeat(logits_of(0.25, 0.5, 0.25), 6, axis=0)
    draws = np.array([1e-9, 0.2499, 0.25, 0.7499, 0.75, 1 - 1e-9])
    sampled = choose(logits, GenerationSettings(temperature=1.0, seed=0), draws)
    assert sampled.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_draw_spans_the_kept_tokens_only():
    logits = np.repeat(logits_of(0.25, 0.5, 0.25), 2, axis=0)
    chosen = GenerationSettings(temperature=1.0, top_k=2, seed=0)
    assert choose(logits, chosen, np.array([0.3332, 0.9999])).tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_forbids_a_token(temperature):
    logits = np.full((200, 4), -np.inf, np.float32)
    logits[:, 2] = -3.0
    chosen = GenerationSettings(temperature=temperature, top_k=3, top_p=0.9, seed=0)
    assert set(choose(logits, chosen, uniform(1, np.arange(200), 0)).tolist()) == {2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("value", "words"),
    [(np.nan, "hold NaN"), (np.inf, "hold inf"), (-np.inf, "hold -inf as the largest")],
)
def test_bad_logits_are_an_error_that_names_row_and_step(temperature, value, words):
    logits = np.zeros((3, 4), np.float32)
    logits[1, slice(None) if value == -np.inf else 2] = value
    chosen = GenerationSettings(temperature=temperature, seed=0)
    with pytest.raises(GemmaHubError, match=f"row 1 at step 7 {words}") as caught:
        choose(logits, chosen, np.full(3, 0.5), steps=7)
    assert not isinstance(caught.value, InputError)


def test_a_draw_is_needed_above_temperature_zero():
    with pytest.raises(TypeError, match="uniform"):
        choose(np.zeros((1, 2)), GenerationSettings(temperature=1.0))


def test_log_probabilities_are_those_of_the_model_itself():
    logits = np.array([[0.0, 1.0, 1000.0], [2.0, 2.0, -np.inf]], np.float32)
    np.testing.assert_allclose(
        log_probabilities(logits, np.array([1, 0])), [-999.0, np.log(0.5)], rtol=1e-14
    )


@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 6},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.9},
    ],
    ids=str,
)
def test_the_law_of_the_samples(chosen):
    """Chi-square of 40 000 draws with a fixed seed against a plain computation of the law."""
    logits = np.random.default_rng(5).normal(size=10)
    law = np.exp(logits / chosen["temperature"])
    order = np.argsort(-law)[: chosen.get("top_k", 10)]
    share = np.cumsum(law[order]) / law[order].sum()
    order = order[: int(np.searchsorted(share, chosen.get("top_p", 1.0) - 1e-12)) + 1]
    expected = np.zeros(10)
    expected[order] = law[order] / law[order].sum()

    count = 40_000
    draws = uniform(2024, np.arange(count), 3)
    sampled = choose(np.tile(logits, (count, 1)), GenerationSettings(seed=0, **chosen), draws)
    counts = np.bincount(sampled, minlength=10)
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = ((counts - count * expected)[likely] ** 2 / (count * expected[likely])).sum()
    assert chi_square < 27.9  # the 0.999 quantile for 9 degrees of freedom, an upper bound here


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_filters_agree_with_the_rules_read_word_for_word(data):
    # Few distinct values make ties common; powers of two keep every sum exact.
    row = data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
    top_k = data.draw(st.none() | st.integers(1, 13))
    top_p = data.draw(st.none() | st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.875, 1.0]))
    logits = np.array(row) * np.log(2.0)
    probabilities = 2.0 ** np.array(row)

    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    if top_p is not None and top_p < 1:
        total, reached, short = sum(probabilities[order]), 0.0, []
        for token_id in order:
            short.append(token_id)
            reached += probabilities[token_id]
            if reached >= top_p * total * (1 - 1e-12):
                break
        order = short
    # exp(log 2) is not exactly 2, so the sum is allowed to reach top_p a rounding error early.
    top_p = None if top_p is None else min(1.0, top_p * (1 - 1e-12)) if top_p < 1 else 1.0
    assert kept(logits, temperature=1.0, top_k=top_k, top_p=top_p) == sorted(order)
