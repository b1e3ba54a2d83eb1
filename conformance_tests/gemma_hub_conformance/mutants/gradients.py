"""Bugs in the backward pass; the forward pass of each is right."""

import dataclasses
import math
from typing import Any

import numpy as np

from gemma_hub.errors import UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.labels import IGNORED
from gemma_hub_conformance.checkpoints import PAD_ID
from gemma_hub_conformance.mutants.bank import Bank, StandInModel, to_bfloat16
from gemma_hub_numpy.losses import labels_of
from gemma_hub_numpy.model import Array, Gradients, Reference

bank = Bank()
CAUSAL = "L5.gradients.causal.gqa"
EMBEDDING = "model.embed_tokens.weight"


@bank.mutant(CAUSAL, "Norm weights have a gradient.")
class GradNormWeightMissing(Reference):
    def add_gradient(self, into: Gradients, name: str, value: Array) -> None:
        super().add_gradient(into, name, value * 0.0 if "norm" in name else value)


@bank.mutant(CAUSAL, "The backward of a norm multiplies by 1 + weight, not by weight.")
class GradNormWithoutOffset(Reference):
    def rms_norm_backward(self, d: Array, x: Array, name: str, into: Gradients) -> Array:
        offset = self.norm_factor
        self.norm_factor = lambda weight: weight  # type: ignore[method-assign]
        try:
            return super().rms_norm_backward(d, x, name, into)
        finally:
            self.norm_factor = offset  # type: ignore[method-assign]


@bank.mutant(CAUSAL, "The root in a norm depends on the input too.")
class GradNormRootConstant(Reference):
    def rms_norm_backward(self, d: Array, x: Array, name: str, into: Gradients) -> Array:
        super().rms_norm_backward(d, x, name, into)
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return np.asarray(d * self.norm_factor(self.parameter(name)) / root)


@bank.mutant(CAUSAL, "Keys have a gradient.")
class GradKeysStopped(Reference):
    def scores_backward(self, d: Array, q: Array, k: Array, scores: Array) -> tuple[Array, Array]:
        d_q, d_k = super().scores_backward(d, q, k, scores)
        return d_q, np.zeros_like(d_k)


@bank.mutant(CAUSAL, "The scale of the scores is in the gradient.")
class GradScaleMissing(Reference):
    def scores_backward(self, d: Array, q: Array, k: Array, scores: Array) -> tuple[Array, Array]:
        return super().scores_backward(d / self.attention_scale(), q, k, scores)


@bank.mutant(CAUSAL, "A tied head gives the embedding a gradient.")
class GradTiedWithoutHead(Reference):
    def head_backward(self, d: Array, x: Array, logits: Array, into: Gradients) -> Array:
        kept = {} if self.config.tie_word_embeddings else into
        return super().head_backward(d, x, logits, kept)


@bank.mutant(CAUSAL, "A tied embedding has a gradient from the lookup as well.")
class GradTiedHeadOnly(Reference):
    def embed_backward(self, d: Array, ids: Array, into: Gradients) -> None:
        if not self.config.tie_word_embeddings:
            super().embed_backward(d, ids, into)


@bank.mutant(CAUSAL, "The embedding scale is in the gradient.")
class GradEmbeddingScaleMissing(Reference):
    def embed_backward(self, d: Array, ids: Array, into: Gradients) -> None:
        super().embed_backward(d / self.embedding_scale(), ids, into)


@bank.mutant(CAUSAL, "A token that occurs twice has the sum of both gradients.")
class GradLastLookupWins(Reference):
    def embed_backward(self, d: Array, ids: Array, into: Gradients) -> None:
        _, last = np.unique(ids.ravel()[::-1], return_index=True)
        is_last = np.isin(np.arange(ids.size)[::-1], last).reshape(ids.shape)
        super().embed_backward(np.where(is_last[..., None], d, 0.0), ids, into)


@bank.mutant(
    "L5.gradients.causal.pad_id_as_token", "Looking up the pad id's row gives it no gradient."
)
class GradPaddingRowTrained(Reference):
    def embed_backward(self, d: Array, ids: Array, into: Gradients) -> None:
        super().embed_backward(d, ids, into)
        if self.config.tie_word_embeddings:
            into[EMBEDDING][PAD_ID] += d[ids == PAD_ID].sum(axis=0)


@bank.mutant("L5.gradients.untied_padding_row", "The pad id's row stays as it is.")
class GradPaddingRowUntied(Reference):
    def embed_backward(self, d: Array, ids: Array, into: Gradients) -> None:
        super().embed_backward(d, ids, into)
        if not self.config.tie_word_embeddings:
            into[EMBEDDING][PAD_ID] += d[ids == PAD_ID].sum(axis=0)


@bank.mutant("L5.gradients.causal.pad_id_as_token", "A tied head trains the pad id's row too.")
class GradPaddingRowZeroed(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        found[EMBEDDING][PAD_ID] = 0.0
        return found


@bank.mutant(CAUSAL, "The gradient is that of the mean over tokens, not of the sum.")
class GradOfSum(Reference):
    def cross_entropy_backward(self, logits: Array, labels: Array, divisor: int) -> Array:
        return super().cross_entropy_backward(logits, labels, 1)


@bank.mutant(CAUSAL, "A label of -100 has no gradient.")
class GradOfIgnored(Reference):
    def cross_entropy_backward(self, logits: Array, labels: Array, divisor: int) -> Array:
        counted = np.where(labels == IGNORED, 0, labels)
        return super().cross_entropy_backward(logits, counted, divisor)


@bank.mutant(CAUSAL, "Rotation is undone by the opposite angle.")
class GradRopeSign(Reference):
    def rotate_backward(self, d: Array, angles: Array) -> Array:
        return super().rotate_backward(d, -angles)


@bank.mutant(CAUSAL, "The gradient goes through the rotation.")
class GradRopeMissing(Reference):
    def rotate_backward(self, d: Array, angles: Array) -> Array:
        return d


@bank.mutant(CAUSAL, "A probability depends on every score of its row.")
class GradSoftmaxDiagonal(Reference):
    def softmax_backward(self, d: Array, probs: Array, visible: Array) -> Array:
        return np.asarray(probs * d)


@bank.mutant(CAUSAL, "The sum in the softmax's backward is of one query's, not of one key's.")
class GradSoftmaxSumOverQueries(Reference):
    def softmax_backward(self, d: Array, probs: Array, visible: Array) -> Array:
        return np.asarray(probs * (d - (d * probs).sum(axis=2, keepdims=True)))


@bank.mutant(CAUSAL, "The derivative is that of the tanh form of GELU.")
class GradGeluErf(Reference):
    def activation_backward(self, d: Array, x: Array) -> Array:
        erf = np.vectorize(math.erf)
        density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return np.asarray(d * (0.5 * (1 + erf(x / math.sqrt(2))) + x * density))


@bank.mutant(CAUSAL, "gate and up have gradients of their own.")
class GradGateUpExchanged(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        return _renamed(super().gradients(inputs, tape), "gate_proj", "up_proj")


@bank.mutant(CAUSAL, "The gradient of layer i is that of layer i.")
class GradLayerShifted(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found, last = super().gradients(inputs, tape), self.config.num_hidden_layers - 1
        return _renamed(found, "layers.0.", f"layers.{last}.")


def _renamed(gradients: Gradients, one: str, other: str) -> Gradients:
    def other_name(name: str) -> str:
        if one in name:
            return name.replace(one, other)
        return name.replace(other, one)

    return {name: gradients[other_name(name)] for name in gradients}


@bank.mutant(CAUSAL, "The residual stream passes the gradient on around the MLP.")
class GradResidualMissing(Reference):
    def mlp_backward(self, d: Array, i: int, tape: dict[str, Array], into: Gradients) -> Array:
        return super().mlp_backward(d, i, tape, into) * (0.0 if i == 0 else 1.0)


@bank.mutant("L5.gradients.causal.mqa", "A shared kv head has the sum of its queries' gradients.")
class GradSharedHeadMean(Reference):
    def kv_heads_backward(self, d: Array) -> Array:
        K, N = self.config.num_key_value_heads, self.config.num_attention_heads
        return super().kv_heads_backward(d) / (N // K if K == 1 else 1)


@bank.mutant("L5.gradients.causal.mha", "Heads that share nothing have their own gradients.")
class GradHeadsReversed(Reference):
    def kv_heads_backward(self, d: Array) -> Array:
        found = super().kv_heads_backward(d)
        K, N = self.config.num_key_value_heads, self.config.num_attention_heads
        return found[:, :, ::-1] if K == N else found


@bank.mutant("L5.gradients.causal.untied", "An untied head has a gradient of its own.")
class GradUntiedHeadToEmbedding(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        head = found.get("lm_head.weight")
        if head is not None:
            found[EMBEDDING] += head
            found["lm_head.weight"] = np.zeros_like(head)
        return found


@bank.mutant("L5.gradients.causal.bias", "A bias has the sum over tokens.")
class GradBiasMean(Reference):
    def add_gradient(self, into: Gradients, name: str, value: Array) -> None:
        is_bias = ".self_attn." in name and name.endswith(".bias")
        super().add_gradient(into, name, value / 69 if is_bias else value)


@bank.mutant("L5.gradients.causal.bias", "The bias of the keys turns with them, so it matters.")
class GradKeyBiasZero(Reference):
    def add_gradient(self, into: Gradients, name: str, value: Array) -> None:
        super().add_gradient(into, name, value * 0.0 if "k_proj.bias" in name else value)


@bank.mutant("L5.gradients.causal.right_padding", "Padding takes no part in a gradient.")
class GradOfPadding(Reference):
    def loss_backward(self, logits: Array, inputs: ModelInputs) -> Array:
        labels = np.where(inputs.attention_mask, labels_of(inputs), PAD_ID)
        return super().loss_backward(logits, dataclasses.replace(inputs, labels=labels))


@bank.mutant(CAUSAL, "Gradients of a float32 model are in float32.")
class GradInBf16(Reference):
    def add_gradient(self, into: Gradients, name: str, value: Array) -> None:
        super().add_gradient(into, name, to_bfloat16(value))


@bank.mutant(CAUSAL, "Every weight is [out, in], its gradient too.")
class GradTransposed(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        return {
            name: value.T.reshape(value.shape) if "o_proj.weight" in name else value
            for name, value in found.items()
        }


@bank.mutant("L5.gradients.token", "The bias of a token classifier has a gradient.")
class GradScoreBiasMissing(Reference):
    def add_gradient(self, into: Gradients, name: str, value: Array) -> None:
        super().add_gradient(into, name, value * 0.0 if name == "score.bias" else value)


@bank.mutant("L5.gradients.sequence.single_label", "Only the pooled token has a gradient.")
class GradPooledToAll(Reference):
    def pool_backward(self, d: Array, pooled_positions: Array, T: int) -> Array:
        return np.repeat(d[:, None], T, axis=1) / T


@bank.mutant("L5.gradients.sequence.multi_label", "Several labels are independent: no softmax.")
class GradBceOfSoftmax(Reference):
    def binary_cross_entropy_backward(self, logits: Array, labels: Array) -> Array:
        return np.asarray((np.exp(self.log_softmax(logits)) - labels) / labels.size)


@bank.mutant("L5.gradients.sequence.regression", "The square has a 2 in its gradient.")
class GradMseHalved(Reference):
    def squared_error_backward(self, values: Array, labels: Array) -> Array:
        return super().squared_error_backward(values, labels) / 2


@bank.mutant("L5.gradients.along_directions.causal", "The gradient points uphill.")
class GradDownhill(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        return {name: -value for name, value in super().gradients(inputs, tape).items()}


@bank.mutant("L5.gradients.along_directions.token", "A gradient is not clipped.")
class GradClipped(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        norm = math.sqrt(sum(float((value**2).sum()) for value in found.values()))
        return {name: value / max(norm, 1.0) for name, value in found.items()}


@bank.mutant("L5.gradients.along_directions.sequence", "A gradient has no weight decay in it.")
class GradWithDecay(Reference):
    def gradients(self, inputs: ModelInputs, tape: dict[str, Array]) -> Gradients:
        found = super().gradients(inputs, tape)
        return {name: value + 0.01 * self.parameter(name) for name, value in found.items()}


@bank.mutant("L5.gradients.loss", "The loss beside the gradients is that of the batch.")
class GradLossOfSum(StandInModel):
    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        loss, gradients = super().loss_and_gradients(inputs)
        return loss * inputs.shape[0], gradients


@bank.mutant("L5.gradients.repeated_call", "Gradients do not add up from call to call.")
class GradAccumulates(StandInModel):
    _before: Gradients | None = None

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        loss, gradients = super().loss_and_gradients(inputs)
        if self._before is not None:
            gradients = {name: value + self._before[name] for name, value in gradients.items()}
        self._before = gradients
        return loss, gradients


@bank.mutant(CAUSAL, "Every parameter has a gradient, and no other name.")
class GradNameMissing(StandInModel):
    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        loss, gradients = super().loss_and_gradients(inputs)
        return loss, {n: value for n, value in gradients.items() if n != "model.norm.weight"}


@bank.mutant("L5.contract.gradients_need_labels", "Inputs without labels have no gradients.")
class GradOfOwnIds(StandInModel):
    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        if inputs.labels is None:
            inputs = dataclasses.replace(inputs, labels=inputs.input_ids)
        return super().loss_and_gradients(inputs)


@bank.mutant("L5.contract.base_has_no_gradients", "A model without a loss has no gradients.")
class GradOfBaseIsZero(StandInModel):
    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        try:
            return super().loss_and_gradients(inputs)
        except UnsupportedFeature:
            native: Any = self.native
            return 0.0, {name: np.zeros(shape) for name, shape in native.shapes.items()}
