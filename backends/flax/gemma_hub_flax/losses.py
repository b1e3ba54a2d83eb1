"""Losses, all in float32. Twin: gemma_hub_torch/losses.py.

Axes: B batch, T tokens, C classes.
"""

import jax
import jax.numpy as jnp
from jax import Array

IGNORED = -100  # a label that does not count


def cross_entropy(logits: Array, labels: Array, num_items: int | None = None) -> Array:
    """Mean of -log p[label] over the labels that count; logits (..., C), integer labels (...).

    `num_items` divides the sum instead of the number of labels that count. If none counts, the
    mean is NaN.
    """
    counted = labels != IGNORED
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    places = jnp.where(counted, labels, 0)
    chosen = jnp.take_along_axis(logprobs, places[..., None], -1)[..., 0]
    total = -jnp.sum(jnp.where(counted, chosen, 0.0))
    return total / (jnp.sum(counted) if num_items is None else num_items)


def causal_loss(logits: Array, labels: Array, num_items: int | None = None) -> Array:
    """Cross entropy of each token given those before; logits (B, T, C), labels (B, T)."""
    # The last token has no next one. Its logits stay: to leave them out would copy all others.
    following = jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORED)], -1)
    return cross_entropy(logits, following, num_items)


def squared_error(logits: Array, targets: Array) -> Array:
    """Mean squared difference of logits (B, C) and targets (B, C)."""
    difference = logits.astype(jnp.float32) - targets.astype(jnp.float32)
    return jnp.mean(difference * difference)


def binary_cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean of -y log p - (1 - y) log(1 - p) with p = sigmoid(logits), over all of (B, C)."""
    y, z = targets.astype(jnp.float32), logits.astype(jnp.float32)
    return -jnp.mean(y * log_sigmoid(z) + (1.0 - y) * log_sigmoid(-z))


def log_sigmoid(x: Array) -> Array:
    """log(1 / (1 + exp(-x))), without overflow."""
    return -jnp.logaddexp(-x, jnp.zeros_like(x))


def sequence_loss(problem_type: str, logits: Array, labels: Array) -> Array:
    """The loss of one label, several, or numbers for each row: logits (B, C)."""
    if problem_type == "regression":
        return squared_error(logits, labels)
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    return binary_cross_entropy(logits, labels)
