"""The losses in float64, from their definitions: independent of the reference's own.

`single` rounds to float32 where a backend computes a step in float32: the identity for the truth,
random rounding for a witness.
"""

from collections.abc import Callable

import numpy as np

from gemma_hub.labels import IGNORED

Rounding = Callable[[np.ndarray], np.ndarray]


def exact(x: np.ndarray) -> np.ndarray:
    """No rounding."""
    return x


def causal(
    logits: np.ndarray, single: Rounding, labels: np.ndarray, num_items: int | None
) -> float:
    """(B, T, V) and (B, T): the label of a token is compared with the logits before it."""
    return token(logits[:, :-1], single, labels[:, 1:], num_items)


def token(logits: np.ndarray, single: Rounding, labels: np.ndarray, num_items: int | None) -> float:
    """(B, T, C) and (B, T): sum of -log p(label) over the labels that count, divided."""
    counted = labels != IGNORED
    terms = _negative_log(logits[counted], single, labels[counted])
    return _divided(terms, counted.sum() if num_items is None else num_items, single)


def single_label(logits: np.ndarray, single: Rounding, labels: np.ndarray) -> float:
    """(B, C) and (B,): mean of -log p(label)."""
    return _divided(_negative_log(logits, single, labels), len(labels), single)


def multi_label(logits: np.ndarray, single: Rounding, labels: np.ndarray) -> float:
    """(B, C) twice: mean over all of -y log p - (1 - y) log(1 - p), p = 1 / (1 + exp(-logit))."""
    log_p, log_not_p = (single(-np.logaddexp(0.0, sign * logits)) for sign in (-1.0, 1.0))
    terms = single(-labels * log_p) + single((labels - 1) * log_not_p)
    return _divided(single(terms), labels.size, single)


def regression(logits: np.ndarray, single: Rounding, labels: np.ndarray) -> float:
    """(B, C) and as many numbers: the mean square of the difference."""
    difference = single(logits - labels.reshape(logits.shape))
    return _divided(single(difference**2), labels.size, single)


def _negative_log(logits: np.ndarray, single: Rounding, labels: np.ndarray) -> np.ndarray:
    """(n, C) and (n,) to (n,) -log p(label)."""
    shifted = single(logits - logits.max(axis=-1, keepdims=True))
    log_sum = single(np.log(single(np.exp(shifted).sum(axis=-1))))
    return single(log_sum - shifted[np.arange(len(labels)), labels])


def _divided(terms: np.ndarray, count: int, single: Rounding) -> float:
    """The sum one term after the other, which is the roughest that a backend may take it."""
    total = np.zeros(())
    for term in terms.ravel():
        total = single(total + term)
    return float(single(total / count))
