"""problem_type: which loss a sequence classifier has. The rule is the same for every backend."""

from typing import Literal

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def problem_type(
    config: GemmaConfig, labels_shape: tuple[int, ...], labels_are_integers: bool
) -> ProblemType:
    """The config's problem type, else the one that the labels mean.

    One label is a regression, integers are choices of one label, other numbers stand for several
    labels at once. It is inferred anew at each call and never written into the config.
    (Transformers writes what the first call meant into the config, so that later calls depend on
    it.)

    Args:
        config: the model's.
        labels_shape: (B,) for choices, (B, num_labels) for several labels and for a regression,
            which with one label also may be (B,). Choices may be (B, 1) too.
        labels_are_integers: whether the labels have an integer type; bool is none.

    Raises:
        InputError: labels of that type or shape do not fit the problem type.
    """
    C = config.num_labels
    kind = _stated_or_meant(config, labels_are_integers)
    if kind == "single_label_classification":
        fits = len(labels_shape) == 1 or (len(labels_shape) == 2 and labels_shape[1] == 1)
        expected = "(batch,), one label for each row"
        if not labels_are_integers:
            raise InputError(
                f"labels must be integers for problem_type {kind!r}; got other numbers."
            )
    else:
        fits = len(labels_shape) == 2 and labels_shape[1] == C
        expected = f"(batch, {C})"
        if kind == "regression" and C == 1:
            fits = fits or len(labels_shape) == 1
            expected = "(batch,) or (batch, 1)"
    if not fits:
        why = "as the config says" if config.problem_type else "which the labels' type means"
        raise InputError(
            f"labels has shape {tuple(labels_shape)}; expected {expected}, for problem_type "
            f"{kind!r} ({why}) with num_labels={C}. Integers choose one label for each row; for "
            "several at once give floating-point 0 and 1."
        )
    return kind


def meaning_of_logits(config: GemmaConfig) -> ProblemType:
    """What logits stand for where there are no labels: the config's problem type, else a choice.

    One label is a regression here too.
    """
    return _stated_or_meant(config, labels_are_integers=True)


def _stated_or_meant(config: GemmaConfig, labels_are_integers: bool) -> ProblemType:
    if config.problem_type is not None:
        return config.problem_type  # type: ignore[return-value]  # the config checked it
    if config.num_labels == 1:
        return "regression"
    return "single_label_classification" if labels_are_integers else "multi_label_classification"
