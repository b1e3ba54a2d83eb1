"""The losses, in float32 whatever the compute type."""

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.labels import IGNORED
from gemma_hub.problem import ProblemType, problem_type
from gemma_hub_numpy.arithmetic import Arithmetic, Array


class Losses(Arithmetic):
    """From logits and labels to one number, an array of shape ()."""

    def loss(self, logits: Array, inputs: ModelInputs) -> Array:
        """The loss of the task; `inputs` have labels."""
        labels = labels_of(inputs)
        if self.task == "causal_lm":
            return self.causal_loss(logits, labels, inputs.num_items_in_batch)
        if self.task == "token_classification":
            return self.token_loss(logits, labels, inputs.num_items_in_batch)
        return self.sequence_loss(logits, labels)

    # -- over tokens ---------------------------------------------------------------------------

    def causal_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        """(B, T, V) logits and (B, T) labels: each token is predicted from those before it."""
        logits, labels = self.shift(logits, labels)
        return self.token_loss(logits, labels, num_items)

    def shift(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """Logits and the label that each predicts: the next one."""
        return logits[:, :-1], labels[:, 1:]

    def token_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        """(B, T, C) logits and (B, T) labels, each logit with the label of its own place."""
        divisor = self.divisor(labels, num_items)
        return self.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.ravel(), divisor)

    def divisor(self, labels: Array, num_items: int | None) -> int:
        """What a sum over tokens is divided by: `num_items`, or how many of them count."""
        return int((labels != IGNORED).sum()) if num_items is None else num_items

    # -- over rows -----------------------------------------------------------------------------

    def problem_type(self, labels: Array) -> ProblemType:
        """Which loss the labels of rows have."""
        return problem_type(self.config, labels.shape, labels.dtype.kind in "iu")

    def sequence_loss(self, logits: Array, labels: Array) -> Array:
        """(B, C) logits and (B,) or (B, C) labels: a mean over rows, or over all their labels."""
        kind = self.problem_type(labels)
        if kind == "single_label_classification":
            return self.cross_entropy(logits, labels, len(labels))
        if kind == "regression":
            return self.squared_error(logits.reshape(labels.shape), labels)
        return self.binary_cross_entropy(logits, labels)

    # -- the three losses ----------------------------------------------------------------------

    def log_softmax(self, logits: Array) -> Array:
        """(n, C) logits to the logarithms of their probabilities."""
        shifted = self.single(logits - logits.max(axis=-1, keepdims=True))
        powers = self.single(np.exp(shifted))
        total = self.single(self.contract("nc,c->n", powers, np.ones(powers.shape[-1])))
        return self.single(shifted - self.single(np.log(total))[:, None])

    def cross_entropy(self, logits: Array, labels: Array, divisor: int) -> Array:
        """(n, C) logits and (n,) labels: the sum of -log p(label) where it counts, / `divisor`."""
        is_counted = labels != IGNORED
        places = np.where(is_counted, labels, 0)[:, None]
        chosen = np.take_along_axis(self.log_softmax(logits), places, axis=-1)[:, 0]
        terms = np.where(is_counted, -chosen, 0.0)
        return self.single(self.total(terms) / divisor)

    def squared_error(self, values: Array, labels: Array) -> Array:
        """The mean square of the difference of two arrays of one shape."""
        difference = self.single(values - self.single(labels))
        return self.single(self.total(self.single(difference * difference)) / labels.size)

    def binary_cross_entropy(self, logits: Array, labels: Array) -> Array:
        """(B, C) logits and labels from 0 to 1: the mean of -log p(label), each for itself."""
        labels = self.single(labels)
        # log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), where nothing is past the range.
        tail = self.single(np.log1p(self.single(np.exp(-np.maximum(logits, -logits)))))
        terms = self.single(np.maximum(logits, 0) - self.single(logits * labels) + tail)
        return self.single(self.total(terms) / labels.size)

    def total(self, terms: Array) -> Array:
        """The sum of all entries."""
        return self.single(self.contract("n,n->", terms.ravel(), np.ones(terms.size)))


def labels_of(inputs: ModelInputs) -> Array:
    """The labels of inputs that have them."""
    assert inputs.labels is not None, "called only where there are labels"
    return inputs.labels
