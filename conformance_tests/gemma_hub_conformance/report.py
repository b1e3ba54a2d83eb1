"""What a run of the suite found: verdicts, counts, exit code, tables and JSON."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma_hub.cli.console import show_table

if TYPE_CHECKING:
    from gemma_hub_conformance.diagnosis import Diagnosis
    from gemma_hub_conformance.waivers import Waiver

SCHEMA = 1
"""Of the JSON document; another number if a reader of this one could not read it."""

_DISTANCES = "Distance of their logits, in units of rounding noise"


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
        layers: ratio of each hidden state, from the embedding to the final norm; empty if the case
            compares none.
    """

    id: str
    verdict: Verdict
    message: str
    ratio: float | None
    worst_ratio: float | None
    seconds: float
    layers: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the logits of two backends are apart on one input.

    Attributes:
        first: a backend's name, or that of the reference.
        second: another's.
        checkpoint: name of the designed checkpoint.
        way: "forward", or "cache": a prompt and then one token at a time.
        ratio: rms of the relative difference of their logits / rms of the rounding noise; None if
            one of them has none.
        reason: why there is no ratio; else empty.
    """

    first: str
    second: str
    checkpoint: str
    way: str
    ratio: float | None
    reason: str = ""


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
        distances: from other backends, if the user asked for them; no part of the verdict.
        device: that the models were built on; empty if none is known.
        options: of the backend, that every model was built with, each as "name=value".
        dtypes: compute types that the backend was held to have, where the user left some out that
            it claims; empty for all.
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
    distances: tuple[Distance, ...] = ()
    device: str = ""
    options: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    @property
    def tested(self) -> str:
        """The backend, and what it was run with, in words."""
        return tested(self.backend, self.options, self.dtypes)

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
        return f"{self.tested} {word}{of}: {coverage}"

    def to_dict(self, causes: "Sequence[Diagnosis]" = ()) -> dict[str, Any]:
        """The report as JSON types, by reports/schema/report.json; infinite ratios are strings.

        Args:
            causes: what `gemma_hub_conformance.diagnosis.diagnose` found.
        """
        return {
            "schema": SCHEMA,
            "backend": self.backend,
            "distribution": self.distribution,
            "version": self.version,
            "device": self.device,
            "options": list(self.options),
            "dtypes": list(self.dtypes),
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
            "distances": [_plain(dataclasses.asdict(each)) for each in self.distances],
            "cases": [_plain(dataclasses.asdict(result)) for result in self.results],
            "causes": [_plain(cause.to_dict()) for cause in causes],
        }

    def to_json(self, causes: "Sequence[Diagnosis]" = ()) -> str:
        """The same as a JSON document."""
        return json.dumps(self.to_dict(causes), indent=2, allow_nan=False) + "\n"

    def print(self, console: Console) -> None:
        """One line for each case, then the summary."""
        table = Table(title=Text(f"Conformance of {self.tested}", "table.title"))
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
        if self.distances:
            show_table(console, _DISTANCES, _distance_table(self.distances))
            for reason in dict.fromkeys(each.reason for each in self.distances if each.reason):
                console.print(Text(f"No distance: {reason}", style="yellow"), soft_wrap=True)
        for problem in self.problems:
            console.print(Text(problem, style="red"), soft_wrap=True)
        style = {0: "green", 4: "yellow"}.get(self.exit_code, "red")
        console.print(Text(self.summary, style=style), soft_wrap=True)


def tested(backend: str, options: Sequence[str], dtypes: Sequence[str]) -> str:
    """A backend and what it was run with, as "torch with native=true (float32 only)".

    Args:
        backend: its name.
        options: as in `Report`.
        dtypes: likewise.
    """
    given = f" with {', '.join(options)}" if options else ""
    return f"{backend}{given} ({', '.join(dtypes)} only)" if dtypes else f"{backend}{given}"


def _distance_table(distances: tuple[Distance, ...]) -> Table:
    pairs = dict.fromkeys((each.first, each.second) for each in distances)
    table = Table("input")
    for first, second in pairs:
        table.add_column(f"{first}\n{second}", justify="right")
    ratios = {(e.first, e.second, e.checkpoint, e.way): e.ratio for e in distances}
    for checkpoint, way in dict.fromkeys((each.checkpoint, each.way) for each in distances):
        cells = (_number(ratios[*pair, checkpoint, way]) for pair in pairs)
        table.add_row(f"{checkpoint}, {way}", *cells)
    return table


def _plain(value: Any) -> Any:
    """`value` as JSON types."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.value if isinstance(value, Verdict) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
