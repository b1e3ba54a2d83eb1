"""Derives the error model's limits: `python -m gemma_hub_conformance.calibrate [BACKEND ...]`.

Runs the suite on what is known to be right (the reference, witnesses with fresh seeds, the
installed backends that are named) and each mutant on its case. A limit is the geometric mean of
the worst valid run and the weakest mutant, so it is equally far from both. The result goes to
calibration.json.

A witness sums in an order that is the processor's in part, so that another kind of processor gives
it other noise. `--keep` lets the extremes on file count too: those of all processors so far.
"""

import argparse
import dataclasses
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
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


def calibrate(
    backends: Sequence[str], console: Console, kept: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of calibration.json.

    Args:
        backends: installed backends to count as right.
        console: where each valid run is told.
        kept: an earlier content, whose extremes count too.
    """
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
        field: Limit.between(
            [*_seen(valid, field), *_kept(kept, field, "worst_valid")],
            [*_seen(wrong, field), *_kept(kept, field, "weakest_mutant")],
        )
        for field in ("ratio", "worst_ratio")
    }
    processors = {_processor(), *(kept or {}).get("processors", ())}
    return {
        **{name: dataclasses.asdict(limit) for name, limit in limits.items()},
        "valid_runs": [subject.name for subject in subjects],
        "mutants": len(wrong),
        "processors": sorted(processors),
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


def _kept(content: Mapping[str, Any] | None, field: str, which: str) -> list[Observation]:
    return [] if content is None else [Observation(**content[field][which])]


def _processor() -> str:
    """What decides the order of sums: the maker of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    makers = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return makers[0] if makers else platform.machine()


def main() -> None:
    """Write calibration.json and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", help="installed backends to count as right")
    parser.add_argument("--keep", action="store_true", help="let the extremes on file count too")
    arguments, console = parser.parse_args(), Console()
    kept = json.loads(PATH.read_text("utf-8")) if arguments.keep else None
    content = calibrate(arguments.backends, console, kept)
    PATH.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("ratio", "worst_ratio"):
        console.print(name, content[name])


if __name__ == "__main__":
    main()
