"""The page of a run: its charts tell the truth, it fits a phone, and it loads nothing."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import threading
from html import escape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gemma_hub.error_model import RATIO_LIMIT
from gemma_hub_conformance.diagnosis import Diagnosis
from gemma_hub_conformance.report import CaseResult, Distance, Report, Verdict
from gemma_hub_conformance.reports import page
from gemma_hub_conformance.reports.charts import distance_table, error_by_layer, places

HOSTILE = "<script>alert(\"1\")</script> & <b>'x'</b>"
OVER = RATIO_LIMIT + 0.1
VOID = {"meta", "line", "rect", "circle", "polygon", "polyline", "br"}


class Page(HTMLParser):
    """Elements with their attributes and text; checks that tags nest."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        element = {"tag": tag, "text": "", "in": [e["tag"] for e in self.open], **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, css=None):
        return [
            each
            for each in self.elements
            if each["tag"] == tag and (css is None or css in (each.get("class") or "").split())
        ]


def result(id_, layers=(), verdict=Verdict.PASS, message=""):
    return CaseResult(id_, verdict, message, max(layers, default=1.0), 1.0, 0.5, tuple(layers))


RIGHT = result("L2.hidden_states.right", [0.8, 1.1, 1.0, 1.2])
WRONG = result("L2.hidden_states.wrong", [0.0, 1.0, 300.0, 250.0], Verdict.FAIL, "too large")


def heights(parsed):
    """The y of every point of every series, in the order of drawing."""
    return [
        [float(point.split(",")[1]) for point in line["points"].split()]
        for line in parsed.all("polyline", "way")
    ]


def height(parsed, css):
    (line,) = parsed.all("line", css)
    return float(line["y1"])


# -- error by layer --------------------------------------------------------------------------------


def test_without_hidden_states_there_is_no_chart():
    assert error_by_layer([result("L2.x")]) == ""


def test_places_have_the_names_of_the_parity_page():
    assert places(4) == ["embedding", "layer 0", "layer 1", "final norm"]
    assert places(2) == ["embedding", "final norm"]
    assert places(1) == ["embedding"]


def test_every_case_has_a_line_and_a_key_that_says_where_it_goes_wrong():
    parsed = Page(error_by_layer([WRONG, RIGHT]))
    drawn, keys = [each["class"] for each in parsed.all("g", "series")], parsed.all("li")
    assert drawn[:2] == ["series pass", "series fail"]  # what failed is on top
    assert drawn[2:] == ["series fail", "series pass"]  # the keys are in the order of the run
    assert [each["text"] for each in keys] == [
        "L2.hidden_states.wrong: first above the limit: layer 1 (300)",
        "L2.hidden_states.right: at most 1.20 (final norm)",
        "rounding noise of correct runs",
    ]
    (plot,) = parsed.all("svg", "plot")
    assert all(key["text"] in plot["aria-label"] for key in keys[:2])


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ([1.0, OVER, 300.0], f"first above the limit: layer 0 ({OVER:.2f})"),
        ([1.0, RATIO_LIMIT, 5.7], f"at most {RATIO_LIMIT:.2f} (layer 0)"),
        ([1.0, math.nan, 300.0], "first above the limit: layer 0 (not finite)"),
        ([math.inf], "first above the limit: embedding (not finite)"),
    ],
)
def test_a_key_names_the_first_place_above_the_limit(ratios, says):
    parsed = Page(error_by_layer([result("L2.x", ratios)]))
    assert parsed.all("li")[0]["text"] == f"L2.x: {says}"


def test_every_point_has_its_number():
    parsed = Page(error_by_layer([WRONG]))
    assert [each["text"] for each in parsed.all("title")] == [
        "L2.hidden_states.wrong, embedding: 0",
        "L2.hidden_states.wrong, layer 0: 1.00",
        "L2.hidden_states.wrong, layer 1: 300",
        "L2.hidden_states.wrong, final norm: 250",
    ]


def test_points_are_on_the_right_side_of_the_limit_and_of_the_band():
    inside = 2.0
    parsed = Page(
        error_by_layer([result("L2.x", [inside, RATIO_LIMIT - 0.1, OVER, 1e6], Verdict.FAIL)])
    )
    ((first, below, above, far),) = heights(parsed)
    (band,) = [each for each in parsed.all("rect", "band") if "x" in each]
    limit = height(parsed, "limit")
    top, bottom = float(band["y"]), float(band["y"]) + float(band["height"])
    assert far < above < limit < below < top < first < bottom  # y grows downwards


def test_the_axis_is_logarithmic():
    parsed = Page(error_by_layer([result("L2.x", [1.0, 10.0, 100.0, 1000.0], Verdict.FAIL)]))
    ((one, two, three, four),) = heights(parsed)
    assert one - two == pytest.approx(two - three, abs=0.2)
    assert two - three == pytest.approx(three - four, abs=0.2)
    lines = {each["text"] for each in parsed.all("text")}
    assert {"0.1", "1", "10", "100", "1000", "error / noise", "hidden state"} <= lines


@pytest.mark.parametrize(
    "ratios", [(0.0, 1e-30), (math.inf, math.nan), (1e30, 0.0), (5e-324, 1e308)]
)
def test_every_number_is_drawn_inside(ratios):
    parsed = Page(error_by_layer([result("L2.x", ratios, Verdict.FAIL)]))
    (plot,) = parsed.all("svg", "plot")
    _, _, width, tall = map(float, plot["viewbox"].split())
    (ys,) = heights(parsed)
    assert all(0 < y < tall for y in ys)
    for text in parsed.all("text"):
        assert 0 <= float(text["x"]) <= width
        assert 0 <= float(text["y"]) <= tall


def test_what_is_not_finite_is_above_everything():
    parsed = Page(error_by_layer([result("L2.x", [1.0, 1e5, math.inf], Verdict.FAIL)]))
    ((one, high, infinite),) = heights(parsed)
    assert infinite < high < one
    assert "\u221e" in [each["text"] for each in parsed.all("text")]
    assert "not finite" in parsed.all("title")[-1]["text"]


def test_models_of_another_depth_have_a_chart_of_their_own():
    deep = result("L2.deep", [1.0] * 5)
    parsed = Page(error_by_layer([RIGHT, deep, WRONG]))
    assert [each["aria-label"][:26] for each in parsed.all("svg", "plot")] == [
        "Error by layer of 4 layers",
        "Error by layer of 3 layers",
    ]
    assert [len(ys) for ys in heights(parsed)] == [5, 4, 4]


def test_the_places_of_a_deep_model_do_not_collide():
    parsed = Page(error_by_layer([result("L2.deep", [1.0] * 81)]))
    names = {*places(81)}
    labels = [each for each in parsed.all("text") if each["text"] in names]
    assert labels[0]["text"] == "embedding"
    assert labels[-1]["text"] == "final norm"
    xs = [float(each["x"]) for each in labels]
    assert min(b - a for a, b in itertools.pairwise(xs)) > 14


# -- distances -------------------------------------------------------------------------------------


def cells(parsed):
    return [(each["class"], each["text"]) for each in parsed.all("td")]


def test_without_distances_there_is_no_table():
    assert distance_table([]) == ""


def test_rows_are_inputs_and_columns_pairs():
    pairs = [("the truth", "a"), ("the truth", "b"), ("a", "b")]
    inputs = [("gqa", "forward"), ("gqa", "cache"), ("bias", "forward")]
    found = [
        Distance(*pair, *where, 1.0 + i + 10 * j)
        for j, where in enumerate(inputs)
        for i, pair in enumerate(pairs)
    ]
    parsed = Page(distance_table(found))
    heads = [each["text"] for each in parsed.all("th")]
    assert heads[:4] == ["input", "the trutha", "the truthb", "ab"]
    assert heads[4:] == ["gqa, forward", "gqa, cache", "bias, forward"]
    assert [text for _, text in cells(parsed)] == [
        *("1.00", "2.00", "3.00"),
        *("11", "12", "13"),
        *("21", "22", "23"),
    ]


@pytest.mark.parametrize(
    ("ratio", "colour"),
    [
        *((0.0, 0), (1.4, 0), (2.1, 1), (RATIO_LIMIT, 1), (RATIO_LIMIT + 0.1, 2)),
        *((2 * RATIO_LIMIT, 2), (2 * RATIO_LIMIT + 0.1, 3), (100.1, 4), (math.inf, 4)),
        (math.nan, 4),
    ],
)
def test_the_colour_of_a_distance(ratio, colour):
    parsed = Page(distance_table([Distance("a", "b", "gqa", "forward", ratio)]))
    ((css, _),) = cells(parsed)
    assert css == f"heat-{colour}"
    assert len(parsed.all("li")) == 5
    assert f".heat-{colour} {{" in page.render(report())


def test_a_distance_that_there_is_not_says_why_once():
    reason = f"b: ValueError: {HOSTILE}"
    found = [Distance("a", "b", "gqa", way, None, reason) for way in ("forward", "cache")]
    parsed = Page(distance_table(found))
    assert cells(parsed) == [("soft", "\u2013")] * 2
    assert [each["title"] for each in parsed.all("td")] == [reason] * 2
    assert distance_table(found).count(f'<p class="soft">\u2013 {escape(reason)}</p>') == 1


# -- the whole page --------------------------------------------------------------------------------


def report(name="backend", message=HOSTILE):
    """A run with all that a page can show, with long and hostile texts."""
    levels = [result(f"L{level}.a_group.a_case_with_a_rather_long_name") for level in range(8)]
    bad = result("L5.gradients.x", verdict=Verdict.ERROR, message=message)
    deep = result("L2.deep", [10.0 ** (i // 4) for i in range(27)], Verdict.FAIL, "x" * 400)
    results = (*levels, RIGHT, WRONG, deep, bad)
    others = ("the truth", name, "a-backend-with-a-long-name", "flax")
    pairs = [(a, b) for i, a in enumerate(others) for b in others[i + 1 :]]
    ratios = iter([None, math.inf, 300.0, 50.0, 8.0, 4.0, 1.0, 0.5] * 6)
    distances = tuple(
        Distance(*pair, checkpoint, way, ratio, "" if ratio else message)
        for checkpoint in ("gqa", "untied")
        for way in ("forward", "cache")
        for pair in pairs
        for ratio in [next(ratios)]
    )
    required = (*(each.id for each in results), "L2.a_required_case_that.did_not_run")
    return Report(name, results, required, distances=distances, problems=(message,))


CAUSE = Diagnosis("L2.x", "mlp-gelu-erf", 0.98, "Use tanh.", 1, "head", (1, 2), f"98 %\n{HOSTILE}")


def test_every_level_has_its_name():
    text = page.render(report())
    assert re.findall(r"<h3>(L\d .*?)</h3>", text) == [
        "L0 Package",
        "L1 Contract",
        "L2 Meaning, in float32",
        "L3 Narrower types",
        "L4 Generation",
        "L5 Heads, losses, gradients",
        "L6 Checkpoints",
        "L7 Tokenizer and text",
    ]


def test_the_page_nests_and_escapes():
    text = page.render(report(name=HOSTILE), [CAUSE])
    parsed = Page(text)
    assert "script" not in {each["tag"] for each in parsed.elements}
    assert "b" not in {each["tag"] for each in parsed.elements}
    assert len(parsed.all("svg", "plot")) == 2
    (table,) = parsed.all("table", "heat")
    assert HOSTILE in table["text"]
    assert "mlp-gelu-erf" in parsed.all("section", "cause")[0]["text"]


def test_nothing_of_the_page_is_elsewhere():
    text = page.render(report(message="m"), [dataclasses.replace(CAUSE, text="t")])
    loads = r"\b(?:src|href|srcset|data|action|poster)=|url\(|@import|https?:|//[a-z]"
    assert not re.findall(loads, text)
    tags = {each["tag"] for each in Page(text).elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "audio", "video"}


def test_the_device_is_a_fact_where_it_is_known():
    assert "<dt>Device</dt>" not in page.render(report())
    on_gpu = page.render(dataclasses.replace(report(), device="cuda:0"))
    assert "<dt>Device</dt><dd>cuda:0</dd>" in on_gpu


def test_a_page_without_charts_has_no_headings_of_them():
    plain = dataclasses.replace(report(), results=(result("L2.x"),), distances=())
    text = page.render(plain)
    assert "Error by layer" not in text
    assert "Distances" not in text


# -- in a browser ----------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

MEASURED = """
<iframe id="page" width="{width}" height="800" style="border: 0" src="report.html"></iframe>
<pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const frame = document.getElementById("page").contentWindow, shown = frame.document;
  const outside = [];
  for (const plot of shown.querySelectorAll("svg.plot")) {{
    const box = plot.getBoundingClientRect();
    for (const text of plot.querySelectorAll("text")) {{
      const own = text.getBoundingClientRect();
      if (own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1
          || own.bottom > box.bottom + 1) outside.push(text.textContent);
    }}
  }}
  const sizes = [...shown.querySelectorAll("svg.plot text")].map(
    (each) => parseFloat(frame.getComputedStyle(each).fontSize)
      * each.ownerSVGElement.getBoundingClientRect().width / 360);
  document.getElementById("found").textContent = JSON.stringify({{
    width: frame.innerWidth, needed: shown.documentElement.scrollWidth, outside,
    smallest: Math.min(...sizes), charts: shown.querySelectorAll("svg.plot").length,
    loaded: frame.performance.getEntriesByType("resource").map((each) => each.name),
  }});
}});
</script>
"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is installed: looked for {', '.join(NAMES)}")
    return found


@pytest.fixture
def served(tmp_path):
    """The address of a folder: a browser tells of what it loads over HTTP only."""
    handler = functools.partial(Silent, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def measure(browser, served, tmp_path):
    """What a browser says of a page in a frame of so many pixels."""

    def measure(source, width):
        (tmp_path / "report.html").write_text(source, encoding="utf-8")
        frame = MEASURED.format(width=width)
        (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{frame}")
        command = [
            browser,
            "--headless",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        # The sandbox does not work for root, as whom containers run; the page is our own.
        command += ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        outcome = subprocess.run(
            [*command, "--dump-dom", f"{served}/frame.html"],
            capture_output=True,
            encoding="utf-8",
            check=True,
            timeout=120,
        )
        (found,) = re.findall(r'<pre id="found">(.*?)</pre>', outcome.stdout, re.DOTALL)
        return json.loads(found)

    return measure


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_and_loads_nothing(measure, width):
    source = page.render(report(name="a-backend-of-many-words-in-a-row" * 2), [CAUSE])
    found = measure(source, width)
    assert found["width"] == width
    assert found["needed"] <= width
    assert found["loaded"] == []
    assert found["charts"] == 2
    assert found["outside"] == []
    assert found["smallest"] >= 10


def test_the_measurement_sees_what_is_too_wide_and_what_is_loaded(measure):
    wide = '<div style="width: 500px">x</div><img src="nothing.png">'
    source = page.render(report()).replace("<main>", f"<main>{wide}")
    found = measure(source, 360)
    assert found["needed"] >= 500
    assert [name.rpartition("/")[2] for name in found["loaded"]] == ["nothing.png"]
