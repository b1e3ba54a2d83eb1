"""The page: one valid file, nothing from elsewhere, nothing unescaped, readable without colour."""

import dataclasses
import itertools
import re
from html.parser import HTMLParser

import pytest

from gemma_hub.parity.plot import HEIGHT, plot

VOID = {"meta", "line", "rect", "circle", "polygon", "polyline", "br"}
HOSTILE = "<script>alert(\"1\")</script> & <b>'x'</b>"


class Page(HTMLParser):
    """Collects elements and text, and checks that tags nest."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path):
    def rendered(report) -> tuple[Page, str]:
        path = tmp_path / "report.html"
        report.to_html(path)
        source = path.read_text(encoding="utf-8")
        return Page(source), source

    return rendered


@pytest.fixture
def passed(run, backend):
    return run({"one": backend(), "two": backend()})


@pytest.fixture
def failed(run, backend):
    return run(
        {"one": backend(), "bad": backend(wrong_at="layer 1"), "gone": backend(error=OSError("no"))}
    )


def test_the_page_is_one_file_with_nothing_from_elsewhere(page, passed):
    parsed, source = page(passed)
    assert source.startswith("<!DOCTYPE html>")
    for tag, attributes in parsed.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "onload", "onclick"} & attributes.keys()
    assert not re.search(r"https?://|@import|url\(", source)


def test_the_page_states_verdict_numbers_tokens_and_versions(page, passed):
    parsed, _ = page(passed)
    assert "\u2713 Passed" in parsed.text
    assert passed.verdict in parsed.text
    for row in passed.rows:
        assert row.place in parsed.text
        assert f"{row.cells['two'].ratio:.2f}" in parsed.text
    assert parsed.text.count("one \u2713 equal") == 2 * len(passed.texts)
    assert passed.versions["Python"] in parsed.text
    assert " ".join(map(str, passed.texts[0].greedy_token_ids)) in parsed.text


def test_a_failure_is_marked_by_more_than_its_colour(page, failed):
    parsed, source = page(failed)
    assert "\u2717 Failed" in parsed.text
    assert re.search(r'<td class="bad" title="[^"]*limit[^"]*">\u2717 ', source)
    wide = plot(dataclasses.replace(failed, backends=failed.backends[:2]), 860, "wide")
    assert (
        len(set(re.findall(r"stroke-dasharray|<circle class=.mark|<rect class=.mark", wide))) == 3
    )


def test_a_backend_that_did_not_run_has_its_error_and_no_column(page, run, backend, failed):
    parsed, _ = page(failed)
    assert "gone did not run" in parsed.text
    assert "OSError: no" in parsed.text
    heads = re.findall(r'<th scope="col">([^<]*)', page(failed)[1])
    assert heads == ["place", "noise", "one", "bad"]
    alone, source = page(run({"gone": backend(error=OSError("no"))}))
    assert "OSError: no" in alone.text
    assert "<svg" not in source


def test_every_text_is_escaped(page, passed):
    hostile = dataclasses.replace(
        passed,
        source=HOSTILE,
        versions={HOSTILE: HOSTILE},
        backends=tuple(dataclasses.replace(run, device=HOSTILE) for run in passed.backends),
        texts=tuple(dataclasses.replace(t, prompt=HOSTILE, greedy=HOSTILE) for t in passed.texts),
        tokens=tuple(
            dataclasses.replace(c, verdict="tie", at=0, reason=HOSTILE) for c in passed.tokens
        ),
    )
    parsed, source = page(hostile)
    assert "<script" not in source
    assert "<b>" not in source
    assert parsed.text.count(HOSTILE) >= 20


def test_names_of_backends_are_escaped_too(page, run, backend):
    _, source = page(run({HOSTILE: backend(), "<i>": backend(error=OSError("<i>"))}))
    assert "<script" not in source
    assert "<i>" not in source


def test_the_plots_are_described_for_those_who_do_not_see_them(page, passed):
    parsed, _ = page(passed)
    plots = [svg for svg in parsed.all("svg") if svg.get("role") == "img"]
    assert [svg["class"] for svg in plots] == ["plot wide", "plot narrow"]
    for svg in plots:
        assert "one reaches" in svg["aria-label"]
        assert f"The limit is {passed.limits['ratio']:g}" in svg["aria-label"]
    assert all(svg.get("aria-hidden") == "true" for svg in parsed.all("svg") if svg not in plots)
    assert parsed.all("html") == [{"lang": "en"}]
    regions = [div for div in parsed.all("div") if div.get("role") == "region"]
    assert all(div["tabindex"] == "0" and div["aria-label"] for div in regions)


def test_the_page_follows_the_reader_s_colour_scheme_and_width(page, passed):
    _, source = page(passed)
    assert "@media (prefers-color-scheme: dark)" in source
    assert 'name="viewport" content="width=device-width' in source


def _points(svg: str) -> list[tuple[float, float]]:
    lists = re.findall(r'class="series[^"]*"[^>]* points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for points in lists for pair in points.split()]


@pytest.mark.parametrize("width", [400, 860])
@pytest.mark.parametrize("ratio", [0.0, 1e-9, 1.0, 1e12, float("inf")])
def test_every_point_is_inside_the_plot(passed, width, ratio):
    rows = [
        dataclasses.replace(
            row, cells={n: dataclasses.replace(c, ratio=ratio) for n, c in row.cells.items()}
        )
        for row in passed.rows
    ]
    svg = plot(dataclasses.replace(passed, rows=tuple(rows * 14)), width, "wide")
    points = _points(svg)
    assert len(points) == 2 * 14 * len(rows)
    assert all(0 < x < width and 0 < y < HEIGHT for x, y in points)


def test_a_larger_error_is_higher_and_the_limit_lies_where_it_should(failed):
    two = dataclasses.replace(failed, backends=failed.backends[:2])
    svg = plot(two, 860, "wide")
    points = _points(svg)
    good, bad = points[: len(two.rows)], points[len(two.rows) :]
    limit = float(re.search(r'class="limit"[^>]* y1="([\d.]+)"', svg).group(1))
    assert all(y > limit for _, y in good)
    assert [y < limit for _, y in bad] == [not row.cells["bad"].passed for row in two.rows]


def test_labels_of_many_layers_do_not_collide(passed):
    rows = tuple(dataclasses.replace(passed.rows[0], place=f"layer {i}") for i in range(80))
    svg = plot(dataclasses.replace(passed, rows=rows), 400, "narrow")
    labels = [float(x) for x in re.findall(r"rotate\(-40 ([\d.]+) ", svg)]
    assert len(labels) > 10
    assert min(b - a for a, b in itertools.pairwise(labels)) >= 16
    assert ">layer 79<" in svg
