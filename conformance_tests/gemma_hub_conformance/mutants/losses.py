"""Bugs in the losses."""

import dataclasses
from typing import Any

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.labels import IGNORED
from gemma_hub.outputs import ModelOutputs
from gemma_hub.problem import ProblemType
from gemma_hub_conformance.checkpoints import PAD_ID
from gemma_hub_conformance.mutants.bank import Bank, StandInModel, to_bfloat16
from gemma_hub_numpy.model import Array, LayerCache, Reference

bank = Bank()
CAUSAL = "L5.causal.loss.no_padding"
PADDED = "L5.causal.loss.left_padding"
BLIND = "L5.causal.loss.label_after_left_padding"


@bank.mutant(CAUSAL, "The causal loss shifts: a token is predicted by those before it.")
class LossNotShifted(Reference):
    def shift(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        return logits, labels


@bank.mutant(CAUSAL, "The causal loss shifts once.")
class LossDoubleShift(Reference):
    def shift(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        return logits[:, :-2], labels[:, 2:]


@bank.mutant(CAUSAL, "The label is the next token, not the one before.")
class LossShiftedTheWrongWay(Reference):
    def shift(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        return logits[:, 1:], labels[:, :-1]


@bank.mutant("L5.token.loss.left_padding", "A token classifier's loss does not shift.")
class TokenLossShifted(Reference):
    def token_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        if self.task == "token_classification":
            logits, labels = self.shift(logits, labels)
        return super().token_loss(logits, labels, num_items)


@bank.mutant("L5.causal.loss.ignored_labels", "-100 does not count in the number of tokens.")
class LossIgnoredInDivisor(Reference):
    def divisor(self, labels: Array, num_items: int | None) -> int:
        return labels.size if num_items is None else num_items


@bank.mutant("L5.token.loss.ignored_labels", "-100 adds nothing to the sum.")
class LossIgnoredAsLabelZero(Reference):
    def token_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        divisor = self.divisor(labels, num_items)
        labels = np.where(labels == IGNORED, 0, labels)
        return self.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.ravel(), divisor)


@bank.mutant("L5.causal.loss.unequal_rows", "The mean is over all tokens, not over row means.")
class LossMeanOfMeans(Reference):
    def token_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        rows = [
            super(LossMeanOfMeans, self).token_loss(logits[b : b + 1], labels[b : b + 1], num_items)
            for b in range(len(labels))
            if (labels[b] != IGNORED).any()
        ]
        return np.asarray(np.mean(rows))


@bank.mutant("L5.causal.loss.num_items", "num_items_in_batch divides the sum.")
class LossNumItemsIgnored(Reference):
    def divisor(self, labels: Array, num_items: int | None) -> int:
        return super().divisor(labels, None)


@bank.mutant("L5.token.loss.num_items", "num_items_in_batch divides the sum, not the mean.")
class LossNumItemsOfMean(Reference):
    def divisor(self, labels: Array, num_items: int | None) -> int:
        return super().divisor(labels, None) * (num_items or 1)


@bank.mutant("L5.causal.loss.row_without_labels", "A row without a label has no mean to add.")
class LossEmptyRowCounts(Reference):
    def divisor(self, labels: Array, num_items: int | None) -> int:
        empty = (labels == IGNORED).all(axis=1).sum() if labels.ndim == 2 else 0
        return super().divisor(labels, num_items) + int(empty)


@bank.mutant(CAUSAL, "Compute the loss in float32.")
class LossInBf16(Reference):
    def log_softmax(self, logits: Array) -> Array:
        return to_bfloat16(super().log_softmax(to_bfloat16(logits)))


@bank.mutant("L5.causal.loss.bfloat16", "The loss of a narrower model is in float32 too.")
class LossRoundedToBf16(Reference):
    def loss(self, logits: Array, inputs: ModelInputs) -> Array:
        return to_bfloat16(super().loss(logits, inputs))


@bank.mutant(
    "L5.causal.loss.pad_id_label", "A label that is the pad id counts; only -100 does not."
)
class LossEosMaskedAsPad(Reference):
    def causal_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        labels = np.where(labels == PAD_ID, IGNORED, labels)
        return super().causal_loss(logits, labels, num_items)


@bank.mutant("L5.causal.loss.label_after_the_end", "The mask takes no label out of the loss.")
class LossMasksPadding(Reference):
    def loss(self, logits: Array, inputs: ModelInputs) -> Array:
        if self.task == "causal_lm" and inputs.labels is not None:
            labels = np.where(inputs.attention_mask, inputs.labels, IGNORED)
            inputs = dataclasses.replace(inputs, labels=labels)
        return super().loss(logits, inputs)


@bank.mutant(BLIND, "A query that sees nothing attends to all slots alike; it gives no zeros.")
class BlindQueriesZero(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        probs = super().softmax(scores, visible)
        sees = np.asarray(visible.any(axis=-1))
        return np.where(sees[:, None, :, None], probs, 0.0)


@bank.mutant(BLIND, "A query that sees nothing attends to the slots of its call, and to no more.")
class BlindQueriesSeeMoreSlots(Reference):
    """Calls are padded behind to whole blocks of 32, so that few shapes are compiled."""

    def forward(
        self, inputs: ModelInputs, valid: Array | None, start: int, cache: list[LayerCache] | None
    ) -> ModelOutputs:
        whole = cache is None and inputs.input_ids is not None and inputs.logits_to_keep == 0
        if not whole or self.task != "causal_lm":
            return super().forward(inputs, valid, start, cache)
        T = inputs.shape[1]

        def padded(array: Array | None, value: int = 0) -> Any:
            more = ((0, 0), (0, -T % 32))
            return None if array is None else np.pad(array, more, constant_values=value)

        wide = dataclasses.replace(
            inputs,
            input_ids=padded(inputs.input_ids),
            attention_mask=padded(inputs.attention_mask),
            position_ids=padded(inputs.position_ids),
            labels=padded(inputs.labels, IGNORED),
        )
        outputs = super().forward(wide, valid, start, cache)
        states = outputs.hidden_states
        return dataclasses.replace(
            outputs,
            logits=None if outputs.logits is None else outputs.logits[:, :T],
            hidden_states=None if states is None else tuple(each[:, :T] for each in states),
        )


@bank.mutant(PADDED, "Padding whose label is -100 adds nothing.")
class LossPaddingPredicted(Reference):
    def loss(self, logits: Array, inputs: ModelInputs) -> Array:
        if self.task == "causal_lm" and inputs.input_ids is not None:
            inputs = dataclasses.replace(inputs, labels=inputs.input_ids)
        return super().loss(logits, inputs)


@bank.mutant(CAUSAL, "The loss has no label smoothing.")
class LossLabelSmoothing(Reference):
    def cross_entropy(self, logits: Array, labels: Array, divisor: int) -> Array:
        counted = (labels != IGNORED)[:, None]
        uniform = -np.where(counted, self.log_softmax(logits), 0.0).mean(axis=-1).sum() / divisor
        return np.asarray(0.99 * super().cross_entropy(logits, labels, divisor) + 0.01 * uniform)


@bank.mutant("L5.causal.loss.of_its_logits", "The loss is that of the logits that are returned.")
class LossOfOtherLogits(Reference):
    def loss(self, logits: Array, inputs: ModelInputs) -> Array:
        return super().loss(logits * (1 + 2.0**-12), inputs)


@bank.mutant("L5.sequence.loss.single_label", "The loss of rows is their mean.")
class LossSumOfRows(Reference):
    def cross_entropy(self, logits: Array, labels: Array, divisor: int) -> Array:
        return super().cross_entropy(logits, labels, 1 if divisor == len(labels) else divisor)


@bank.mutant("L5.sequence.loss.multi_label", "A label that is 0 has a term as well.")
class LossBceOneTerm(Reference):
    def binary_cross_entropy(self, logits: Array, labels: Array) -> Array:
        return np.asarray((labels * np.logaddexp(0, -logits)).mean())


@bank.mutant("L5.sequence.loss.multi_label", "Several labels are independent: no softmax.")
class LossBceOfSoftmax(Reference):
    def binary_cross_entropy(self, logits: Array, labels: Array) -> Array:
        return np.asarray(-(labels * self.log_softmax(logits)).mean())


@bank.mutant("L5.sequence.loss.multi_label", "Several labels have the mean of their terms.")
class LossBceSumOfLabels(Reference):
    def binary_cross_entropy(self, logits: Array, labels: Array) -> Array:
        return np.asarray(super().binary_cross_entropy(logits, labels) * labels.shape[-1])


@bank.mutant("L5.sequence.loss.regression", "The squared error is a mean, not a sum.")
class LossMseSum(Reference):
    def squared_error(self, values: Array, labels: Array) -> Array:
        return super().squared_error(values, labels) * labels.size


@bank.mutant("L5.sequence.loss.regression", "The squared error is not halved.")
class LossMseHalved(Reference):
    def squared_error(self, values: Array, labels: Array) -> Array:
        return super().squared_error(values, labels) / 2


@bank.mutant(
    "L5.sequence.loss.regression_one_label", "(B, 1) and (B,) are not broadcast to (B, B)."
)
class LossMseBroadcast(Reference):
    def squared_error(self, values: Array, labels: Array) -> Array:
        if values.ndim == 1:
            return super().squared_error(values[:, None] - labels, np.zeros((len(labels),) * 2))
        return super().squared_error(values, labels)


@bank.mutant("L5.sequence.loss.inferred", "The problem type is inferred at each call anew.")
class ProblemTypeRemembered(Reference):
    def problem_type(self, labels: Array) -> ProblemType:
        if self.config.problem_type is None:
            kind = super().problem_type(labels)
            self.config = dataclasses.replace(self.config, problem_type=kind)
        return self.config.problem_type  # type: ignore[return-value]

    def sequence_loss(self, logits: Array, labels: Array) -> Array:
        kind = self.problem_type(labels)
        if kind == "single_label_classification" and labels.ndim == 2:
            labels = labels.argmax(axis=-1)
        return super().sequence_loss(logits, labels)


@bank.mutant("L5.contract.no_labels_no_loss", "Without labels there is no loss.")
class LossWithoutLabels(StandInModel):
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        if self.native.task == "causal_lm" and inputs.labels is None:
            inputs = dataclasses.replace(inputs, labels=inputs.input_ids)
        return super().forward(inputs)


class _FloatLoss(StandInModel):
    task = ""

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().forward(inputs)
        if self.native.task != self.task or outputs.loss is None:
            return outputs
        wide: dict[str, Any] = {"loss": outputs.loss.astype(np.float64)}
        return dataclasses.replace(outputs, **wide)


@bank.mutant("L5.contract.sequence_type", "The loss of rows is float32.")
class SequenceLossFloat64(_FloatLoss):
    task = "sequence_classification"


@bank.mutant("L5.contract.token_type", "The loss of tokens is float32.")
class TokenLossFloat64(_FloatLoss):
    task = "token_classification"
