"""Bugs in the heads: which token stands for a row, and what the head is applied to."""

import dataclasses
from typing import Any

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.checkpoints import PAD_ID
from gemma_hub_conformance.mutants.bank import Bank, StandInModel
from gemma_hub_numpy.model import Array, LayerCache, Reference

bank = Bank()
LEFT = "L5.sequence.logits.left_padding"
RIGHT = "L5.sequence.logits.right_padding"


class _Pooled(Reference):
    """Chooses the token that stands for a row in a way of its own."""

    def pooled(self, inputs: ModelInputs) -> Array:
        raise NotImplementedError

    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if inputs.pooled_positions is not None:
            inputs = dataclasses.replace(inputs, pooled_positions=self.pooled(inputs))
        return super().run(inputs, *args, **kwargs)


@bank.mutant(LEFT, "The last real token is not at the number of real tokens - 1 with left padding.")
class PoolBySumOfMask(_Pooled):
    def pooled(self, inputs: ModelInputs) -> Array:
        return np.asarray(inputs.attention_mask.sum(axis=1) - 1)


@bank.mutant(
    "L5.sequence.logits.both_sides", "The last real token need not be before the first padding."
)
class PoolBeforeFirstPad(_Pooled):
    def pooled(self, inputs: ModelInputs) -> Array:
        return np.asarray((~inputs.attention_mask).argmax(axis=1) - 1)


@bank.mutant(RIGHT, "The last real token is not in the last slot with right padding.")
class PoolLastSlot(_Pooled):
    def pooled(self, inputs: ModelInputs) -> Array:
        return np.full(inputs.shape[0], inputs.shape[1] - 1)


@bank.mutant(
    "L5.sequence.logits.no_padding", "The last real token stands for a row, not the first."
)
class PoolFirstToken(_Pooled):
    def pooled(self, inputs: ModelInputs) -> Array:
        return np.asarray(inputs.attention_mask.argmax(axis=1))


@bank.mutant("L5.sequence.pooling.pad_id_inside", "The mask says which token is last, not the ids.")
class PoolByIdsDespiteMask(_Pooled):
    def pooled(self, inputs: ModelInputs) -> Array:
        assert inputs.input_ids is not None
        real = inputs.attention_mask & (inputs.input_ids != PAD_ID)
        return np.asarray(np.where(real, np.arange(inputs.shape[1]), 0).max(axis=1))


@bank.mutant("L5.sequence.pooling.mask_over_pad_ids", "A pad id under a mask of 1 is a real token.")
class PoolStripsTrailingPads(_Pooled):
    def pooled(self, inputs: ModelInputs) -> Array:
        if inputs.input_ids is None:
            return np.asarray(inputs.pooled_positions)
        real = inputs.input_ids != PAD_ID
        return np.asarray(np.where(real, np.arange(inputs.shape[1]), 0).max(axis=1))


@bank.mutant("L5.sequence.pooling.without_mask", "Without a mask the ids say which token is last.")
class PoolByMaskAlone(_Pooled):
    def pooled(self, inputs: ModelInputs) -> Array:
        return np.asarray(
            np.where(inputs.attention_mask, np.arange(inputs.shape[1]), 0).max(axis=1)
        )


@bank.mutant("L5.sequence.pooling.all_pad_row", "A row of pad ids only has logits like any other.")
class PoolAllPadRowZero(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        outputs = super().run(inputs, *args, **kwargs)
        if inputs.input_ids is not None and inputs.pooled_positions is not None:
            outputs.logits[(inputs.input_ids == PAD_ID).all(axis=1)] = 0.0
        return outputs


@bank.mutant(
    "L5.sequence.pooling.fully_masked_row", "A row without a real token has finite logits."
)
class PoolMeanOfNothing(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        outputs = super().run(inputs, *args, **kwargs)
        empty = ~inputs.attention_mask.any(axis=1)
        if outputs.logits is not None and outputs.logits.ndim == 2:
            outputs.logits[empty] = np.nan
        return outputs


@bank.mutant("L5.sequence.logits.no_padding", "One token stands for a row, not the mean of all.")
class PoolMean(Reference):
    def pool(self, x: Array, pooled_positions: Array) -> Array:
        return np.asarray(x.mean(axis=1))


@bank.mutant("L5.sequence.inputs_embeds", "Rows of embeddings are pooled by the mask as well.")
class PoolEmbedsLastSlot(_Pooled):
    def pooled(self, inputs: ModelInputs) -> Array:
        if inputs.input_ids is None:
            return np.full(inputs.shape[0], inputs.shape[1] - 1)
        return np.asarray(inputs.pooled_positions)


@bank.mutant("L5.sequence.logits.no_padding", "The head reads the final norm's output.")
class ScoreBeforeFinalNorm(Reference):
    def final_norm(self, x: Array) -> Array:
        normed = super().final_norm(x)
        return x if self.task == "sequence_classification" else normed


@bank.mutant("L5.sequence.logits.no_padding", "The score matrix is [labels, hidden_size].")
class ScoreReadTransposed(Reference):
    def parameter(self, name: str) -> Array:
        value = super().parameter(name)
        return value.T.reshape(value.shape) if name == "score.weight" else value


@bank.mutant("L5.sequence.one_label", "One label is one column of logits, not two.")
class OneLabelSqueezed(StandInModel):
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().forward(inputs)
        if outputs.logits is not None and outputs.logits.shape[-1] == 1:
            return dataclasses.replace(outputs, logits=outputs.logits[:, 0])
        return outputs


@bank.mutant("L5.token.logits.no_padding", "The head of a token classifier has a bias.")
class ScoreBiasDropped(Reference):
    def score_head(self, x: Array) -> Array:
        return self.contract("bti,oi->bto", x, self.parameter("score.weight"))


@bank.mutant("L5.token.logits.no_padding", "Inference drops nothing before the head.")
class ScoreDropoutInEval(Reference):
    def score_head(self, x: Array) -> Array:
        if self.task != "token_classification":
            return super().score_head(x)
        rate = self.config.classifier_dropout
        kept = np.random.default_rng(0).random(x.shape) >= rate
        return super().score_head(x * kept / (1 - rate))


@bank.mutant("L5.token.logits.left_padding", "A token classifier does not shift its logits.")
class TokenLogitsShifted(Reference):
    def score_head(self, x: Array) -> Array:
        logits = super().score_head(x)
        return np.roll(logits, 1, axis=1) if self.task == "token_classification" else logits


@bank.mutant("L5.token.bfloat16", "Every label has a row of the head of its own.")
class ScoreLastLabelTwice(Reference):
    def score_head(self, x: Array) -> Array:
        logits = super().score_head(x)
        logits[..., 0] = logits[..., -1]
        return logits


@bank.mutant("L5.base.last_hidden_state.no_padding", "The base model's result is normed.")
class BaseWithoutFinalNorm(Reference):
    def final_norm(self, x: Array) -> Array:
        return x if self.task == "base" else super().final_norm(x)


@bank.mutant("L5.base.last_hidden_state.left_padding", "The base model does not see padding.")
class BaseSeesPadding(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        seen = np.ones_like(valid) if self.task == "base" else valid
        return super().visible(seen, start, T, layer)


class _Shown(Reference):
    """Returns something else for attentions."""

    def shown(self, tape: dict[str, Array], at: str) -> Array:
        raise NotImplementedError

    def run(
        self,
        inputs: ModelInputs,
        valid: Array | None = None,
        start: int = 0,
        cache: list[LayerCache] | None = None,
    ) -> ModelOutputs:
        with self.taping() as tape:
            outputs = self.forward(inputs, valid, start, cache)
        if not inputs.output_attentions:
            return outputs
        layers = [f"model.layers.{i}.self_attn" for i in range(self.config.num_hidden_layers)]
        return dataclasses.replace(outputs, attentions=tuple(self.shown(tape, at) for at in layers))


@bank.mutant("L5.attentions.gqa", "Attentions are probabilities, not scores.")
class AttentionsBeforeSoftmax(_Shown):
    def shown(self, tape: dict[str, Array], at: str) -> Array:
        return np.where(tape[f"{at}.visible"][:, None], tape[f"{at}.scores"], 0.0)


@bank.mutant("L5.attentions.gqa", "Attentions have one entry for each query head.")
class AttentionsMeanOfHeads(_Shown):
    def shown(self, tape: dict[str, Array], at: str) -> Array:
        probs = tape[f"{at}.probs"]
        return np.broadcast_to(probs.mean(axis=1, keepdims=True), probs.shape)


@bank.mutant("L5.attentions.mha", "Attentions are in the order of the query heads.")
class AttentionsHeadsReversed(_Shown):
    def shown(self, tape: dict[str, Array], at: str) -> Array:
        return np.flip(tape[f"{at}.probs"], axis=1)


@bank.mutant("L5.attentions.gqa", "Rows of attentions are queries, columns keys.")
class AttentionsTransposed(_Shown):
    def shown(self, tape: dict[str, Array], at: str) -> Array:
        return np.swapaxes(tape[f"{at}.probs"], 2, 3)


@bank.mutant("L5.attentions.gqa", "Entry i of attentions is that of layer i.")
class AttentionsOfFirstLayer(_Shown):
    def shown(self, tape: dict[str, Array], at: str) -> Array:
        return tape["model.layers.0.self_attn.probs"]
