"""Generated tokens held against the reference's, with room only where rounding decides."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.generation.random import uniform
from gemma_hub.generation.sampling import choose, kept_weights
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.parity.report import TokenVerdict

TIE_SIGMAS = 8.0
"""Two tokens are tied if what separates them is at most this many standard deviations of noise.

A difference that real defects make is far larger; noise passes 8 about once in 10**15 tokens."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the reference knew when it chose a token.

    Attributes:
        logits: (V,) float64.
        noise: (V,) standard deviation that rounding gives each logit.
        row: index of the prompt in its request, for the random bits.
        index: number of the new token.
    """

    logits: np.ndarray
    noise: np.ndarray
    row: int
    index: int


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Number of the first token that differs, or None; a missing token differs."""
    for i, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return i
    return None if len(expected) == len(found) else min(len(expected), len(found))


def compare_at(
    step: Step, expected: int, found: int, settings: GenerationSettings
) -> tuple[TokenVerdict, str]:
    """Whether rounding alone can make `found` out of `expected`, and why."""
    if settings.temperature == 0:
        margin = float(step.logits[expected] - step.logits[found])
        sigma = float(np.hypot(step.noise[expected], step.noise[found]))
        what = f"token {step.index} is {found} instead of {expected}; their logits differ by"
        in_sigmas = margin / sigma if sigma > 0 else float("inf")
        reason = f"{what} {margin:.3g}, {in_sigmas:.3g} standard deviations of the rounding noise"
        return ("tie" if in_sigmas <= TIE_SIGMAS else "different"), reason
    assert settings.seed is not None
    drawn = float(uniform(settings.seed, step.row, step.index))
    room = TIE_SIGMAS * _cumulative_noise(step, settings)
    # `choose` goes through the ids in order, so a draw in between gives an id in between.
    ends = np.clip([drawn - room, drawn + room], 0.0, np.nextafter(1, 0))
    first, last = choose(np.stack([step.logits] * 2), settings, ends)
    reason = (
        f"token {step.index} is {found} instead of {expected}; rounding moves the draw "
        f"{drawn:.7f} by at most {room:.2g}, which reaches ids {first} to {last}"
    )
    return ("tie" if first <= found <= last else "different"), reason


def _cumulative_noise(step: Step, settings: GenerationSettings) -> float:
    """Standard deviation of a cumulative probability, to first order in the logits' noise."""
    weights = kept_weights(step.logits[None], settings)[0]
    probabilities = weights / weights.sum()
    spread = float(np.sqrt(np.sum(np.square(probabilities * step.noise))))
    # float32 sums of the weights add their own rounding.
    return spread / settings.temperature + 2.0**-24
