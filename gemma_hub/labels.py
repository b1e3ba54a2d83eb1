"""checked_labels: labels in the one form that backends see."""

from typing import Any

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.problem import problem_type

IGNORED = -100
"""A token label that counts for nothing."""


def checked_labels(
    config: GemmaConfig, task: str, labels: Any, shape: tuple[int, int]
) -> np.ndarray:
    """`labels` in the one form that backends see; see `ModelInputs.labels`.

    Args:
        config: the model's.
        task: a key of `gemma_hub.config.ARCHITECTURES`.
        labels: an array of labels as it was given.
        shape: (B, T) of the input.

    Raises:
        InputError: the task has no loss, or the labels have a wrong type, shape or value.
    """
    if task == "causal_lm":
        return _token_labels(labels, shape, config.vocab_size, "ids of the vocabulary")
    if task == "token_classification":
        return _token_labels(labels, shape, config.num_labels, f"num_labels={config.num_labels}")
    if task != "sequence_classification":
        raise InputError(f"labels were given and the task {task!r} has no loss. Leave them out.")
    if labels.dtype.kind not in "biuf":
        raise InputError(f"labels holds {labels.dtype}; expected numbers.")
    kind = problem_type(config, labels.shape, labels.dtype.kind in "iu")
    if len(labels) != shape[0]:
        raise InputError(f"labels has {len(labels)} rows; expected {shape[0]}, as the input.")
    if kind == "single_label_classification":
        return _choices(labels.reshape(-1), config.num_labels)
    values = _values(labels, kind)
    return values.reshape(-1) if config.num_labels == 1 and kind == "regression" else values


def counted_labels(task: str, labels: np.ndarray) -> int:
    """Number of labels that a loss over tokens has a term for."""
    # A causal LM predicts each token from those before it: nothing predicts the first.
    counted = labels[:, 1:] if task == "causal_lm" else labels
    return int((counted != IGNORED).sum())


def _token_labels(
    labels: np.ndarray, shape: tuple[int, int], count: int, origin: str
) -> np.ndarray:
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels holds {labels.dtype}; expected integers, one for each token.")
    if labels.shape != shape:
        raise InputError(f"labels has shape {labels.shape}; expected {shape}, as the input.")
    labels = labels.astype(np.int64)
    bad = np.argwhere(((labels < 0) | (labels >= count)) & (labels != IGNORED))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"labels[{row}, {column}] is {labels[row, column]}; expected 0 to {count - 1} "
            f"({origin}), or {IGNORED} where the token does not count."
        )
    return labels.astype(np.int32)


def _choices(labels: np.ndarray, num_labels: int) -> np.ndarray:
    bad = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if len(bad):
        raise InputError(
            f"labels[{bad[0]}] is {labels[bad[0]]}; expected 0 to {num_labels - 1} "
            f"(num_labels={num_labels})."
        )
    return labels.astype(np.int32)


def _values(labels: np.ndarray, kind: str) -> np.ndarray:
    """Targets of a regression or of independent yes-or-no labels, as floating-point numbers."""
    # float64 stays: the reference computes in it.
    wide = labels.dtype == np.float64
    values: np.ndarray = labels.astype(np.float64 if wide else np.float32)
    is_wrong = ~np.isfinite(values)
    if kind == "multi_label_classification":
        is_wrong |= np.less(values, 0) | np.greater(values, 1)
    bad = np.argwhere(is_wrong)
    if len(bad):
        place = ", ".join(map(str, bad[0]))
        expected = "a finite number" if kind == "regression" else "0 to 1"
        raise InputError(f"labels[{place}] is {labels[tuple(bad[0])]}; expected {expected}.")
    return values
