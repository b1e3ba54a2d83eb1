"""Bugs of heads, losses and gradients that no list has."""

import dataclasses
import math
from typing import Any

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.labels import IGNORED
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank, StandInModel, to_bfloat16
from gemma_hub_numpy.model import Array, Gradients, Reference

bank = Bank()
CAUSAL = "L5.gradients.causal.gqa"
LOSS = "L5.causal.loss.no_padding"
EMBEDDING = "model.embed_tokens.weight"


# -- heads ---------------------------------------------------------------------------------------


class _Pooled(Reference):
    """Chooses the token that stands for a row in a way of its own."""

    def pooled(self, inputs: ModelInputs, positions: Array) -> Array:
        raise NotImplementedError

    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if inputs.pooled_positions is not None:
            pooled = self.pooled(inputs, inputs.pooled_positions)
            inputs = dataclasses.replace(inputs, pooled_positions=pooled)
        return super().run(inputs, *args, **kwargs)


@bank.mutant("L5.sequence.logits.both_sides", "Position 0 is a token's as well as padding's.")
class PoolByPositions(_Pooled):
    """Takes slots whose position is 0 for padding, and the last of the others."""

    def pooled(self, inputs: ModelInputs, positions: Array) -> Array:
        real = inputs.position_ids > 0
        return np.asarray(np.where(real, np.arange(inputs.shape[1]), 0).max(axis=1))


@bank.mutant("L5.sequence.logits.right_padding", "Every row has a last token of its own.")
class PoolOfLongestRow(_Pooled):
    def pooled(self, inputs: ModelInputs, positions: Array) -> Array:
        return np.full_like(positions, positions.max())


@bank.mutant("L5.sequence.logits.right_padding", "A row's place is found in its own slots.")
class PoolInFlatBatch(Reference):
    """Finds row b of the flat features at b times the number of its tokens."""

    def pool(self, x: Array, pooled_positions: Array) -> Array:
        first = np.arange(len(x)) * int(pooled_positions.min() + 1)
        flat = x.reshape(-1, x.shape[-1])
        return np.asarray(flat[np.minimum(first + pooled_positions, len(flat) - 1)])


@bank.mutant("L5.sequence.logits.no_padding", "Logits of a classifier are not probabilities.")
class ScoreSoftmaxed(Reference):
    def pool(self, x: Array, pooled_positions: Array) -> Array:
        return np.asarray(np.exp(self.log_softmax(super().pool(x, pooled_positions))))


@bank.mutant("L5.sequence.logits.no_padding", "A sequence classifier has no cap and no tanh.")
class ScoreOfTanh(Reference):
    """Pools as BERT does, through a tanh."""

    def score_head(self, x: Array) -> Array:
        return super().score_head(np.tanh(x) if self.task == "sequence_classification" else x)


@bank.mutant("L5.token.logits.no_padding", "Labels have the order of the rows of the head.")
class ScoreLabelsReversed(Reference):
    def score_head(self, x: Array) -> Array:
        logits = super().score_head(x)
        return logits[..., ::-1] if self.task == "token_classification" else logits


@bank.mutant("L5.base.last_hidden_state.no_padding", "The base model's result has its own type.")
class BaseRounded(Reference):
    def final_norm(self, x: Array) -> Array:
        normed = super().final_norm(x)
        return to_bfloat16(normed) if self.task == "base" else normed


@bank.mutant("L5.attentions.gqa", "Attentions have an entry for every layer, in their order.")
class AttentionsLastFirst(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        outputs = super().run(inputs, *args, **kwargs)
        shown = outputs.attentions
        return outputs if shown is None else dataclasses.replace(outputs, attentions=shown[::-1])


@bank.mutant("L5.attentions.mha", "Attentions are those of this layer's own scores, as used.")
class AttentionsWithoutPositions(Reference):
    """Computes what it shows anew, from queries and keys that are not rotated."""

    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if not inputs.output_attentions:
            return super().run(inputs, *args, **kwargs)
        with self.taping() as tape:
            outputs = super().run(inputs, *args, **kwargs)
        shown = []
        for i in range(self.config.num_hidden_layers):
            at = f"model.layers.{i}.self_attn"
            scores = self.scores(tape[f"{at}.q_proj"], tape[f"{at}.k_proj"])
            shown.append(self.softmax(scores, tape[f"{at}.visible"]))
        return dataclasses.replace(outputs, attentions=tuple(shown))


# -- losses --------------------------------------------------------------------------------------


@bank.mutant(LOSS, "Rows that fill up the vocabulary are not in the sum of the softmax.")
class LossOverPaddedVocabulary(Reference):
    def log_softmax(self, logits: Array) -> Array:
        V = logits.shape[-1]
        wide = np.concatenate([logits, np.zeros((len(logits), -V % 64))], axis=-1)
        return super().log_softmax(wide)[:, :V]


@bank.mutant(LOSS, "A loss in chunks is the sum of all terms over their number.")
class LossOfChunkMeans(Reference):
    def cross_entropy(self, logits: Array, labels: Array, divisor: int) -> Array:
        parts = []
        for first in range(0, len(labels), 16):
            part = slice(first, first + 16)
            count = int((labels[part] != IGNORED).sum())
            if count:
                parts.append(super().cross_entropy(logits[part], labels[part], count))
        return np.asarray(np.mean(parts))


@bank.mutant(LOSS, "The last chunk of a loss counts, however short.")
class LossLastChunkMissing(Reference):
    def cross_entropy(self, logits: Array, labels: Array, divisor: int) -> Array:
        whole = len(labels) // 16 * 16 or len(labels)
        return super().cross_entropy(logits[:whole], labels[:whole], divisor)


@bank.mutant(LOSS, "The loss has no term for the size of the logits.")
class LossWithZTerm(Reference):
    def cross_entropy(self, logits: Array, labels: Array, divisor: int) -> Array:
        counted = labels != IGNORED
        total = np.log(np.exp(logits[counted]).sum(axis=-1))
        extra = 1e-4 * (total**2).sum() / divisor
        return np.asarray(super().cross_entropy(logits, labels, divisor) + extra)


@bank.mutant(LOSS, "The logarithm of the loss is the natural one.")
class LossInBits(Reference):
    def cross_entropy(self, logits: Array, labels: Array, divisor: int) -> Array:
        return super().cross_entropy(logits, labels, divisor) / math.log(2)


@bank.mutant("L5.token.loss.left_padding", "Label 0 is a label like any other.")
class LossIgnoresLabelZero(Reference):
    def token_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        return super().token_loss(logits, np.where(labels == 0, IGNORED, labels), num_items)


@bank.mutant("L5.sequence.loss.multi_label", "A label between 0 and 1 is what it is.")
class LossLabelsThresholded(Reference):
    def binary_cross_entropy(self, logits: Array, labels: Array) -> Array:
        return super().binary_cross_entropy(logits, (labels > 0.5).astype(np.float64))


@bank.mutant("L5.sequence.loss.regression", "A large error is squared too.")
class LossHuber(Reference):
    def squared_error(self, values: Array, labels: Array) -> Array:
        size = np.abs(values - labels)
        return np.asarray(np.where(size < 1, size**2, 2 * size - 1).mean())


@bank.mutant("L5.causal.loss.num_items", "num_items_in_batch is not multiplied by the rows.")
class LossNumItemsPerRow(Reference):
    def token_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        per_row = None if num_items is None else num_items // len(labels)
        return super().token_loss(logits, labels, per_row)


# -- gradients -----------------------------------------------------------------------------------


@bank.mutant(CAUSAL, "Values have a gradient.")
class GradValuesStopped(Reference):
    def mix_backward(self, d: Array, probs: Array, v: Array) -> tuple[Array, Array]:
        d_probs, d_v = super().mix_backward(d, probs, v)
        return d_probs, np.zeros_like(d_v)


@bank.mutant(CAUSAL, "The gate has a gradient through its activation.")
class GradGateStopped(Reference):
    def activation_backward(self, d: Array, x: Array) -> Array:
        return np.zeros_like(d)


@bank.mutant(CAUSAL, "The slope of GELU is taken at its input, not at its result.")
class GradGeluAtResult(Reference):
    def activation_backward(self, d: Array, x: Array) -> Array:
        return super().activation_backward(d, self.activation(x))


@bank.mutant(CAUSAL, "Recomputed activations are those of the same layer.")
class GradRecomputedOneLayerOff(Reference):
    def mlp_backward(self, d: Array, i: int, tape: dict[str, Array], into: Gradients) -> Array:
        last = self.config.num_hidden_layers - 1
        other = f"model.layers.{min(i + 1, last)}.mlp.gate"
        moved = tape | {f"model.layers.{i}.mlp.gate": tape[other]}
        return super().mlp_backward(d, i, moved, into)


@bank.mutant(CAUSAL, "The gradient of a batch is that of all its rows.")
class GradOfLastRow(Reference):
    """Overwrites where it should add up the rows."""

    def loss_backward(self, logits: Array, inputs: ModelInputs) -> Array:
        d = super().loss_backward(logits, inputs)
        d[:-1] = 0.0
        return d


@bank.mutant(CAUSAL, "The mean is taken once, not over devices again.")
class GradMeanedTwice(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        return {name: value / inputs.shape[0] for name, value in found.items()}


@bank.mutant(CAUSAL, "A tied head trains every row, not only those that were looked up.")
class GradTiedSparse(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        if self.config.tie_word_embeddings and inputs.input_ids is not None:
            unseen = np.setdiff1d(np.arange(self.config.vocab_size), inputs.input_ids)
            found[EMBEDDING][unseen] = 0.0
        return found


@bank.mutant(CAUSAL, "Both uses of a tied embedding add up; they are not averaged.")
class GradTiedHalved(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        if self.config.tie_word_embeddings:
            found[EMBEDDING] = found[EMBEDDING] / 2
        return found


@bank.mutant(CAUSAL, "Query heads that share a key add up; the last one does not win.")
class GradSharedHeadLastWins(Reference):
    def kv_heads_backward(self, d: Array) -> Array:
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        return d[:, :, group - 1 :: group]


@bank.mutant(CAUSAL, "The backward of a norm has epsilon too.")
class GradNormWithoutEps(Reference):
    def rms_norm_backward(self, d: Array, x: Array, name: str, into: Gradients) -> Array:
        config = self.config
        self.config = dataclasses.replace(config, rms_norm_eps=1e-30)
        try:
            return super().rms_norm_backward(d, x, name, into)
        finally:
            self.config = config


@bank.mutant(CAUSAL, "A gradient as small as 1e-4 is not 0.")
class GradSmallFlushed(Reference):
    def add_gradient(self, into: Gradients, name: str, value: Array) -> None:
        super().add_gradient(into, name, np.where(np.abs(value) < 1e-4, 0.0, value))


@bank.mutant(CAUSAL, "Gradients of a float32 model are not in float16 on their way.")
class GradInFloatSixteen(Reference):
    def block_backward(self, d: Array, i: int, tape: dict[str, Array], into: Gradients) -> Array:
        return super().block_backward(d.astype(np.float16).astype(np.float64), i, tape, into)


@bank.mutant(CAUSAL, "Every element of a gradient is as it is: none is clipped.")
class GradClippedByValue(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        return {name: np.clip(value, -0.01, 0.01) for name, value in found.items()}


@bank.mutant(CAUSAL, "The first layer and the embedding are trained too.")
class GradEndsAboveFirstLayer(Reference):
    """Stops where a frozen prefix would end."""

    def block_backward(self, d: Array, i: int, tape: dict[str, Array], into: Gradients) -> Array:
        kept = into if i else {}
        below = super().block_backward(d, i, tape, kept)
        return below if i else np.zeros_like(below)


@bank.mutant("L5.gradients.causal.untied", "An untied embedding is trained by its lookups.")
class GradUntiedEmbeddingZero(Reference):
    def embed_backward(self, d: Array, ids: Array, into: Gradients) -> None:
        if self.config.tie_word_embeddings:
            super().embed_backward(d, ids, into)


@bank.mutant("L5.gradients.causal.bias", "A value's bias has the sum of its gradient.")
class GradValueBiasOnce(Reference):
    """Takes the gradient of the bias from the last token alone."""

    def add_gradient(self, into: Gradients, name: str, value: Array) -> None:
        super().add_gradient(into, name, self._last if name.endswith("v_proj.bias") else value)

    def linear_backward(self, d: Array, x: Array, name: str, into: Gradients) -> Array:
        self._last = d[:, -1].sum(axis=0)
        return super().linear_backward(d, x, name, into)


@bank.mutant("L5.gradients.token", "The gradient is over the labels that count.")
class GradTokenDividedByAll(Reference):
    def token_loss_backward(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        if self.task == "token_classification":
            num_items = labels.size
        return super().token_loss_backward(logits, labels, num_items)


@bank.mutant("L5.gradients.sequence.multi_label", "The mean is over rows and labels.")
class GradBceMeanOfRows(Reference):
    def binary_cross_entropy_backward(self, logits: Array, labels: Array) -> Array:
        d = super().binary_cross_entropy_backward(logits, labels)
        return np.asarray(d * labels.shape[-1])


@bank.mutant("L5.gradients.sequence.regression", "The gradient of a square is not its sign.")
class GradMseOfSign(Reference):
    def squared_error_backward(self, values: Array, labels: Array) -> Array:
        return np.asarray(np.sign(values - labels) / labels.size)


@bank.mutant("L5.gradients.sequence.single_label", "Padding does not share a row's gradient.")
class GradPooledToLastSlot(Reference):
    def pool_backward(self, d: Array, pooled_positions: Array, T: int) -> Array:
        return super().pool_backward(d, np.maximum(pooled_positions - 1, 0), T)


@bank.mutant("L5.gradients.loss", "The loss beside the gradients is not the smoothed one.")
class GradLossAveraged(StandInModel):
    """Returns a running mean, as a progress bar shows it."""

    _mean: float | None = None

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        loss, gradients = super().loss_and_gradients(inputs)
        self._mean = loss if self._mean is None else 0.9 * self._mean + 0.1 * loss
        return self._mean, gradients
