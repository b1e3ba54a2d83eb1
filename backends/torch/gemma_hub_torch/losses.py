"""Losses, all in float32. Twin: gemma_hub_flax/losses.py.

Axes: B batch, T tokens, C classes.
"""

import torch
from torch import Tensor

IGNORED = -100  # a label that does not count


def cross_entropy(logits: Tensor, labels: Tensor, num_items: int | None = None) -> Tensor:
    """Mean of -log p[label] over the labels that count; logits (..., C), integer labels (...).

    `num_items` divides the sum instead of the number of labels that count. If none counts, the
    mean is NaN.
    """
    counted = labels != IGNORED
    logprobs = torch.log_softmax(logits.to(torch.float32), -1)
    places = torch.where(counted, labels, 0)
    chosen = torch.take_along_dim(logprobs, places[..., None], -1)[..., 0]
    total = -torch.sum(torch.where(counted, chosen, 0.0))
    return total / (torch.sum(counted) if num_items is None else num_items)


def causal_loss(logits: Tensor, labels: Tensor, num_items: int | None = None) -> Tensor:
    """Cross entropy of each token given those before; logits (B, T, C), labels (B, T)."""
    # The last token has no next one. Its logits stay: to leave them out would copy all others.
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], -1)
    return cross_entropy(logits, following, num_items)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference of logits (B, C) and targets (B, C)."""
    difference = logits.to(torch.float32) - targets.to(torch.float32)
    return torch.mean(difference * difference)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -y log p - (1 - y) log(1 - p) with p = sigmoid(logits), over all of (B, C)."""
    y, z = targets.to(torch.float32), logits.to(torch.float32)
    return -torch.mean(y * log_sigmoid(z) + (1.0 - y) * log_sigmoid(-z))


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), without overflow."""
    return -torch.logaddexp(-x, torch.zeros_like(x))


def sequence_loss(problem_type: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of one label, several, or numbers for each row: logits (B, C)."""
    if problem_type == "regression":
        return squared_error(logits, labels)
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    return binary_cross_entropy(logits, labels)
