"""Derives the error model's limits: `python -m gemma_hub_conformance.calibrate [BACKEND ...]`.

Runs the suite on what is known to be right (the reference, witnesses with fresh seeds, the
installed backends that are named) and each mutant on its case. A limit is the geometric mean of
the worst valid run and the weakest mutant, so it is equally far from both. The result goes to
calibration.json.
"""

import argparse
import dataclasses
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gemma_hub_conformance.engine import load_subject, run_conformance
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import DTYPES, FEATURES, TASKS, control, reference_package
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import CaseResult
from gemma_hub_conformance.spec import Subject
from gemma_hub_numpy.backend import NumpyBackend

SEEDS = range(20)
PATH = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, slots=True)
class Observation:
    """The largest value of one ratio in one case.

    Attributes:
        value: the ratio.
        run: the subject.
        case: the case.
    """

    value: float
    run: str
    case: str


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit with its evidence.

    Attributes:
        limit: the geometric mean of the two values, to two digits.
        worst_valid: the largest ratio of anything that is right.
        weakest_mutant: the smallest ratio of anything that is wrong.
    """

    limit: float
    worst_valid: Observation
    weakest_mutant: Observation

    @classmethod
    def between(cls, valid: Sequence[Observation], mutants: Sequence[Observation]) -> "Limit":
        """The limit that separates `valid` from `mutants`.

        Raises:
            ValueError: they overlap, so that no limit separates them.
        """
        worst = max(valid, key=lambda seen: seen.value)
        weakest = min(mutants, key=lambda seen: seen.value)
        if worst.value >= weakest.value:
            raise ValueError(f"{weakest} is no worse than {worst}: no limit separates them.")
        return cls(float(f"{math.sqrt(worst.value * weakest.value):.2g}"), worst, weakest)


def witness(seed: int) -> Subject:
    """The numpy backend as one witness."""
    return Subject(
        f"witness {seed}",
        NumpyBackend(),
        FEATURES,
        DTYPES,
        {"witness": seed},
        TASKS,
        package=reference_package(),
    )


def calibrate(backends: Sequence[str], console: Console) -> dict[str, Any]:
    """The content of calibration.json."""
    oracle = Oracle()
    subjects = [control(), *map(witness, SEEDS), *map(load_subject, backends)]
    valid: list[tuple[str, CaseResult]] = []
    for subject in subjects:
        report = run_conformance(subject, oracle=oracle)
        valid += [(subject.name, result) for result in report.results]
        console.print(f"{subject.name}: {max(r.ratio or 0.0 for r in report.results):.3g}")
    wrong = [
        (mutant.name, run_conformance(mutant.subject(), [mutant.case], oracle=oracle).results[0])
        for mutant in all_mutants().values()
    ]
    limits = {
        field: Limit.between(list(_seen(valid, field)), list(_seen(wrong, field)))
        for field in ("ratio", "worst_ratio")
    }
    return {
        **{name: dataclasses.asdict(limit) for name, limit in limits.items()},
        "valid_runs": [subject.name for subject in subjects],
        "mutants": len(wrong),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("numpy", "gemma-hub-conformance")},
        },
    }


def _seen(results: Sequence[tuple[str, CaseResult]], field: str) -> Iterator[Observation]:
    """The ratios of the cases that compare; one that failed without comparing says nothing."""
    for name, result in results:
        value = getattr(result, field)
        if value is not None and not (name in all_mutants() and "error is" not in result.message):
            yield Observation(float(np.round(value, 6)), name, result.id)


def main() -> None:
    """Write calibration.json and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", help="installed backends to count as right")
    console = Console()
    content = calibrate(parser.parse_args().backends, console)
    PATH.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("ratio", "worst_ratio"):
        console.print(name, content[name])


if __name__ == "__main__":
    main()
