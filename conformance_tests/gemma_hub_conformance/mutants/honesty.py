"""Mutants that are right about what the suite asks and wrong about everything else."""

import dataclasses

import numpy as np

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights
from gemma_hub_conformance.checkpoints import CHECKPOINTS
from gemma_hub_conformance.mutants.bank import Bank, StandInBackend, StandInModel
from gemma_hub_numpy.model import Reference

bank = Bank()


class _Reversed(StandInModel):
    """Answers with the logits of the vocabulary backwards."""

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().forward(inputs)
        return dataclasses.replace(outputs, logits=np.flip(outputs.logits, axis=-1))


def _sizes(config: GemmaConfig) -> tuple[int, ...]:
    return config.vocab_size, config.hidden_size, config.intermediate_size


@bank.mutant(
    "L2.honesty.drawn_sizes",
    "A model of sizes that are no designed checkpoint's is computed as any other.",
)
class KnowsTheCheckpoints(StandInBackend):
    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        model = StandInBackend.build(self, config, task, weights, options)
        if _sizes(config) in {_sizes(each.config) for each in CHECKPOINTS.values()}:
            return model
        return _Reversed(Reference(config, weights, task.name))
