"""Probabilities from logits, in float64, without overflow."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (..., C) that add up to 1 over the last axis of (..., C)."""
    return np.asarray(np.exp(log_softmax(logits)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of `softmax`."""
    scores = np.asarray(logits, np.float64)
    scores = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)), of the same shape."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64))))
