"""Backends that compute rightly and break what callers rely on."""

import dataclasses
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import ARCHITECTURES, GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import DTYPES, Weights
from gemma_hub_conformance.mutants.bank import Bank, StandInBackend, StandInModel

bank = Bank()


@bank.mutant("L1.contract.devices", "A backend names the devices that it builds on.")
class DevicesUnnamed(StandInBackend):
    def devices(self) -> Sequence[str]:
        return ()


@bank.mutant("L1.contract.logits_type", "The logits of a float32 model are float32.")
class LogitsInFloatSixtyFour(StandInModel):
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().forward(inputs)
        return _typed(outputs, np.dtype(np.float64))


class _NarrowLogits(StandInModel):
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        return _typed(super().forward(inputs), np.dtype(ml_dtypes.bfloat16))


@bank.mutant("L1.contract.logits_type_bfloat16", "The logits of a bfloat16 model are float32.")
class LogitsInComputeType(StandInBackend):
    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        model = super().build(config, task, weights, options)
        return _NarrowLogits(model.native) if options.dtype == "bfloat16" else model


@bank.mutant("L1.contract.refuses_dtype", "A compute type that there is not is an error.")
class UnknownDtypeTaken(StandInBackend):
    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        known = options.dtype if options.dtype in DTYPES else "float32"
        return super().build(config, task, weights, dataclasses.replace(options, dtype=known))


@bank.mutant("L1.contract.refuses_device", "A device that there is not is an error.")
class UnknownDeviceTaken(StandInBackend):
    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        return super().build(config, task, weights, dataclasses.replace(options, device="auto"))


@bank.mutant("L1.contract.refuses_task", "A task that there is not is an error.")
class UnknownTaskTaken(StandInBackend):
    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        known = task if task.name in ARCHITECTURES else TaskSpec()
        return super().build(config, known, weights, options)


def _typed(outputs: ModelOutputs, dtype: np.dtype) -> ModelOutputs:
    if outputs.logits is None:
        return outputs
    return dataclasses.replace(outputs, logits=outputs.logits.astype(dtype))
