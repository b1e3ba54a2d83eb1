"""SequenceClassifier: a checkpoint whose head says of each text which label it has."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.problem import meaning_of_logits
from gemma_hub.tasks.loaded_model import BATCH_SIZE, LoadedModel
from gemma_hub.tasks.probabilities import sigmoid, softmax


@dataclass(frozen=True, slots=True)
class Classification:
    """What a classifier says of one text.

    Attributes:
        label: the most probable label; None for a regression.
        probability: of that label; None for a regression.
        probabilities: {label: probability}, in the order of the ids; empty for a regression. They
            add up to 1, but where a text may have several labels each stands for itself.
        values: {label: value} of a regression; empty otherwise.
    """

    label: str | None
    probability: float | None
    probabilities: dict[str, float]
    values: dict[str, float]


class SequenceClassifier(LoadedModel):
    """A Gemma with a head over labels; `config.id2label` names them.

    `forward` gives logits (B, num_labels), from the last real token of each row.
    """

    task = "sequence_classification"

    def classify(
        self, texts: Sequence[str], *, batch_size: int = BATCH_SIZE
    ) -> list[Classification]:
        """The label of each text.

        What the logits mean is the config's problem_type: a choice of one label (softmax), several
        labels (sigmoid), or values (regression). Where it says nothing, one label is a regression
        and more are a choice.

        Args:
            texts: several texts; <bos> is put before each.
            batch_size: texts that run at once.

        Raises:
            InputError: an argument is wrong.
            CapacityError: a text is longer than the model's positions.
            TokenizerError: the checkpoint has no tokenizer.
        """
        rows = self._encoded(texts)
        logits = np.zeros((len(rows), self.config.num_labels), np.float64)
        for places, _, outputs in self._batches(rows, batch_size):
            logits[places] = outputs.logits
        return [self._classification(row) for row in logits]

    def _classification(self, logits: np.ndarray) -> Classification:
        kind = meaning_of_logits(self.config)
        names = self.config.id2label.values()
        if kind == "regression":
            return Classification(None, None, {}, dict(zip(names, logits.tolist(), strict=True)))
        is_choice = kind == "single_label_classification"
        probabilities = softmax(logits) if is_choice else sigmoid(logits)
        best = int(probabilities.argmax())
        return Classification(
            label=self.config.id2label[best],
            probability=float(probabilities[best]),
            probabilities=dict(zip(names, probabilities.tolist(), strict=True)),
            values={},
        )
