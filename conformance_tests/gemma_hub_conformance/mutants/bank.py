"""A mutant: the reference with one thing wrong, under the name of the bug that it re-creates."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import ml_dtypes
import numpy as np

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights
from gemma_hub.plugins.registry import plugin_registry
from gemma_hub_conformance.package import Package, package_of
from gemma_hub_conformance.spec import Subject
from gemma_hub_numpy.backend import NumpyBackend, NumpyModel
from gemma_hub_numpy.model import Reference

FEATURES = frozenset({"attentions", "cache", "cache_rows", "export", "gradients", "greedy_steps",
                      "inputs_embeds", "sliding_window", "softcap"})  # fmt: skip
TASKS = ("base", "causal_lm", "sequence_classification", "token_classification")
DTYPES = ("float32", "bfloat16", "float16")


class StandInModel(NumpyModel):
    """A model in float64 that plays a float32 backend: its results are float32."""

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        return _narrowed(super().forward(inputs))

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = super().loss_and_gradients(inputs)
        return loss, {name: value.astype(np.float32) for name, value in gradients.items()}

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        outputs, cache = super().extend(inputs, cache)
        return _narrowed(outputs), cache


@dataclass(frozen=True, slots=True)
class StandInBackend:
    """Builds `reference` whatever dtype it is asked for, and refuses what NumpyBackend refuses."""

    reference: type[Reference]
    model: type[StandInModel] = StandInModel

    def devices(self) -> Sequence[str]:
        return NumpyBackend().devices()

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        NumpyBackend().build(config, task, weights, options)
        return self.model(self.reference(config, weights, task.name))


Wrong = type[Reference] | type[StandInModel] | type[StandInBackend]
Kind = TypeVar("Kind", bound=Wrong)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug.

    Attributes:
        name: as in the bug catalogue, where it is there.
        kind: the subclass with the bug in it: a `Reference`; or a `StandInModel` or a
            `StandInBackend` around the unchanged reference.
        case: id of the case that must fail on it.
        hint: what is wrong, in the words of someone who has to fix it.
    """

    name: str
    kind: Wrong
    case: str
    hint: str

    def subject(self) -> Subject:
        """The mutant as a backend under test."""
        if issubclass(self.kind, StandInBackend):
            backend = self.kind(Reference)
        elif issubclass(self.kind, StandInModel):
            backend = StandInBackend(Reference, self.kind)
        else:
            backend = StandInBackend(self.kind)
        return _subject(self.name, backend)


def control() -> Subject:
    """The reference without a bug, in the same wrapping: it must pass."""
    return _subject("control", StandInBackend(Reference))


@functools.cache
def reference_package() -> Package:
    """The installed package of the reference, in whose place a mutant stands."""
    registry = plugin_registry()
    return package_of(registry, registry.load("numpy"))


def _subject(name: str, backend: StandInBackend) -> Subject:
    return Subject(name, backend, FEATURES, DTYPES, tasks=TASKS, package=reference_package())


class Bank:
    """Collects the mutants of one module.

    `bank = Bank()` and then `@bank.mutant(case, hint)` above each class; the name of the bug is
    the class's, in lower case with dashes.
    """

    def __init__(self) -> None:
        self.mutants: list[Mutant] = []

    def mutant(self, case: str, hint: str) -> Callable[[Kind], Kind]:
        """Register the class below."""

        def register(kind: Kind) -> Kind:
            name = "".join(f"-{c.lower()}" if c.isupper() else c for c in kind.__name__)
            self.mutants.append(Mutant(name.removeprefix("-"), kind, case, hint))
            return kind

        return register


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """`x` through bfloat16 and back."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def _narrowed(outputs: ModelOutputs) -> ModelOutputs:
    narrow = {
        name: getattr(outputs, name).astype(np.float32)
        for name in ("logits", "loss", "last_hidden_state")
        if getattr(outputs, name) is not None
    }
    return dataclasses.replace(outputs, **narrow)
