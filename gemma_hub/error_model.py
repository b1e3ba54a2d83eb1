"""The one error model: error against float64, measured in units of rounding noise.

A candidate is compared with a float64 reference, and its error is divided by the error that the
declared precision makes by itself. That noise is measured, not guessed: *witnesses* are runs of the
reference under the same precision with random rounding and re-ordered sums. A correct backend has
a ratio of about 1 at any size, depth and logit scale, so one limit serves them all.
See docs/explanation/error-model.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_hub.errors import InputError

Float64 = NDArray[np.float64]

RATIO_LIMIT = 6.1
"""Largest `Judgement.ratio` that passes. Derived by gemma_hub_conformance.calibrate."""

WORST_RATIO_LIMIT = 6.7
"""Largest `Judgement.worst_ratio` that passes. Derived by gemma_hub_conformance.calibrate."""

OUTPUT_ROUNDING = 2.0**-25
"""Relative noise that is always allowed: results are float32, so each was rounded once."""


@dataclass(frozen=True, slots=True)
class NoiseBand:
    """What rounding alone does to one result.

    Attributes:
        rms: root mean square of the relative token errors, over tokens and witnesses.
        token_rms: (n,) relative error of each real token, rms over witnesses.
        element_rms: (n, V) absolute error to expect in each element: rms over witnesses, and at
            least that of its token, because a few witnesses say little about one element.
        witness_ratios: each witness's rms error over that of the others; their spread says how
            sharp the band is.
    """

    rms: float
    token_rms: Float64
    element_rms: Float64
    witness_ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """A candidate's verdict.

    Attributes:
        ratio: rms relative token error / rms of the noise; about 1 for a correct candidate.
        worst_ratio: largest error of one element / what noise is expected to reach somewhere among
            so many elements; about 1 for a correct candidate.
        worst_index: where that element is in the candidate array; None if it was never compared.
        passed: both ratios are within their limits.
        reason: one line that says why, also when it passed.
    """

    ratio: float
    worst_ratio: float
    worst_index: tuple[int, ...] | None
    passed: bool
    reason: str


def token_errors(
    candidate: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None
) -> Float64:
    """(n,) relative L2 error of each real token: ‖candidate - reference‖ / ‖reference‖.

    Args:
        candidate: (..., V), any floating-point type.
        reference: (..., V), the float64 truth.
        mask: (...) bool, true at real tokens; all of them if None. n is the number of them.
    """
    true = _real_tokens(reference, mask)
    return _norm(_real_tokens(candidate, mask) - true) / _scale(true)


def noise_band(
    reference: np.ndarray, witnesses: Sequence[np.ndarray], mask: np.ndarray | None = None
) -> NoiseBand:
    """The band that `witnesses` span around `reference`.

    Args:
        reference: (..., V) float64.
        witnesses: at least two arrays of the same shape, from independent seeds.
        mask: (...) bool, true at real tokens; all of them if None.

    Raises:
        InputError: fewer than two witnesses, another shape, no real token, a value not finite.
    """
    if len(witnesses) < 2:
        raise InputError(f"Got {len(witnesses)} witnesses; a noise band needs at least 2.")
    true = _real_tokens(reference, mask)
    for number, witness in enumerate(witnesses):
        if witness.shape != reference.shape:
            raise InputError(
                f"Witness {number} has shape {witness.shape}; the reference {reference.shape}."
            )
    errors = np.stack([_real_tokens(witness, mask) - true for witness in witnesses])
    if not (np.isfinite(true).all() and np.isfinite(errors).all()):
        raise InputError(
            "The reference or a witness is not finite, so nothing can be judged by it. "
            "The checkpoint overflows in this precision."
        )
    relative = _norm(errors) / _scale(true)  # (W, n)
    token_rms = np.maximum(_rms(relative, axis=0), OUTPUT_ROUNDING)
    width = math.sqrt(true.shape[-1])
    token_absolute = token_rms * _scale(true) / width
    return NoiseBand(
        rms=float(_rms(token_rms)),
        token_rms=token_rms,
        element_rms=np.maximum(_rms(errors, axis=0), token_absolute[:, None]),
        witness_ratios=_leave_one_out(relative),
    )


def judge(
    candidate: np.ndarray, reference: np.ndarray, band: NoiseBand, mask: np.ndarray | None = None
) -> Judgement:
    """Whether `candidate` differs from `reference` by rounding noise only.

    A shape that differs, and NaN or infinity at a real token, fail.

    Args:
        candidate: (..., V) a backend's result as NumPy.
        reference: (..., V) float64, the one that `band` was made from.
        band: from `noise_band`, with the same mask.
        mask: (...) bool, true at real tokens; all of them if None.
    """
    if candidate.shape != reference.shape:
        return _failure(f"the shape is {candidate.shape}; expected {reference.shape}")
    found, true = _real_tokens(candidate, mask), _real_tokens(reference, mask)
    if not np.isfinite(found).all():
        count = int((~np.isfinite(found)).sum())
        return _failure(f"{count} of {found.size} values at real tokens are NaN or infinite")
    ratio = float(_rms(token_errors(candidate, reference, mask))) / band.rms
    units = np.abs(found - true) / band.element_rms
    token, element = np.unravel_index(int(np.argmax(units)), units.shape)
    worst_ratio = float(units[token, element]) / expected_maximum(units.size)
    worst_index = (*_positions(reference, mask)[int(token)], int(element))
    passed = ratio <= RATIO_LIMIT and worst_ratio <= WORST_RATIO_LIMIT
    reason = (
        f"error is {ratio:.3g} times the rounding noise (limit {RATIO_LIMIT:g}), "
        f"worst element {worst_ratio:.3g} times (limit {WORST_RATIO_LIMIT:g}) at {worst_index}"
    )
    return Judgement(ratio, worst_ratio, worst_index, passed, reason)


def expected_maximum(count: int) -> float:
    """About the largest of `count` standard normal numbers: sqrt(2 ln count), at least 1."""
    return max(1.0, math.sqrt(2.0 * math.log(count)))


def _failure(reason: str) -> Judgement:
    return Judgement(math.inf, math.inf, None, False, reason)


def _real_tokens(array: np.ndarray, mask: np.ndarray | None) -> Float64:
    """(n, V) float64: the rows of `array` at real tokens."""
    rows = array.reshape(-1, array.shape[-1]) if mask is None else array[mask]
    if not rows.size:
        raise InputError("There is no real token to compare; the mask is empty.")
    return np.asarray(rows, np.float64)


def _positions(array: np.ndarray, mask: np.ndarray | None) -> list[tuple[int, ...]]:
    """Index of each real token in the leading axes of `array`."""
    where = np.ones(array.shape[:-1], np.bool_) if mask is None else mask
    return [tuple(int(i) for i in index) for index in np.argwhere(where)]


def _norm(rows: Float64) -> Float64:
    return np.asarray(np.sqrt(np.sum(np.square(rows), axis=-1)), np.float64)


def _scale(true: Float64) -> Float64:
    # A token whose every value is 0 has no relative error; there the absolute one is taken.
    norm = _norm(true)
    return np.asarray(np.where(norm > 0, norm, 1.0), np.float64)


def _rms(values: Float64, axis: int | None = None) -> Float64:
    return np.asarray(np.sqrt(np.mean(np.square(values), axis=axis)), np.float64)


def _leave_one_out(relative: Float64) -> tuple[float, ...]:
    """Each witness's rms error over the rms of all the others."""
    squares = np.mean(np.square(relative), axis=1)
    others = (squares.sum() - squares) / (len(squares) - 1)
    floor = OUTPUT_ROUNDING**2
    return tuple(float(r) for r in np.sqrt(squares / np.maximum(others, floor)))
