"""The plot of a parity report: error by place of the model, as inline SVG."""

import math
from collections.abc import Sequence
from html import escape

from gemma_hub.parity.report import ParityReport, Row

HEIGHT = 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 18, 74
_COLOURS = 6
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")  # so that no line depends on its colour


def series_style(number: int) -> tuple[str, str]:
    """(colour class of the style sheet, stroke-dasharray attribute) of the number-th backend."""
    dash = _DASHES[number % len(_DASHES)]
    return f"s{number % _COLOURS}", f' stroke-dasharray="{dash}"' if dash else ""


def marker(number: int, x: float, y: float, size: float = 4.0) -> str:
    """The number-th backend's mark at (x, y): circle, square, triangle or diamond."""
    css = f'class="mark {series_style(number)[0]}"'
    shape = number % 4
    if shape == 0:
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    if shape == 1:
        a = 1.8 * size
        corner = f'x="{x - a / 2:.1f}" y="{y - a / 2:.1f}"'
        return f'<rect {css} {corner} width="{a:.1f}" height="{a:.1f}"/>'
    ring = [(0.0, -1.3), (1.2, 0.9), (-1.2, 0.9)]
    if shape == 3:
        ring = [(0.0, -1.4), (1.4, 0.0), (0.0, 1.4), (-1.4, 0.0)]
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in ring)
    return f'<polygon {css} points="{points}"/>'


def plot(report: ParityReport, width: int, css_class: str) -> str:
    """An `<svg>` of error / rounding noise (log axis) by place, `width` user units wide."""
    return _Plot(report, width).svg(css_class)


class _Plot:
    def __init__(self, report: ParityReport, width: int) -> None:
        self.report, self.width = report, width
        self.rows: Sequence[Row] = report.rows
        self.names = [run.name for run in report.backends if not run.error]
        self.limit = report.limits["ratio"]
        values = [self.limit * 2, 0.5] + [
            value
            for row in self.rows
            for cell in row.cells.values()
            for value in (cell.ratio, cell.worst_ratio)
            if math.isfinite(value) and value > 0
        ]
        values += [ratio for row in self.rows for ratio in row.band if ratio > 0]
        # An error of exactly 0 would pull a log axis down for ever; three decades show enough.
        self.low = max(-3, math.floor(math.log10(min(values))))
        self.high = math.ceil(math.log10(max(values)))

    def x(self, number: int) -> float:
        inner = self.width - _LEFT - _RIGHT
        return _LEFT + inner * (number + 0.5) / len(self.rows)

    def y(self, ratio: float) -> float:
        level: float = self.high if math.isinf(ratio) else self.low
        if math.isfinite(ratio) and ratio > 0:
            level = min(max(math.log10(ratio), self.low), self.high)
        inner = HEIGHT - _TOP - _BOTTOM
        return _TOP + inner * (self.high - level) / (self.high - self.low)

    def svg(self, css_class: str) -> str:
        places = f"{self.rows[0].place} to {self.rows[-1].place}"
        described = "; ".join(
            f"{name} reaches {_number(max(row.cells[name].ratio for row in self.rows))}"
            for name in self.names
        )
        label = (
            f"Error of each backend in units of rounding noise, from {places}, on a logarithmic "
            f"axis. The limit is {self.limit:g}. {described}. The table below has every number."
        )
        parts = [
            *self._grid(),
            self._band(),
            *self._limit(),
            *self._places(),
            *(self._series(i, name) for i, name in enumerate(self.names)),
        ]
        return (
            f'<svg class="plot {css_class}" viewBox="0 0 {self.width} {HEIGHT}" role="img" '
            f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(parts)}</svg>'
        )

    def _grid(self) -> list[str]:
        right = self.width - _RIGHT
        step = 1 if self.high - self.low <= 6 else math.ceil((self.high - self.low) / 6)
        lines = []
        for power in range(self.low, self.high + 1, step):
            y = self.y(10.0**power)
            css = "one" if power == 0 else "grid"
            lines.append(
                f'<line class="{css}" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            lines.append(
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_power(power)}</text>'
            )
        return lines

    def _band(self) -> str:
        spans = [row.band for row in self.rows]
        xs = [self.x(i) for i in range(len(spans))]
        xs[0], xs[-1] = _LEFT, self.width - _RIGHT
        upper = [f"{x:.1f},{self.y(high):.1f}" for x, (_, high) in zip(xs, spans, strict=True)]
        lower = [f"{x:.1f},{self.y(low):.1f}" for x, (low, _) in zip(xs, spans, strict=True)]
        return f'<polygon class="band" points="{" ".join(upper + lower[::-1])}"/>'

    def _limit(self) -> list[str]:
        y, right = self.y(self.limit), self.width - _RIGHT
        return [
            f'<line class="limit" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="limit-label" x="{right}" y="{y - 5:.1f}" text-anchor="end">'
            f"limit {self.limit:g}</text>",
        ]

    def _places(self) -> list[str]:
        """Labels of the places, thinned so that turned text does not collide."""
        room = (self.width - _LEFT - _RIGHT) / len(self.rows)
        step = max(1, math.ceil(16 / room))
        last = len(self.rows) - 1
        shown = {i for i in range(0, last + 1, step) if last - i >= step} | {last}
        y = HEIGHT - _BOTTOM + 14
        return [
            f'<text x="{self.x(i):.1f}" y="{y}" text-anchor="end" '
            f'transform="rotate(-40 {self.x(i):.1f} {y})">{escape(self.rows[i].place)}</text>'
            for i in sorted(shown)
        ]

    def _series(self, number: int, name: str) -> str:
        colour, dash = series_style(number)
        cells = [row.cells[name] for row in self.rows]
        points = " ".join(
            f"{self.x(i):.1f},{self.y(cell.ratio):.1f}" for i, cell in enumerate(cells)
        )
        marks = "".join(
            marker(number, self.x(i), self.y(cell.ratio)) for i, cell in enumerate(cells)
        )
        worst = "".join(
            f'<circle class="worst {colour}" cx="{self.x(i):.1f}" '
            f'cy="{self.y(cell.worst_ratio):.1f}" r="3"/>'
            for i, cell in enumerate(cells)
        )
        return f'<g><polyline class="series {colour}"{dash} points="{points}"/>{worst}{marks}</g>'


def _power(power: int) -> str:
    if -2 <= power <= 3:
        return f"{10.0**power:g}"
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
