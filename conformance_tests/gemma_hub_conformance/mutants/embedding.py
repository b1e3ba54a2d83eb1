"""Bugs in the embedding, the head, and what is returned."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import ArrayWeights, Weights
from gemma_hub_conformance.checkpoints import PAD_ID
from gemma_hub_conformance.mutants.bank import Bank, StandInModel, to_bfloat16
from gemma_hub_numpy.model import Array, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"


@bank.mutant(FORWARD, "Multiply embeddings by sqrt(hidden_size).")
class EmbScaleMissing(Reference):
    def embedding_scale(self) -> float:
        return 1.0


@bank.mutant(FORWARD, "Multiply embeddings by sqrt(hidden_size) once.")
class EmbScaleTwice(Reference):
    def embedding_scale(self) -> float:
        return float(self.config.hidden_size)


@bank.mutant(FORWARD, "Round the embedding scale to the compute type, not to bfloat16.")
class EmbScaleBf16InFp32(Reference):
    def embedding_scale(self) -> float:
        return float(to_bfloat16(np.asarray(self.config.embedding_scale)))


@bank.mutant(FORWARD, "The embedding scale is not an integer.")
class EmbScaleIntFloor(Reference):
    def embedding_scale(self) -> float:
        return float(math.floor(self.config.embedding_scale))


@bank.mutant(FORWARD, "The scale belongs to the input side; the tied head has none.")
class EmbScaleOnHead(Reference):
    def head(self, x: Array) -> Array:
        return super().head(x) * self.config.embedding_scale


@bank.mutant("L2.inputs_embeds.unscaled", "inputs_embeds are unscaled: the model scales them.")
class EmbScaleInputsEmbedsContract(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        if inputs.inputs_embeds is not None:
            unscaled = inputs.inputs_embeds / self.config.embedding_scale
            inputs = dataclasses.replace(inputs, inputs_embeds=unscaled)
        return super().run(inputs, *args, **kwargs)


@bank.mutant("L2.masks.pad_id_as_token", "The pad id's embedding row is a row like any other.")
class EmbPadRowZeroed(Reference):
    def embed(self, ids: Array) -> Array:
        return np.where((ids == PAD_ID)[..., None], 0.0, super().embed(ids))


@bank.mutant(FORWARD, "Keep float32 weights in float32 when loading.")
class CkptDtypeAtLoad(Reference):
    def to_compute(self, x: Array) -> Array:
        return to_bfloat16(x)


@bank.mutant("L2.forward.untied.no_padding", "An untied model's head is lm_head.weight.")
class HeadTieOverridesUntied(Reference):
    def head_rows(self) -> Iterator[Array]:
        yield self.parameter("model.embed_tokens.weight")


@bank.mutant(FORWARD, "Logit v belongs to vocabulary row v.")
class HeadRowOffByOne(Reference):
    def head(self, x: Array) -> Array:
        return np.roll(super().head(x), 1, axis=-1)


@bank.mutant(FORWARD, "Every vocabulary row has a logit, the last one too.")
class HeadLastRowZero(Reference):
    def head(self, x: Array) -> Array:
        logits = super().head(x)
        logits[..., -1] = 0.0
        return logits


@bank.mutant(FORWARD, "Compute float32 logits in float32.")
class HeadLogitsInBf16(Reference):
    def head(self, x: Array) -> Array:
        return to_bfloat16(super().head(x))


@bank.mutant(FORWARD, "First-generation Gemma has no cap on logits.")
class HeadSoftcapExtra(Reference):
    def head(self, x: Array) -> Array:
        return 30.0 * np.tanh(super().head(x) / 30.0)


@bank.mutant("L2.forward.softcap", "Cap the logits where the config says so.")
class HeadSoftcapMissing(Reference):
    def head(self, x: Array) -> Array:
        config = self.config
        self.config = dataclasses.replace(config, final_logit_softcapping=None)
        try:
            return super().head(x)
        finally:
            self.config = config


@bank.mutant("L2.logits_to_keep.5", "logits_to_keep keeps the last positions.")
class KeepsFirstLogits(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        outputs = super().run(dataclasses.replace(inputs, logits_to_keep=0), *args, **kwargs)
        kept = outputs.logits[:, : inputs.logits_to_keep or None]
        return dataclasses.replace(outputs, logits=kept)


@bank.mutant("L2.hidden_states.gqa", "The first hidden state is the scaled embedding.")
class HiddenStatesUnscaled(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        outputs = super().run(inputs, *args, **kwargs)
        states = outputs.hidden_states
        if states is not None:
            states = (states[0] / self.config.embedding_scale, *states[1:])
        return dataclasses.replace(outputs, hidden_states=states)


@bank.mutant("L2.hidden_states.gqa", "The last hidden state is the final norm's output.")
class HiddenStatesShifted(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        outputs = super().run(inputs, *args, **kwargs)
        states = outputs.hidden_states
        if states is not None:
            states = (*states[:-1], states[-2])
        return dataclasses.replace(outputs, hidden_states=states)


@bank.mutant("L1.contract.repeated_call", "The same call gives the same bits.")
class NotDeterministic(Reference):
    def head(self, x: Array) -> Array:
        self._calls = getattr(self, "_calls", 0) + 1
        return super().head(x) * (1.0 + self._calls * 2.0**-23)


@bank.mutant("L1.contract.inputs_unchanged", "Do not write to the caller's arrays.")
class InputsOverwritten(Reference):
    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        outputs = super().run(inputs, *args, **kwargs)
        inputs.position_ids[:] = 0
        return outputs


@bank.mutant("L1.contract.export_gqa", "Export the norm weights as they were loaded.")
class ExportFoldsNormOffset(StandInModel):
    def export(self) -> Weights:
        weights = super().export()
        arrays = {name: weights.read(name) for name in weights.names()}
        folded = {name: x + np.float32(1) for name, x in arrays.items() if "norm" in name}
        return ArrayWeights(arrays | folded)
