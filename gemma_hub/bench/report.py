"""BenchReport: every sample, what follows from them, and the tables that show it."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gemma_hub.bench.checkpoints import matrix_parameters
from gemma_hub.bench.running import Settings, Subject
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import DTYPES

SCHEMA = "gemma-hub-bench/1"
NOT_MEASURED = "not measured"
NOISE = "within the noise"  # of a rate: no pair of runs tells the steps from the rest

Samples = Callable[[Mapping[str, Any]], list[float]]
"""The values of one quantity in one answer of `measuring`; empty where it was not measured."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity of one subject.

    Attributes:
        median: of all samples.
        low: the smallest of them.
        high: the largest.
        fraction: of what the machine allows; None where there is no such limit.
        ratio: to the first backend of that dtype: the median over the rounds.
        ratio_low: the smallest ratio of a round.
        ratio_high: the largest.
    """

    median: float
    low: float
    high: float
    fraction: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(slots=True)
class BenchReport:
    """What a run found.

    Attributes:
        model: name of the checkpoint.
        config: the model's.
        settings: what was asked for.
        subjects: every configuration with its samples; limits are among them.
        load_average: of this machine over the minute before the run; None where it is unknown.
        created: when the run began, UTC.
    """

    model: str
    config: GemmaConfig
    settings: Settings
    subjects: list[Subject]
    load_average: float | None = field(
        default_factory=lambda: os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    )
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()))

    def quantities(self) -> dict[str, Samples]:
        """{name: where its samples are}; the names are those of the JSON file and the plot."""
        prompt, new = self.settings.prompt, self.settings.new
        found: dict[str, Samples] = {
            "load_s": lambda s: [s["load_s"]],
            "first_token_s": lambda s: [s["first_token_s"]],
            "private_bytes": lambda s: _memory(s, "private_bytes"),
            "resident_bytes": lambda s: _memory(s, "resident_bytes"),
            "prefill_tokens_per_s": lambda s: [prompt / x for x in s["prefill_s"]],
        }
        for rows in self.settings.batches:
            found[f"decode_{rows}_tokens_per_s"] = partial(_decoding, rows=rows, new=new)
        return found

    def limits(self, dtype: str) -> dict[str, float]:
        """{name: the best median that any program reached} of what the machine can do."""
        found: dict[str, float] = {}
        for subject in self.subjects:
            if subject.kind != "limits" or subject.dtype != dtype:
                continue
            for name in ("read_bytes_per_s", "matmul_flop_per_s"):
                rates = [rate for sample in subject.samples for rate in sample.get(name, ())]
                if rates:
                    found[name] = max(found.get(name, 0.0), statistics.median(rates))
        return found

    def bounds(self, dtype: str) -> dict[str, float]:
        """{quantity: tokens/s at most}, from the limits: weights are read once a step."""
        every, body = matrix_parameters(self.config)
        limits, found = self.limits(dtype), {}
        if "matmul_flop_per_s" in limits:
            found["prefill_tokens_per_s"] = limits["matmul_flop_per_s"] / (2 * body)
        if "read_bytes_per_s" in limits:
            steps = limits["read_bytes_per_s"] / (every * DTYPES[dtype].itemsize)
            for rows in self.settings.batches:
                found[f"decode_{rows}_tokens_per_s"] = rows * steps
        return found

    def figures(self, subject: Subject) -> dict[str, Figure]:
        """Every quantity of a subject that was measured."""
        base = self.base(subject.dtype)
        bounds, found = self.bounds(subject.dtype), {}
        for name, samples_of in self.quantities().items():
            rounds = [samples_of(sample) for sample in subject.samples]
            values = [value for values in rounds for value in values]
            if not values:
                continue
            median = statistics.median(values)
            fraction = median / bounds[name] if name in bounds else None
            ratios = _ratios(rounds, [samples_of(s) for s in base.samples] if base else [])
            found[name] = Figure(median, min(values), max(values), fraction, *ratios)
        return found

    def base(self, dtype: str) -> Subject | None:
        """What the ratios are to: the first backend that ran."""
        backends = (s for s in self.subjects if s.kind == "backend" and s.dtype == dtype)
        return next((subject for subject in backends if subject.samples), None)

    def measured(self) -> list[Subject]:
        """Backends and peers, by dtype; limits are not among them."""
        return [subject for subject in self.subjects if subject.kind != "limits"]

    # -- output --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file. Its figures follow from its samples."""
        return {
            "schema": SCHEMA,
            "created": self.created,
            "machine": _machine() | {"load_average": self.load_average},
            "model": {"name": self.model, "config": self.config.to_dict()},
            "settings": asdict(self.settings),
            "bounds": {dtype: self.bounds(dtype) for dtype in self.settings.dtypes},
            "limits": {dtype: self.limits(dtype) for dtype in self.settings.dtypes},
            "subjects": [
                {
                    "name": subject.name,
                    "kind": subject.kind,
                    "dtype": subject.dtype,
                    "error": subject.error,
                    "figures": {
                        name: asdict(figure) for name, figure in self.figures(subject).items()
                    }
                    if subject.kind != "limits"
                    else {},
                    "samples": subject.samples,
                }
                for subject in self.subjects
            ],
        }

    def to_json(self) -> str:
        """The JSON file."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_markdown(self) -> str:
        """The table of `table`, and below it what failed and the limits."""
        header, *rows = self.table()
        lines = [header, ["---"] * len(header), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        notes = [f"- {note}" for note in self.notes()]
        return text + "\n" + "\n".join(notes) + "\n"

    def table(self) -> list[list[str]]:
        """A header and a row for each backend and peer, as words."""
        names = list(self.quantities())
        header = ["program", "dtype", "load s", "first token s", "private GB", "resident GB"]
        header += [f"prefill {self.settings.prompt} tokens/s"]
        header += [f"decode {rows} tokens/s" for rows in self.settings.batches]
        rows = [header]
        for subject in self.measured():
            figures = self.figures(subject)
            cells = [_cell(name, figures.get(name)) for name in names]
            if not subject.samples:
                cells = ["failed", *[""] * (len(names) - 1)]
            rows.append([subject.name, subject.dtype, *cells])
        return rows

    def notes(self) -> list[str]:
        """What failed and why, the options of the backend and the limits, a line each."""
        notes = [f"{s.name} {s.dtype}: {s.error}" for s in self.subjects if s.error]
        given = self.settings.backend_options.items()
        notes += [f"option {name}={value}" for name, value in given]
        words = {"read_bytes_per_s": "reads {:.1f} GB/s", "matmul_flop_per_s": "{:.0f} GFLOP/s"}
        for dtype in self.settings.dtypes:
            limits = self.limits(dtype)
            said = [
                word.format(limits[name] / 1e9) if name in limits else f"{name} {NOT_MEASURED}"
                for name, word in words.items()
            ]
            notes.append(f"limits, {dtype}: {', '.join(said)}")
        return notes


def _memory(sample: Mapping[str, Any], name: str) -> list[float]:
    """The peak over the whole process."""
    end = sample["memory"]["end"]
    return [] if end is None else [end[name]]


def _decoding(sample: Mapping[str, Any], rows: int, new: int) -> list[float]:
    """Tokens/s of each pair; a pair whose difference drowns in the noise has none."""
    pair = sample["decode"][str(rows)]
    seconds = [full - one for one, full in zip(pair["one_s"], pair["full_s"], strict=True)]
    return [rows * new / s for s in seconds if s > 0]


def _ratios(
    rounds: list[list[float]], base: list[list[float]]
) -> tuple[float | None, float | None, float | None]:
    """Median, smallest and largest of the ratios round by round, by the medians of each round.

    What else the machine does changes from round to round, and both of a round alike.
    """
    ratios = [
        statistics.median(own) / statistics.median(other)
        for own, other in zip(rounds, base, strict=False)
        if own and other and statistics.median(other)
    ]
    if not ratios:
        return None, None, None
    return statistics.median(ratios), min(ratios), max(ratios)


def _cell(name: str, figure: Figure | None) -> str:
    if figure is None:
        return NOISE if name.endswith("per_s") else NOT_MEASURED
    scale = 1e9 if name.endswith("bytes") else 1.0
    text = _number(figure.median / scale)
    if not name.endswith("per_s"):
        return text
    text += f" [{_number(figure.low)}, {_number(figure.high)}]"
    if figure.fraction is not None:
        text += f" {figure.fraction:.0%}"
    if figure.ratio is not None:
        text += f" ×{figure.ratio:.2f}"
    return text


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _machine() -> dict[str, Any]:
    words: Iterable[str] = ()
    if Path("/proc/cpuinfo").is_file():
        words = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [word.partition(":")[2].strip() for word in words if word.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "system": platform.platform(),
        "threads": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")},
    }
