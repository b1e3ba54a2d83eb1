"""The charts of the page: error by layer as inline SVG, distances between backends as a table."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from gemma_hub.error_model import RATIO_LIMIT
from gemma_hub_conformance.report import CaseResult, Distance, Verdict

# Narrow, so that its text can be read where 360 pixels are all that there is.
_WIDTH, _HEIGHT = 360, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 14, 78
_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # so that no line depends on its colour
_KEY = 34  # width of a line in the legend
_BAND_KEY = (
    f'<li><svg viewBox="0 0 {_KEY} 14" aria-hidden="true"><rect class="band" y="1" '
    f'width="{_KEY}" height="12"/></svg><span>rounding noise of correct runs</span></li>'
)

_HEAT = (2.0, RATIO_LIMIT, 2 * RATIO_LIMIT, 100.0)
"""Upper ends of the colours of distances; the last colour has none."""


def error_by_layer(results: Sequence[CaseResult]) -> str:
    """A chart for each number of layers among the cases that compare hidden states; else ''."""
    by_length: dict[int, list[CaseResult]] = {}
    for result in results:
        if result.layers:
            by_length.setdefault(len(result.layers), []).append(result)
    if not by_length:
        return ""
    noise = _worst_valid_ratio()
    charts = "".join(_figure(same, noise) for _, same in sorted(by_length.items(), reverse=True))
    return (
        "<h2>Error by layer, in units of rounding noise</h2>"
        '<p class="soft">A point is the error of one hidden state against the float64 reference, '
        "divided by the error that rounding makes there. Correct runs of the calibration lie in "
        f"the band, up to {noise:.1f}; above the dashed limit of {RATIO_LIMIT:g} a case fails. "
        "The first point above it is where the backend goes wrong, as all that follows is "
        "computed from it. The final norm includes the last layer.</p>"
        f'<div class="charts">{charts}</div>'
    )


def distance_table(distances: Sequence[Distance]) -> str:
    """A coloured table of inputs and pairs of backends; '' if there are no distances."""
    if not distances:
        return ""
    pairs = list(dict.fromkeys((each.first, each.second) for each in distances))
    found = {(e.checkpoint, e.way, e.first, e.second): e for e in distances}
    head = "".join(f'<th scope="col">{escape(a)}<br>{escape(b)}</th>' for a, b in pairs)
    rows = "".join(
        f'<tr><th scope="row">{escape(checkpoint)}, {escape(way)}</th>'
        + "".join(_distance_cell(found.get((checkpoint, way, *pair))) for pair in pairs)
        + "</tr>"
        for checkpoint, way in dict.fromkeys((each.checkpoint, each.way) for each in distances)
    )
    reasons = dict.fromkeys(each.reason for each in distances if each.reason)
    return (
        "<h2>Distances between backends, in units of rounding noise</h2>"
        '<p class="soft">How far the logits of two are apart on one input; '
        "<q>the truth</q> is the float64 reference. Read down the columns: a correct backend is "
        "about 1 from the truth and 1 to 1.5 from another correct one. The backend that is in "
        "every dark column stands apart. If two are further apart than twice the limit "
        f"({2 * RATIO_LIMIT:g}), at least one of them is wrong. This is no part of the verdict.</p>"
        f"{_heat_legend()}"
        '<div class="scroll" role="region" tabindex="0" aria-label="Distances between backends">'
        '<table class="heat"><thead><tr><th scope="col">input</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        + "".join(f'<p class="soft">\u2013 {escape(reason)}</p>' for reason in reasons)
    )


# -- error by layer --------------------------------------------------------------------------------


def places(count: int) -> list[str]:
    """Names of the `count` hidden states of a model of count - 1 layers."""
    return ["embedding", *(f"layer {i}" for i in range(count - 2)), "final norm"][:count]


def _figure(results: Sequence[CaseResult], noise: float) -> str:
    count = len(results[0].layers)
    described = [_described(result) for result in results]
    label = f"Error by layer of {count - 1} layers, on a logarithmic axis. " + "; ".join(described)
    keys = "".join(
        f'<li><svg viewBox="0 0 {_KEY} 14" aria-hidden="true">{_key(number, result)}</svg>'
        f"<span>{escape(text)}</span></li>"
        for number, (result, text) in enumerate(zip(results, described, strict=True))
    )
    axes = _Axes.of(results)
    series = list(enumerate(results))
    series.sort(key=lambda each: each[1].verdict is not Verdict.PASS)  # what failed is on top
    drawn = [
        axes.band(noise),
        *axes.grid(),
        *axes.limit(),
        *axes.labels(),
        *(_series(axes, number, result) for number, result in series),
    ]
    return (
        f'<figure><svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(drawn)}</svg>'
        f'<ul class="keys">{keys}{_BAND_KEY}</ul></figure>'
    )


def _described(result: CaseResult) -> str:
    named = list(zip(places(len(result.layers)), result.layers, strict=True))
    for place, ratio in named:
        if not ratio <= RATIO_LIMIT:
            return f"{result.id}: first above the limit: {place} ({_number(ratio)})"
    place, ratio = max(named, key=lambda each: each[1])
    return f"{result.id}: at most {_number(ratio)} ({place})"


@dataclass(frozen=True, slots=True)
class _Axes:
    """Where numbers are drawn.

    Attributes:
        count: places from left to right.
        low: power of ten at the lower edge; what is below is drawn there.
        high: power of ten at the upper edge.
        endless: whether the upper edge is for what is not finite.
    """

    count: int
    low: int
    high: int
    endless: bool

    @classmethod
    def of(cls, results: Sequence[CaseResult]) -> "_Axes":
        """Axes that have room for every ratio of `results`."""
        ratios = [ratio for result in results for ratio in result.layers]
        finite = [ratio for ratio in ratios if math.isfinite(ratio)]
        endless = len(finite) < len(ratios)
        high = math.ceil(math.log10(max([*finite, 2 * RATIO_LIMIT])))
        return cls(len(results[0].layers), -1, high + endless, endless)

    def x(self, number: int) -> float:
        """Of the number-th place."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (number + 0.5) / self.count

    def y(self, ratio: float) -> float:
        """Of a ratio, also one that is 0 or not finite."""
        level: float = self.low
        if not math.isfinite(ratio):
            level = self.high
        elif ratio > 0:
            level = max(math.log10(ratio), self.low)
        inner = _HEIGHT - _TOP - _BOTTOM
        return _TOP + inner * (self.high - level) / (self.high - self.low)

    def band(self, noise: float) -> str:
        """What correct runs reach."""
        top, bottom, right = self.y(noise), self.y(0.0), _WIDTH - _RIGHT
        return (
            f'<rect class="band" x="{_LEFT}" y="{top:.1f}" width="{right - _LEFT}" '
            f'height="{bottom - top:.1f}"/>'
        )

    def grid(self) -> list[str]:
        """A line and a number for powers of ten, and the name of the axis."""
        step = math.ceil((self.high - self.low) / 6)
        powers = [*range(self.low, self.high + 1 - self.endless, step)]
        lines = [_grid_line(self.y(10.0**power), _power(power)) for power in powers]
        if self.endless:
            lines.append(_grid_line(self.y(math.inf), "\u221e"))
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        return [
            *lines,
            f'<text x="11" y="{middle:.0f}" text-anchor="middle" '
            f'transform="rotate(-90 11 {middle:.0f})">error / noise</text>',
        ]

    def limit(self) -> list[str]:
        """The line above which a case fails."""
        y, right = self.y(RATIO_LIMIT), _WIDTH - _RIGHT
        return [
            f'<line class="limit" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="limit-label" x="{_LEFT + 4}" y="{y - 4:.1f}">'
            f"limit {RATIO_LIMIT:g}</text>",
        ]

    def labels(self) -> list[str]:
        """Names of the places, thinned so that they do not collide, and of the axis."""
        step = math.ceil(18 * self.count / (_WIDTH - _LEFT - _RIGHT))
        last = self.count - 1
        shown = {i for i in range(0, last, step) if last - i >= step} | {last}
        names, y = places(self.count), _HEIGHT - _BOTTOM + 15
        return [
            *(
                f'<text x="{self.x(i):.1f}" y="{y}" text-anchor="end" '
                f'transform="rotate(-50 {self.x(i):.1f} {y})">{names[i]}</text>'
                for i in sorted(shown)
            ),
            f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}" '
            'text-anchor="middle">hidden state</text>',
        ]


def _grid_line(y: float, name: str) -> str:
    return (
        f'<line class="line" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{name}</text>'
    )


def _power(power: int) -> str:
    if power <= 3:
        return f"{10.0**power:g}"
    return "10" + str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _series(axes: _Axes, number: int, result: CaseResult) -> str:
    spots = [(axes.x(i), axes.y(ratio), ratio) for i, ratio in enumerate(result.layers)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
    named = zip(places(axes.count), spots, strict=True)
    marks = "".join(
        f"<g><title>{escape(result.id)}, {place}: {_number(ratio)}</title>{_mark(number, x, y)}</g>"
        for place, (x, y, ratio) in named
    )
    line = f'<polyline class="way"{_dash(number)} points="{points}"/>'
    return f'<g class="series {result.verdict}">{line}{marks}</g>'


def _key(number: int, result: CaseResult) -> str:
    line = f'<line class="way"{_dash(number)} x1="1" x2="{_KEY - 1}" y1="7" y2="7"/>'
    return f'<g class="series {result.verdict}">{line}{_mark(number, _KEY / 2, 7)}</g>'


def _dash(number: int) -> str:
    dash = _DASHES[number % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _mark(number: int, x: float, y: float) -> str:
    """The number-th case's mark at (x, y): circle, square, triangle or diamond."""
    if number % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    shapes = (
        ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        ((0, -1.4), (1.3, 0.9), (-1.3, 0.9)),
        ((0, -1.5), (1.5, 0), (0, 1.5), (-1.5, 0)),
    )
    corners = shapes[number % 4 - 1]
    points = " ".join(f"{x + 3.6 * dx:.1f},{y + 3.6 * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"/>'


def _worst_valid_ratio() -> float:
    """The largest ratio of any correct run of the calibration."""
    text = resources.files("gemma_hub_conformance").joinpath("calibration.json").read_text("utf-8")
    return float(json.loads(text)["ratio"]["worst_valid"]["value"])


# -- distances -------------------------------------------------------------------------------------


def _distance_cell(distance: Distance | None) -> str:
    if distance is None or distance.ratio is None:
        reason = "" if distance is None else distance.reason
        return f'<td class="soft" title="{escape(reason)}">\u2013</td>'
    return f'<td class="heat-{_heat(distance.ratio)}">{_number(distance.ratio)}</td>'


def _heat(ratio: float) -> int:
    """The number of the colour of a distance, from 0 for rounding to 4."""
    return next((i for i, end in enumerate(_HEAT) if ratio <= end), len(_HEAT))


def _heat_legend() -> str:
    ends = [f"up to {end:g}" for end in _HEAT] + ["more"]
    items = "".join(f'<li class="heat-{i}">{text}</li>' for i, text in enumerate(ends))
    return f'<ul class="legend heat-legend">{items}</ul>'


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if 0.01 <= value < 10 else f"{value:.3g}"
