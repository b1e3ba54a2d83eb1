"""The plot of a run: the ratios of every program to the first backend, as an SVG file."""

import math
from collections.abc import Callable
from html import escape

from gemma_hub.bench.report import BenchReport, Figure
from gemma_hub.bench.running import Subject
from gemma_hub.parity.plot import marker, series_style

WIDTH, ROW, TOP, LEFT, RIGHT = 720, 22, 34, 150, 24
_COLOURS = ("#0065a3", "#c14a00", "#007a5a", "#9c3f78", "#6a5200", "#4b4fb8")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#525b6b}.grid{stroke:#d5d9e0}.one{stroke:#525b6b}"
    ".spread{stroke-width:2}rect.page{fill:#fff}"
    + "".join(f".s{i}{{stroke:{c}}}.mark.s{i}{{fill:{c}}}" for i, c in enumerate(_COLOURS))
)


def plot(report: BenchReport) -> str:
    """An SVG file: a row for each program and rate, its ratio and the range over the rounds."""
    groups = [
        (f"{_title(name)}, {dtype}", _rows(report, dtype, name))
        for dtype in report.settings.dtypes
        for name in report.quantities()
        if name.endswith("tokens_per_s")
    ]
    programs = list(dict.fromkeys(s.name for s in report.measured()))
    figures = [figure for _, rows in groups for _, figure in rows]
    bounds = [x for f in figures for x in (f.ratio_low, f.ratio_high) if x]
    low, high = math.log2(min([0.5, *bounds])), math.log2(max([2.0, *bounds]))
    bottom = TOP + ROW * sum(1.5 + len(rows) for _, rows in groups)

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(ratio) - low) / (high - low)

    parts = []
    for power in range(math.ceil(low), math.floor(high) + 1):
        at, css = x(2.0**power), "one" if power == 0 else "grid"
        parts.append(
            f'<line class="{css}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom:.0f}"/>'
            f'<text x="{at:.1f}" y="{TOP - 8}" text-anchor="middle">×{2.0**power:g}</text>'
        )
    y = float(TOP)
    for title, rows in groups:
        y += ROW
        parts.append(f'<text x="8" y="{y:.0f}" font-weight="bold">{escape(title)}</text>')
        for subject, figure in rows:
            y += ROW
            number = programs.index(subject.name)
            parts.append(f'<text x="20" y="{y:.0f}">{escape(subject.name)}</text>')
            parts.append(_mark(number, figure, x, y - 4))
        y += ROW / 2
    label = escape(f"Tokens/s of {', '.join(programs)}, as ratios to the first; log axis.")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 12:.0f}" '
        f'role="img" aria-label="{label}"><title>{label}</title><style>{_STYLE}</style>'
        f'<rect class="page" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def _rows(report: BenchReport, dtype: str, name: str) -> list[tuple[Subject, Figure]]:
    found = []
    for subject in report.measured():
        figure = report.figures(subject).get(name) if subject.dtype == dtype else None
        if figure is not None and figure.ratio:
            found.append((subject, figure))
    return found


def _mark(number: int, figure: Figure, x: Callable[[float], float], y: float) -> str:
    assert figure.ratio is not None
    assert figure.ratio_low is not None
    assert figure.ratio_high is not None
    colour, _ = series_style(number)
    return (
        f'<line class="spread {colour}" x1="{x(figure.ratio_low):.1f}" '
        f'x2="{x(figure.ratio_high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + marker(number, x(figure.ratio), y)
    )


def _title(name: str) -> str:
    kind, _, rest = name.partition("_")
    return kind if kind == "prefill" else f"{kind}, {rest.partition('_')[0]} rows"
