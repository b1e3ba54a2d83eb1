"""Writes the manifest anew: `python -m gemma_hub_conformance.manifest`.

The manifest names every required case, so that a run with fewer is vacuous, and pins what each does
on a backend that is right: how much it compares, checks and calls. A case that was deleted, or that
compares less than it did, differs from its entry.
"""

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.cli.console import err, out, progress_bar
from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.engine import load_subject
from gemma_hub_conformance.mutants.bank import StandInBackend, StandInModel, control
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.profiles import manifest
from gemma_hub_conformance.spec import CaseContext, CaseFailed, CaseSpec, Subject
from gemma_hub_numpy.backend import NumpyBackend
from gemma_hub_numpy.model import Reference

PATH = Path(__file__).with_name("manifest.json")


@dataclass(frozen=True, slots=True)
class Facts:
    """What pins a case, as measured on a backend that is right, with seed 0.

    Attributes:
        dtype: compute type that it runs in.
        needs: what it does not apply without, in order.
        comparisons: arrays that it compares with the reference's.
        values: numbers in all of them.
        requirements: conditions that it checks, one for each comparison included.
        calls: calls that the backend and its models get, building included.
    """

    dtype: str
    needs: tuple[str, ...]
    comparisons: int
    values: int
    requirements: int
    calls: int

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> "Facts":
        """From an entry of the manifest."""
        return cls(**{**entry, "needs": tuple(entry["needs"])})

    @property
    def is_empty(self) -> bool:
        """Whether the case does nothing at all with the backend."""
        return not (self.comparisons or self.requirements or self.calls)


class CountingModel(StandInModel):
    """A model that is right and notes each call."""

    calls: Counter[str]

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        self.calls["forward"] += 1
        return super().forward(inputs)

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        self.calls["init_cache"] += 1
        return super().init_cache(batch_size, max_length)

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        self.calls["extend"] += 1
        return super().extend(inputs, cache)

    def export(self) -> Weights:
        self.calls["export"] += 1
        return super().export()

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, dict[str, np.ndarray]]:
        self.calls["loss_and_gradients"] += 1
        return super().loss_and_gradients(inputs)


class CountingBackend:
    """A backend that is right and notes each call; its models' too."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def devices(self) -> Sequence[str]:
        self.calls["devices"] += 1
        return NumpyBackend().devices()

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        self.calls["build"] += 1
        backend = StandInBackend(Reference, CountingModel)
        model = backend.build(config, task, weights, options)
        assert isinstance(model, CountingModel)
        model.calls = self.calls
        return model


class Measurer:
    """Measures cases; what a new process shows of a package is shared by all of them."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self._package = load_subject("numpy").package

    def subject(self) -> Subject:
        """A backend that is right, counts its calls and comes from a distribution."""
        return dataclasses.replace(control(), backend=CountingBackend(), package=self._package)

    def facts(self, case: CaseSpec) -> Facts:
        """What `case` does.

        Raises:
            CaseFailed: it fails on a backend that is right.
        """
        subject = self.subject()
        assert isinstance(subject.backend, CountingBackend)
        context = CaseContext(subject, self.oracle, case.dtype)
        case.run(context)
        return Facts(
            case.dtype,
            tuple(sorted(case.needs)),
            len(context.judgements),
            context.values,
            context.requirements,
            subject.backend.calls.total(),
        )


def recorded() -> dict[str, Facts]:
    """The manifest as it is: the facts of each required case, by its id."""
    return {id_: Facts.of_entry(entry) for id_, entry in json.loads(manifest()).items()}


def text(facts: Mapping[str, Facts]) -> str:
    """The manifest as JSON, one case a line."""
    lines = [
        f"  {json.dumps(id_)}: {json.dumps(dataclasses.asdict(each))}"
        for id_, each in facts.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def changes(before: Mapping[str, Facts], after: Mapping[str, Facts]) -> list[str]:
    """What differs between two manifests, a line for each case."""
    lines = [f"new: {id_}" for id_ in after if id_ not in before]
    lines += [f"gone: {id_}" for id_ in before if id_ not in after]
    for id_, facts in after.items():
        earlier = before.get(id_, facts)
        fields = [field.name for field in dataclasses.fields(Facts)]
        other = [
            f"{name} was {getattr(earlier, name)} and is {getattr(facts, name)}"
            for name in fields
            if getattr(earlier, name) != getattr(facts, name)
        ]
        if other:
            lines.append(f"other: {id_}: {', '.join(other)}")
    return lines


def measure(cases: Iterable[CaseSpec], measurer: Measurer) -> tuple[dict[str, Facts], list[str]]:
    """The facts of `cases`, and what is wrong with those that have none."""
    found: dict[str, Facts] = {}
    problems: list[str] = []
    chosen = list(cases)
    with progress_bar() as progress:
        for number, case in enumerate(chosen):
            if progress:
                progress(case.id, number, len(chosen))
            try:
                found[case.id] = measurer.facts(case)
            except CaseFailed as failure:
                problems.append(f"{case.id} fails on a backend that is right: {failure}")
    problems += [f"{id_} does nothing with the backend" for id_, f in found.items() if f.is_empty]
    return found, problems


def main() -> int:
    """Write manifest.json and say what changed; 1 and unchanged if a case fails."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        before = recorded()
    except (ValueError, KeyError, TypeError, AttributeError):
        before = {}  # of an older form, or damaged: it is written anew
    facts, problems = measure(all_cases().values(), Measurer(Oracle()))
    if problems:
        err().print("\n".join(problems), soft_wrap=True)
        return 1
    PATH.write_text(text(facts), encoding="utf-8")
    for line in changes(before, facts):
        out().print(line, soft_wrap=True)
    out().print(f"{len(facts)} cases in {PATH.name}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
