"""What follows from samples: medians, ratios round by round, fractions; the table and the plot."""

import xml.etree.ElementTree
from pathlib import Path

import pytest

from gemma_hub.bench.checkpoints import matrix_parameters
from gemma_hub.bench.plot import LEFT, RIGHT, WIDTH, plot
from gemma_hub.bench.report import BenchReport
from gemma_hub.bench.running import Settings, Subject

SETTINGS = Settings(dtypes=("float32",), batches=(4,), prompt=10, new=5)


def sample(scale: float, memory: dict | None = None, worst: float = 100.0) -> dict:
    """One process: prefill takes `scale` s, five steps of four rows `scale` s too."""
    return {
        "versions": {},
        "import_s": 0.0,
        "load_s": scale,
        "first_token_s": scale,
        "memory": {"end": memory},
        "prefill_s": [scale, scale, worst * scale],
        "decode": {"4": {"one_s": [1.0, 1.0], "full_s": [1.0 + scale, 0.5]}},
    }


def subject(name: str, samples: list[dict], kind: str = "backend") -> Subject:
    return Subject(name, kind, "float32", Path("x.py"), {}, samples=samples)


@pytest.fixture
def report(tiny_config) -> BenchReport:
    bytes_of = {"private_bytes": 2 * 10**9, "resident_bytes": 3 * 10**9}
    # Both of a round slow down alike, so the ratio is 2 in each.
    ours = subject("ours", [sample(s, bytes_of) for s in (1.0, 10.0)])
    peer = subject("peer <x>", [sample(s / 2, worst=300.0) for s in (1.0, 10.0)], "peer")
    gone = subject("gone", [], "peer")
    gone.error = "no such program"
    limits = [
        subject("a", [{"read_bytes_per_s": [1e6, 3e6, 2e6]}], "limits"),
        subject("b", [{"read_bytes_per_s": [1e6]}, {"matmul_flop_per_s": [1e9]}], "limits"),
    ]
    return BenchReport("tiny", tiny_config, SETTINGS, [ours, *limits, peer, gone])


def test_figures_are_medians_with_their_range(report):
    figures = report.figures(report.subjects[0])
    assert figures["load_s"].median == 5.5
    prefill = figures["prefill_tokens_per_s"]
    assert (prefill.low, prefill.high) == (10 / 1000, 10 / 1)
    assert prefill.median == pytest.approx((10 / 10 + 10 / 10) / 2)
    assert figures["private_bytes"].median == 2e9


def test_a_pair_whose_difference_drowns_in_the_noise_is_left_out(report):
    figure = report.figures(report.subjects[0])["decode_4_tokens_per_s"]
    assert (figure.low, figure.high) == (4 * 5 / 10, 4 * 5 / 1)


def test_ratios_are_taken_round_by_round(report):
    ratios = report.figures(report.subjects[3])["prefill_tokens_per_s"]
    assert (ratios.ratio_low, ratios.ratio, ratios.ratio_high) == (2.0, 2.0, 2.0)
    assert report.figures(report.subjects[0])["prefill_tokens_per_s"].ratio == 1.0


def test_fractions_are_of_the_best_limit_that_was_reached(report, tiny_config):
    every, body = matrix_parameters(tiny_config)
    assert report.limits("float32") == {"read_bytes_per_s": 2e6, "matmul_flop_per_s": 1e9}
    figures = report.figures(report.subjects[0])
    assert figures["decode_4_tokens_per_s"].fraction == pytest.approx(11 / (4 * 2e6 / (every * 4)))
    assert figures["prefill_tokens_per_s"].fraction == pytest.approx(1.0 / (1e9 / (2 * body)))


def test_the_table_says_what_failed_and_what_was_not_measured(report):
    header, ours, peer, gone = report.table()
    assert len(header) == len(ours) == len(peer) == len(gone)
    assert ours[4] == "2"
    assert peer[4] == "not measured"
    assert "×2.00" in peer[-1]
    assert gone[2] == "failed"
    text = report.to_markdown()
    assert "- gone float32: no such program\n" in text
    assert "reads 0.0 GB/s" in text


def test_the_plot_has_a_mark_for_every_rate_and_escapes_names(report):
    svg = plot(report)
    root = xml.etree.ElementTree.fromstring(svg)
    marks = [element for element in root.iter() if element.get("class", "").startswith("mark")]
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert len(marks) == 4
    assert texts.count("peer <x>") == 2
    assert "gone" not in texts
    places = {_middle(mark) for mark in marks}
    assert places == {LEFT + (WIDTH - LEFT - RIGHT) / 2, WIDTH - RIGHT}  # ×1 and ×2


def _middle(mark: xml.etree.ElementTree.Element) -> float:
    """Where a circle or a square is, from left to right."""
    if mark.tag.endswith("circle"):
        return float(mark.get("cx"))
    return round(float(mark.get("x")) + float(mark.get("width")) / 2, 1)
