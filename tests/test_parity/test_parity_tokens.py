"""Tokens: equal, tied within the rounding noise, or different."""

import numpy as np
import pytest

from gemma_hub.generation.random import uniform
from gemma_hub.generation.sampling import choose, kept_weights
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.parity.tokens import TIE_SIGMAS, Step, compare_at, first_difference

GREEDY = GenerationSettings(max_new_tokens=4)
SAMPLED = GenerationSettings(max_new_tokens=4, temperature=0.8, seed=5)


def _step(margin: float, sigma: float = 1e-3) -> Step:
    logits = np.array([0.0, 2.0, 2.0 - margin, -1.0])
    return Step(logits=logits, noise=np.full(4, sigma), row=0, index=2)


@pytest.mark.parametrize(
    ("expected", "found", "at"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((1, 2, 3), (1, 5, 3), 1),
        ((1, 2, 3), (1, 2), 2),
        ((1, 2), (1, 2, 3), 2),
        ((), (), None),
    ],
)
def test_the_first_difference_counts_missing_tokens(expected, found, at):
    assert first_difference(expected, found) == at


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "tie"), (1.1, "different")])
def test_greedy_tokens_tie_up_to_eight_standard_deviations_of_their_difference(factor, verdict):
    margin = factor * TIE_SIGMAS * np.hypot(1e-3, 1e-3)
    found, reason = compare_at(_step(margin), 1, 2, GREEDY)
    assert found == verdict
    assert "token 2 is 2 instead of 1" in reason


def test_without_noise_nothing_ties():
    assert compare_at(_step(1e-12, sigma=0.0), 1, 2, GREEDY)[0] == "different"


def test_a_draw_beside_a_border_ties_with_the_neighbour_and_no_other():
    drawn = float(uniform(5, 0, 2))
    # Logits for which the border between ids 1 and 2 is just above the draw.
    weights = np.array([drawn / 2, drawn / 2 + 1e-6, 1 - drawn - 1e-6 - 0.05, 0.05])
    step = Step(logits=0.8 * np.log(weights), noise=np.full(4, 1e-6), row=0, index=2)
    shares = kept_weights(step.logits[None], SAMPLED)[0]
    np.testing.assert_allclose(shares / shares.sum(), weights)
    assert choose(step.logits[None], SAMPLED, np.array([drawn]))[0] == 1
    assert compare_at(step, 1, 2, SAMPLED)[0] == "tie"
    assert compare_at(step, 1, 0, SAMPLED)[0] == "different"
    assert compare_at(step, 1, 3, SAMPLED)[0] == "different"


def test_a_draw_far_from_a_border_does_not_tie():
    drawn = float(uniform(5, 0, 2))
    weights = np.array([drawn / 2, drawn / 2 + 0.01, 1 - drawn - 0.06, 0.05])
    step = Step(logits=0.8 * np.log(weights), noise=np.full(4, 1e-6), row=0, index=2)
    verdict, reason = compare_at(step, 1, 2, SAMPLED)
    assert verdict == "different"
    assert "reaches ids 1 to 1" in reason
