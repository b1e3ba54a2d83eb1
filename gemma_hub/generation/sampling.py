"""The sampling rules, in NumPy and float64: what every backend must compute.

Order: temperature, top_k, top_p, min_p, typical_p, then one draw. Wherever two tokens are equal,
the lower id wins. What comes before is in `gemma_hub.generation.rules`.
"""

import numpy as np

from gemma_hub.errors import GemmaHubError
from gemma_hub.generation.settings import GenerationSettings


def choose(
    logits: np.ndarray,
    settings: GenerationSettings,
    uniform: np.ndarray | None = None,
    *,
    rows: np.ndarray | None = None,
    steps: np.ndarray | int = 0,
) -> np.ndarray:
    """The next token of each row.

    At temperature 0 it is the largest logit. Otherwise it is the first id, in id order, whose
    cumulative kept weight exceeds `uniform` times the row's total.

    Args:
        logits: (B, V) of any floating type; -inf forbids a token.
        settings: temperature, top_k, top_p, min_p and typical_p.
        uniform: (B,) numbers from 0 to below 1; not read at temperature 0.
        rows: (B,) numbers of the rows, for the error message only; None for 0 to B - 1.
        steps: index of the new token of each row, likewise.

    Returns:
        (B,) int64 token ids.

    Raises:
        GemmaHubError: a row holds NaN or +inf, or nothing but -inf.
    """
    check_logits(logits, np.arange(len(logits)) if rows is None else rows, steps)
    if settings.temperature == 0:
        return np.asarray(np.argmax(logits, axis=1))
    if uniform is None:
        raise TypeError("choose needs `uniform` at a temperature above 0.")
    cumulative = np.cumsum(kept_weights(logits, settings), axis=1)
    threshold = np.asarray(uniform, np.float64)[:, None] * cumulative[:, -1:]
    return np.asarray(np.argmax(cumulative > threshold, axis=1))


def kept_weights(logits: np.ndarray, settings: GenerationSettings) -> np.ndarray:
    """(B, V) float64 weights after temperature and every filter: 0 where a token is dropped.

    A row's largest weight is 1; divide by the row's sum for probabilities.
    """
    scores = logits.astype(np.float64)
    # The largest becomes 0 first, so that a tiny temperature sends the rest to -inf and no more.
    scores -= scores.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        scores /= settings.temperature
    if settings.top_k is not None and settings.top_k < scores.shape[1]:
        scores = _keep_largest(scores, np.full(len(scores), settings.top_k))
    if settings.top_p is not None and settings.top_p < 1:
        cumulative = np.cumsum(np.exp(_descending(scores)), axis=1)
        scores = _keep_largest(scores, _fewest(cumulative, settings.top_p))
    weights = np.exp(scores)
    if settings.min_p is not None:
        weights = np.where(weights >= settings.min_p, weights, 0.0)
    if settings.typical_p is not None and settings.typical_p < 1:
        weights = _keep_typical(weights, settings.typical_p)
    return np.asarray(weights)


def log_probabilities(logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """(B,) float64 natural-log probability of each row's token, before temperature and filters."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(scores, token_ids[:, None], axis=1)[:, 0]
    return np.asarray(chosen - np.log(np.exp(scores).sum(axis=1)))


def _keep_typical(weights: np.ndarray, typical_p: float) -> np.ndarray:
    """The fewest tokens of each row whose surprise is nearest to the expected one, as `weights`.

    Meister et al., "Locally typical sampling" (2022).
    """
    share = weights / weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(share)
        expected = np.where(share > 0, share * surprise, 0.0).sum(axis=1, keepdims=True)
    # A stable sort, so that the lower id comes first of equal ones.
    order = np.argsort(np.abs(surprise - expected), axis=1, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    is_kept = np.arange(weights.shape[1]) < _fewest(cumulative, typical_p)[:, None]
    kept = np.zeros_like(weights)
    np.put_along_axis(kept, order, np.take_along_axis(weights, order, axis=1) * is_kept, axis=1)
    return kept


def _fewest(cumulative: np.ndarray, share: float) -> np.ndarray:
    """(B,) how many tokens it takes until the sum reaches `share` of the whole."""
    # Every token before the sum reaches it, and the one that makes it reach.
    return np.asarray(np.sum(cumulative < share * cumulative[:, -1:], axis=1) + 1)


def _keep_largest(scores: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Exactly `count[row]` of each row's largest scores; ties at the border keep the lower ids."""
    border = np.take_along_axis(_descending(scores), count[:, None] - 1, axis=1)
    above = scores > border
    tied = scores == border
    room = count[:, None] - above.sum(axis=1, keepdims=True)
    return np.where(above | (tied & (np.cumsum(tied, axis=1) <= room)), scores, -np.inf)


def _descending(scores: np.ndarray) -> np.ndarray:
    return np.sort(scores, axis=1)[:, ::-1]


def check_logits(logits: np.ndarray, rows: np.ndarray, steps: np.ndarray | int) -> None:
    """Refuse (B, V) logits that no token can be chosen from.

    Raises:
        GemmaHubError: a row holds NaN or +inf, or nothing but -inf. It names the number of the row
            and the step.
    """
    # The maximum alone tells: it is NaN, +inf, or -inf exactly for the three kinds of bad row.
    largest = logits.max(axis=1)
    bad = np.flatnonzero(~np.isfinite(largest))
    if len(bad):
        place = bad[0]
        found = largest[place]
        what = "NaN" if np.isnan(found) else f"{found} as the largest value"
        step = np.broadcast_to(steps, rows.shape)[place]
        raise GemmaHubError(
            f"The logits of row {rows[place]} at step {step} hold {what}; no token can be chosen. "
            "Check the checkpoint's weights, or use a wider dtype such as dtype='float32'."
        )
