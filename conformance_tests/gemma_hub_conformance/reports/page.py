"""The HTML page of a run: one file, no script, nothing from elsewhere."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.reports.charts import distance_table, error_by_layer

if TYPE_CHECKING:
    from gemma_hub_conformance.diagnosis import Diagnosis

LEVELS = {
    "L0": "Package",
    "L1": "Contract",
    "L2": "Meaning, in float32",
    "L3": "Narrower types",
    "L4": "Generation",
    "L5": "Heads, losses, gradients",
    "L6": "Checkpoints",
    "L7": "Tokenizer and text",
}
_MARKS = {
    Verdict.PASS: "\u2713",
    Verdict.FAIL: "\u2717",
    Verdict.UNSUPPORTED: "\u2013",
    Verdict.WAIVED: "\u2248",
    Verdict.ERROR: "!",
}
_BANNERS = {0: "good", 1: "bad", 4: "note", 5: "bad"}
_WIDTH, _DECADES = 240, 6  # of a bar; it runs from a ratio of 0.1 to one of 100 000


def render(report: Report, causes: "Sequence[Diagnosis]" = ()) -> str:
    """The whole page."""
    style = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    body = "\n".join(
        [
            f"<h1>Conformance of <code>{escape(report.backend)}</code></h1>",
            _verdict(report),
            _facts(report),
            *(f'<section class="cause">{_cause(cause)}</section>' for cause in causes),
            "<h2>Every case</h2>",
            _legend(),
            *(_level(level, report.results) for level in _levels(report.results)),
            _missing(report),
            error_by_layer(report.results),
            distance_table(report.distances),
            _failures(report),
            _numbers(report),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.summary)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _verdict(report: Report) -> str:
    problems = "".join(f"<p>{escape(problem)}</p>" for problem in report.problems)
    return (
        f'<div class="verdict {_BANNERS[report.exit_code]}" role="status">'
        f"<strong>{escape(report.summary)}</strong>{problems}</div>"
    )


def _facts(report: Report) -> str:
    made_by = f"{report.distribution} {report.version}".strip() or "not installed"
    facts = [
        ("Backend", f"{report.backend} ({made_by})"),
        ("Profile", report.profile + (", selected cases only" if report.selected else "")),
        *([("Device", report.device)] if report.device else []),
        *([("Options", ", ".join(report.options))] if report.options else []),
        *([("Types", ", ".join(report.dtypes) + " only")] if report.dtypes else []),
        ("Seed", str(report.seed)),
        ("Time", f"{sum(result.seconds for result in report.results):.0f} s"),
    ]
    facts += [(str(verdict), str(count)) for verdict, count in report.counts.items() if count]
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{items}</dl>'


def _cause(cause: "Diagnosis") -> str:
    known = f"<h2>Looks like <code>{escape(cause.mutant)}</code></h2>" if cause.mutant else ""
    known = known or "<h2>No known bug</h2>"
    lines = "".join(f"<p>{escape(line)}</p>" for line in cause.text.splitlines())
    return f'{known}<p class="advice">{escape(cause.advice)}</p>{lines}'


def _legend() -> str:
    items = "".join(
        f'<li><span class="cell {verdict}">{mark}</span> {verdict}</li>'
        for verdict, mark in _MARKS.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _levels(results: Iterable[CaseResult]) -> list[str]:
    return sorted({result.id.partition(".")[0] for result in results})


def _level(level: str, results: Iterable[CaseResult]) -> str:
    cells = "".join(
        f'<li class="cell {each.verdict}" title="{escape(_title(each))}">'
        f'<span aria-hidden="true">{_MARKS[each.verdict]}</span>'
        f'<span class="unseen">{escape(f"{each.id} {each.verdict}")}</span></li>'
        for each in results
        if each.id.partition(".")[0] == level
    )
    name = f"{level} {LEVELS.get(level, '')}".strip()
    return f'<h3>{escape(name)}</h3><ul class="grid">{cells}</ul>'


def _title(result: CaseResult) -> str:
    ratio = "" if result.ratio is None else f", {_number(result.ratio)} times the noise"
    return f"{result.id}: {result.verdict}{ratio}"


def _missing(report: Report) -> str:
    if not report.missing_of_run:
        return ""
    names = "".join(f"<li><code>{escape(id_)}</code></li>" for id_ in report.missing_of_run)
    return f"<h2>Required, and not run</h2><ul>{names}</ul>"


def _failures(report: Report) -> str:
    shown = (Verdict.FAIL, Verdict.ERROR, Verdict.WAIVED)
    failed = [result for result in report.results if result.verdict in shown]
    if not failed:
        return ""
    rows = "".join(
        f"<article><h3><code>{escape(each.id)}</code> "
        f'<span class="cell {each.verdict}">{each.verdict}</span></h3>'
        f"<p>{escape(each.message)}</p></article>"
        for each in failed
    )
    return f"<h2>What failed</h2>{rows}"


def _numbers(report: Report) -> str:
    compared = [result for result in report.results if result.ratio is not None]
    if not compared:
        return ""
    rows = "".join(_row(result) for result in compared)
    return (
        "<h2>Errors, in units of rounding noise</h2>"
        '<p class="soft">1 is what a correct implementation has on average. The bar is '
        "logarithmic, from 0.1 to 100 000.</p>"
        '<div class="scroll" role="region" tabindex="0" aria-label="Errors">'
        '<table><thead><tr><th scope="col">case</th><th scope="col">error / noise</th>'
        '<th scope="col">worst element</th><th scope="col"></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(result: CaseResult) -> str:
    return (
        f'<tr><th scope="row"><code>{escape(result.id)}</code></th>'
        f"<td>{_number(result.ratio)}</td><td>{_number(result.worst_ratio)}</td>"
        f"<td>{_bar(result)}</td></tr>"
    )


def _bar(result: CaseResult) -> str:
    ratio = result.ratio
    if ratio is None or not math.isfinite(ratio):
        part = 1.0
    else:
        part = min(max((math.log10(max(ratio, 1e-9)) + 1) / _DECADES, 0.0), 1.0)
    return (
        f'<svg class="bar" viewBox="0 0 {_WIDTH} 10" aria-hidden="true">'
        f'<rect class="{result.verdict}" width="{part * _WIDTH:.0f}" height="10"/>'
        f'<line x1="{_WIDTH / _DECADES:.0f}" x2="{_WIDTH / _DECADES:.0f}" y1="0" y2="10"/></svg>'
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
