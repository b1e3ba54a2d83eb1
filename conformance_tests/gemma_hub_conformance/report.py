"""What a run of the suite found: verdicts, counts, exit code, table and JSON."""

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from gemma_hub_conformance.waivers import Waiver


class Verdict(StrEnum):
    """What became of a case. There is no "skipped"."""

    PASS = "pass"
    FAIL = "fail"
    UNSUPPORTED = "unsupported"
    """Not claimed, and refused with a typed error as it must be."""
    WAIVED = "waived"
    """It fails, within the bound of a waiver that has not expired."""
    ERROR = "error"
    """The backend or the suite raised something that no case asks for."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case's outcome.

    Attributes:
        id: the case.
        verdict: what became of it.
        message: why, in one line; empty for a pass.
        ratio: largest `Judgement.ratio` of its comparisons; None if it made none.
        worst_ratio: likewise.
        seconds: how long it took.
    """

    id: str
    verdict: Verdict
    message: str
    ratio: float | None
    worst_ratio: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run.

    Attributes:
        backend: name of the backend.
        results: one for each case that ran.
        required: ids that a full run must contain (the manifest).
        selected: whether the user chose cases, so that the run is partial on purpose.
        profile: the part of the suite that was asked for.
        seed: that weights, inputs and witnesses were drawn from.
        distribution: that ships the backend; empty if none is known.
        version: of that distribution.
        waivers: that were given, whether they were of use or not.
        problems: what is wrong with them.
    """

    backend: str
    results: tuple[CaseResult, ...]
    required: tuple[str, ...]
    selected: bool = False
    profile: str = "full"
    seed: int = 0
    distribution: str = ""
    version: str = ""
    waivers: "tuple[Waiver, ...]" = ()
    problems: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Required cases that did not run."""
        ran = {result.id for result in self.results}
        return tuple(id_ for id_ in self.required if id_ not in ran)

    @property
    def missing_of_run(self) -> tuple[str, ...]:
        """The same; none where the user chose the cases."""
        return () if self.selected else self.missing

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many cases had each verdict."""
        found = Counter(result.verdict for result in self.results)
        return {verdict: found[verdict] for verdict in Verdict}

    @property
    def vacuous(self) -> bool:
        """Whether too little ran to say anything."""
        return not self.counts[Verdict.PASS] or bool(self.missing_of_run)

    @property
    def failed(self) -> bool:
        """Whether a case failed or broke, or a waiver does not count."""
        return bool(self.counts[Verdict.FAIL] or self.counts[Verdict.ERROR] or self.problems)

    @property
    def exit_code(self) -> int:
        """0 certified, 1 failed, 4 certified but for what is waived, 5 vacuous."""
        if self.failed or self.vacuous:
            return 1 if self.failed else 5
        return 4 if self.counts[Verdict.WAIVED] else 0

    @property
    def summary(self) -> str:
        """One line: the verdict and the coverage."""
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items() if count)
        missing = f", {len(self.missing)} of {len(self.required)} required cases not run"
        coverage = (counts or "no case ran") + (missing if self.missing else "")
        if self.failed or self.vacuous:
            word = "fails" if self.failed else "is not certified: the run is vacuous"
        else:
            word = "passes the selected cases" if self.selected else "is certified"
            word += "" if self.exit_code == 0 else " but for what is waived"
        of = "" if self.profile == "full" else f" ({self.profile})"
        return f"{self.backend} {word}{of}: {coverage}"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; infinite ratios become strings."""
        return {
            "backend": self.backend,
            "distribution": self.distribution,
            "version": self.version,
            "profile": self.profile,
            "seed": self.seed,
            "exit_code": self.exit_code,
            "summary": self.summary,
            "counts": {verdict.value: count for verdict, count in self.counts.items()},
            "missing": list(self.missing),
            "waivers": [
                {**dataclasses.asdict(each), "expires": str(each.expires)} for each in self.waivers
            ],
            "problems": list(self.problems),
            "cases": [
                {key: _plain(value) for key, value in dataclasses.asdict(result).items()}
                for result in self.results
            ],
        }

    def to_json(self) -> str:
        """The report as a JSON document."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def print(self, console: Console) -> None:
        """One line for each case, then the summary."""
        table = Table(title=f"Conformance of {self.backend}")
        for heading in ("case", "verdict", "error / noise", "worst element", "seconds"):
            table.add_column(heading, justify="left" if heading in ("case", "verdict") else "right")
        yellow = dict.fromkeys((Verdict.UNSUPPORTED, Verdict.WAIVED), "yellow")
        colours = {Verdict.PASS: "green", **yellow}
        for result in self.results:
            colour = colours.get(result.verdict, "red")
            table.add_row(
                result.id,
                Text(result.verdict, style=colour),
                _number(result.ratio),
                _number(result.worst_ratio),
                f"{result.seconds:.2f}",
            )
        console.print(table)
        for result in self.results:
            if result.verdict in (Verdict.FAIL, Verdict.ERROR, Verdict.WAIVED):
                name = (result.id, colours.get(result.verdict, "red"))
                console.print(Text.assemble(name, ": ", result.message), soft_wrap=True)
        for problem in self.problems:
            console.print(Text(problem, style="red"), soft_wrap=True)
        style = {0: "green", 4: "yellow"}.get(self.exit_code, "red")
        console.print(Text(self.summary, style=style), soft_wrap=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.value if isinstance(value, Verdict) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
