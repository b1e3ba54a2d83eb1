"""The HTML page of a parity report: one file, no script, nothing from elsewhere."""

import math
from collections.abc import Iterable
from html import escape
from importlib import resources

from gemma_hub.parity.plot import marker, plot, series_style
from gemma_hub.parity.report import BackendRun, Cell, ParityReport, Row, Text, TokenCheck

_MARKS = {"equal": "\u2713", "tie": "\u2248", "different": "\u2717"}


def render(report: ParityReport) -> str:
    """The whole page."""
    style = resources.files("gemma_hub.parity").joinpath("page.css").read_text("utf-8")
    title = f"Parity of {report.source}: {'passed' if report.passed else 'failed'}"
    body = "\n".join(
        [
            f"<h1>Parity of <code>{escape(report.source)}</code></h1>",
            _verdict(report),
            _facts(report),
            *(_measurements(report) if report.rows else []),
            _failed_runs(report),
            _texts(report),
            _versions(report),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _verdict(report: ParityReport) -> str:
    css, word = ("passed", "\u2713 Passed") if report.passed else ("failed", "\u2717 Failed")
    return (
        f'<div class="verdict {css}" role="status"><strong>{word}</strong>'
        f"{escape(report.verdict)}</div>"
    )


def _facts(report: ParityReport) -> str:
    tokens = sum(len(check.token_ids) for check in report.tokens)
    equal = sum(check.verdict == "equal" for check in report.tokens)
    facts = [("Precision", report.dtype), ("Model", _model(report))]
    facts += [(f"Backend {run.name}", _backend(run)) for run in report.backends]
    facts += [
        ("Continuations equal", f"{equal} of {len(report.tokens)}, {report.ties} ties"),
        ("Tokens generated", f"{tokens}"),
    ]
    return '<dl class="facts">' + "".join(f"<div>{_term(*fact)}</div>" for fact in facts) + "</dl>"


def _model(report: ParityReport) -> str:
    config = report.config
    return (
        f"{config['num_hidden_layers']} layers, width {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads on {config['num_key_value_heads']}, "
        f"vocabulary {config['vocab_size']}"
    )


def _backend(run: BackendRun) -> str:
    if run.error:
        return "did not run"
    return f"{run.distribution} {run.version} on {run.device}, {run.seconds:.1f} s"


def _measurements(report: ParityReport) -> list[str]:
    return [
        "<h2>Error by layer, in units of rounding noise</h2>",
        "<figure>",
        plot(report, 860, "wide"),
        plot(report, 400, "narrow"),
        _legend(report),
        "<figcaption>Each point is a backend's error against the float64 reference, divided by "
        f"the error that {escape(report.dtype)} rounding makes by itself at that place; of all "
        "texts the worst. 1 is what a correct implementation has on average, and the band is how "
        "far apart correct ones are. Open rings are the worst single element, against what is "
        "expected of so many.</figcaption>",
        "</figure>",
        "<h2>Every number</h2>",
        _table(report),
        f'<p class="small soft">Small numbers are those of the worst element. Limits: '
        f"{report.limits['ratio']:g} and {report.limits['worst_ratio']:g}. Noise is the relative "
        f"error of {len(report.seeds['witnesses'])} witnesses: the reference with random rounding "
        "and re-ordered sums. The final norm includes the last layer.</p>",
    ]


def _legend(report: ParityReport) -> str:
    items = []
    for number, name in enumerate(run.name for run in report.backends if not run.error):
        colour, dash = series_style(number)
        items.append(
            '<svg viewBox="0 0 34 14" aria-hidden="true">'
            f'<line class="series {colour}"{dash} x1="1" x2="33" y1="7" y2="7"/>'
            f"{marker(number, 17, 7)}</svg>{escape(name)}"
        )
    items.append(
        '<svg viewBox="0 0 34 14" aria-hidden="true">'
        '<rect class="band" x="1" y="2" width="32" height="10"/></svg>rounding noise'
    )
    items.append(
        '<svg viewBox="0 0 34 14" aria-hidden="true">'
        '<line class="limit" x1="1" x2="33" y1="7" y2="7"/></svg>limit'
    )
    return '<ul class="legend">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _table(report: ParityReport) -> str:
    names = [run.name for run in report.backends if not run.error]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("noise", *names))
    rows = "".join(_table_row(row, names) for row in report.rows)
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Error by layer">'
        f'<table><thead><tr><th scope="col">place</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _table_row(row: Row, names: Iterable[str]) -> str:
    cells = "".join(_table_cell(row.cells[name]) for name in names)
    return f'<tr><th scope="row">{escape(row.place)}</th><td>{row.noise:.1e}</td>{cells}</tr>'


def _table_cell(cell: Cell) -> str:
    css, mark = ("", "") if cell.passed else (' class="bad"', "\u2717 ")
    return (
        f'<td{css} title="{escape(cell.reason)}">{mark}{_number(cell.ratio)}'
        f'<span class="worst-number">{_number(cell.worst_ratio)}</span></td>'
    )


def _failed_runs(report: ParityReport) -> str:
    failed = [run for run in report.backends if run.error]
    return "".join(
        f'<h2>{escape(run.name)} did not run</h2><p class="story">{escape(run.error)}</p>'
        for run in failed
    )


def _texts(report: ParityReport) -> str:
    parts = ["<h2>Generated tokens</h2>"]
    for number, text in enumerate(report.texts):
        checks = [check for check in report.tokens if check.text == number]
        parts.append(
            f'<section class="text"><h3>Text {number}</h3>'
            + _continuation(report, text, "greedy", checks)
            + _continuation(report, text, "sampled", checks)
            + "</section>"
        )
    return "\n".join(parts)


def _continuation(report: ParityReport, text: Text, kind: str, checks: list[TokenCheck]) -> str:
    ids = text.greedy_token_ids if kind == "greedy" else text.sampled_token_ids
    made = text.greedy if kind == "greedy" else text.sampled
    what = (
        "Greedy"
        if kind == "greedy"
        else (
            f"Sampled at temperature {report.sampling['temperature']:g}, "
            f"seed {report.seeds['sampling']}"
        )
    )
    checks = [check for check in checks if check.kind == kind]
    chips = "".join(
        f'<li class="{check.verdict}">{escape(check.backend)} {_MARKS[check.verdict]} '
        f"{check.verdict}</li>"
        for check in checks
    )
    story = (
        f'<p class="story"><span class="soft">{escape(text.prompt)}</span>{escape(made)}</p>'
        if made or not ids
        else f'<p class="story"><span class="soft">{escape(text.prompt)} \u2192 </span>'
        f'<span class="ids">{_ids(ids)}</span></p>'
    )
    others = "".join(_difference(check) for check in checks if check.verdict != "equal")
    return (
        f'<p class="small soft">{escape(what)}: {len(ids)} tokens</p>{story}'
        f'<ul class="chips">{chips}</ul>{others}'
    )


def _difference(check: TokenCheck) -> str:
    return (
        f'<div class="{check.verdict}-story small"><p>{escape(check.backend)}: '
        f"{escape(check.reason)}.</p>"
        f'<p class="ids soft">its tokens: {_ids(check.token_ids)}</p></div>'
    )


def _ids(token_ids: Iterable[int]) -> str:
    return escape(" ".join(map(str, token_ids)))


def _versions(report: ParityReport) -> str:
    facts = [
        *report.versions.items(),
        ("created", report.created),
        ("witness seeds", ", ".join(map(str, report.seeds["witnesses"]))),
        ("sampling seed", str(report.seeds["sampling"])),
    ]
    terms = "".join(_term(*fact) for fact in facts)
    return f'<h2>Versions and seeds</h2><dl class="versions">{terms}</dl>'


def _term(name: str, value: str) -> str:
    return f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if 0.01 <= value < 1000 else f"{value:.1e}"
