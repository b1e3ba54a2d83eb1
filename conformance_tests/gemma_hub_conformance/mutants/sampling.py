"""Bugs that leave the best token where it is, so that only a sample shows them."""

import dataclasses

import numpy as np

from gemma_hub.backend import Cache
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.mutants.bank import Bank, StandInModel, to_bfloat16

bank = Bank()


class _OtherLogits(StandInModel):
    """Changes the logits of each cached call."""

    def other(self, logits: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        outputs, cache = super().extend(inputs, cache)
        logits = self.other(outputs.logits).astype(np.float32)
        return dataclasses.replace(outputs, logits=logits), cache


@bank.mutant("L4.sampling.temperature", "The core divides by the temperature; a model does not.")
class TemperatureTwice(_OtherLogits):
    def other(self, logits: np.ndarray) -> np.ndarray:
        return logits / 1.3


@bank.mutant("L4.sampling.top_k", "Give the logits of all tokens, not of the best eight.")
class KeepsTheBestEight(_OtherLogits):
    def other(self, logits: np.ndarray) -> np.ndarray:
        border = np.sort(logits, axis=-1)[..., -8:-7]
        return np.where(logits >= border, logits, logits.min())


@bank.mutant("L4.sampling.top_p", "Logits are before softmax.")
class ProbabilitiesForLogits(_OtherLogits):
    def other(self, logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@bank.mutant("L4.sampling.row_alone", "The scale of a row's logits hangs on nothing but the row.")
class SingleRowSharper(_OtherLogits):
    def other(self, logits: np.ndarray) -> np.ndarray:
        return logits * 1.25 if len(logits) == 1 else logits


@bank.mutant("L4.sampling.same_prompt", "Rows with one prompt go separate ways after it.")
class EqualPromptsShareCache(StandInModel):
    """Keeps one row's keys and values for rows that began alike."""

    _alike: bool = False

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        if cache.length == 0:
            ids = inputs.input_ids
            self._alike = ids is not None and bool(np.all(ids == ids[:1]))
        outputs, cache = super().extend(inputs, cache)
        if self._alike:
            for keys, values in cache.arrays:
                keys[:], values[:] = keys[:1], values[:1]
        return outputs, cache


@bank.mutant("L4.sampling.repeated", "Nothing is left over from one run to the next.")
class AnotherSumEachTime(_OtherLogits):
    """Adds as much as rounding does, in an order that no two runs share."""

    _calls: int = 0

    def other(self, logits: np.ndarray) -> np.ndarray:
        self._calls += 1
        noise = np.random.default_rng(self._calls).standard_normal(logits.shape)
        return np.asarray(logits * (1 + 2.0**-23 * noise))


@bank.mutant("L4.sampling.probabilities", "The logits of a cached call are float32 too.")
class SampledFromBfloat16(_OtherLogits):
    def other(self, logits: np.ndarray) -> np.ndarray:
        return to_bfloat16(logits)
