"""Subjects whose bug is known: each mutant, with rounding noise, or in one layer only."""

from dataclasses import dataclass, replace
from typing import Any

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import Weights
from gemma_hub_conformance.mutants.bank import (
    DTYPES,
    FEATURES,
    TASKS,
    Mutant,
    StandInBackend,
    StandInModel,
)
from gemma_hub_conformance.spec import Subject
from gemma_hub_numpy.backend import NumpyBackend, NumpyModel
from gemma_hub_numpy.model import Array, Reference, Witness

SEED = 91
"""Of the noise of a noisy subject; far from the oracle's witnesses."""


def fresh(mutant: Mutant) -> Subject:
    """The mutant with nothing left over from an earlier run, in float64."""
    return replace(mutant, kind=_without_memory(mutant.kind)).subject()


def noisy(mutant: Mutant, seed: int = SEED) -> Subject:
    """The mutant as a backend of its compute type: its operations round, as a witness's do.

    One that is wrong in how it builds stays in float64.
    """
    kind = _without_memory(mutant.kind)
    if issubclass(kind, StandInBackend):
        return replace(mutant, kind=kind).subject()
    if issubclass(kind, StandInModel):
        backend = NoisyBackend(Witness, kind, seed)
    else:
        backend = NoisyBackend(_rounding(kind), StandInModel, seed)
    return Subject(mutant.name, backend, FEATURES, DTYPES, tasks=TASKS)


def planted(kind: type[Reference], layer: int, seed: int = SEED, *, exact: bool = False) -> Subject:
    """A backend that has the bug of `kind` in one layer only.

    Args:
        kind: a bug in what a layer does, forwards or backwards.
        layer: where it is; a model with fewer layers does not have it.
        seed: of its rounding.
        exact: in float64 instead of rounding as its compute type does.
    """
    right: type[Reference] = Reference if exact else Witness
    wrong: Any = _without_memory(kind) if exact else _rounding(_without_memory(kind))

    class Planted(right):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._wrong: Any = wrong(*args)

        def block(self, i: int, x: Array, *args: Any) -> Array:
            there: Any = self._wrong if i == layer else super()
            self._wrong._tape = self._tape  # what it keeps is read on the way back
            found: Array = there.block(i, x, *args)
            return found

        def block_backward(self, d: Array, i: int, *args: Any) -> Array:
            there: Any = self._wrong if i == layer else super()
            found: Array = there.block_backward(d, i, *args)
            return found

    stand_in = StandInBackend(Planted)
    backend = stand_in if exact else NoisyBackend(Planted, StandInModel, seed)
    return Subject(f"{kind.__name__} in layer {layer}", backend, FEATURES, DTYPES, tasks=TASKS)


@dataclass(frozen=True, slots=True)
class NoisyBackend:
    """Builds a witness with a bug in it, of the dtype that it is asked for.

    Attributes:
        reference: a subclass of `Witness`.
        model: what is around it.
        seed: of its rounding.
    """

    reference: type[Witness]
    model: type[StandInModel]
    seed: int

    def devices(self) -> tuple[str, ...]:
        return tuple(NumpyBackend().devices())

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> NumpyModel:
        NumpyBackend().build(config, task, weights, options)
        reference = self.reference(config, weights, options.dtype, self.seed, task.name)
        return self.model(reference)


def _rounding(kind: type[Reference]) -> type[Witness]:
    """`kind` on top of a witness: where it calls the operation that it changes, that one rounds."""
    return type(kind.__name__, (kind, Witness), {})


def _without_memory(kind: Any) -> Any:
    """`kind` with empty containers in place of those that its class keeps between models."""
    kept = {
        name: type(value)()
        for name, value in vars(kind).items()
        if isinstance(value, dict | list | set) and not name.startswith("__")
    }
    return type(kind.__name__, (kind,), kept)
