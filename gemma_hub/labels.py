"""Labels: which loss they ask for, and their checks. The rules are the same for every backend."""

from typing import Any, Literal

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

IGNORED = -100
"""A token label that counts for nothing."""


def problem_type(config: GemmaConfig, labels_are_integers: bool) -> ProblemType:
    """Which loss a sequence classifier has: the config's, else inferred from the labels.

    It is inferred anew at each call, and never written into the config. (Transformers writes what
    it inferred at the first call into the config, so that its later calls depend on the first.)
    """
    if config.problem_type is not None:
        return config.problem_type  # type: ignore[return-value]  # the config checked it
    if config.num_labels == 1:
        return "regression"
    return "single_label_classification" if labels_are_integers else "multi_label_classification"


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
    kind = problem_type(config, labels.dtype.kind in "iu")
    if kind == "single_label_classification":
        return _choices(labels, shape[0], config.num_labels)
    return _values(labels, shape[0], config.num_labels, kind)


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


def _choices(labels: np.ndarray, batch: int, num_labels: int) -> np.ndarray:
    if labels.dtype.kind not in "iu":
        raise InputError(
            f"labels holds {labels.dtype}; expected integers, for problem_type "
            "'single_label_classification'."
        )
    if labels.shape not in ((batch,), (batch, 1)):
        raise InputError(
            f"labels has shape {labels.shape}; expected ({batch},), one label for each row "
            "(integer labels mean one choice; for several at once give floating-point 0 and 1)."
        )
    labels = labels.reshape(batch)
    bad = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if len(bad):
        raise InputError(
            f"labels[{bad[0]}] is {labels[bad[0]]}; expected 0 to {num_labels - 1} "
            f"(num_labels={num_labels})."
        )
    return labels.astype(np.int32)


def _values(labels: np.ndarray, batch: int, num_labels: int, kind: str) -> np.ndarray:
    """Targets of a regression or of independent yes-or-no labels, as floating-point numbers."""
    shapes: list[tuple[int, ...]] = [(batch, num_labels)]
    if kind == "regression" and num_labels == 1:
        shapes.insert(0, (batch,))
    if labels.shape not in shapes:
        raise InputError(
            f"labels has shape {labels.shape}; expected {' or '.join(map(str, shapes))} for "
            f"problem_type {kind!r} with num_labels={num_labels}."
        )
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
    return values.reshape(shapes[0])
