"""The badge: JSON as https://shields.io/badges/endpoint-badge reads it."""

from typing import Any

from gemma_hub_conformance.report import Report

_WORDS = {
    0: ("certified", "brightgreen"),
    1: ("failed", "red"),
    4: ("certified with waivers", "yellow"),
    5: ("vacuous", "lightgrey"),
}


def content(report: Report) -> dict[str, Any]:
    """The badge of a run; one of selected cases never says "certified"."""
    word, colour = _WORDS[report.exit_code]
    if report.selected and report.exit_code in (0, 4):
        word, colour = "partial", "lightgrey"
    of = "" if report.profile == "full" else f" ({report.profile})"
    return {
        "schemaVersion": 1,
        "label": f"gemma conformance{of}",
        "message": word,
        "color": colour,
        "isError": report.exit_code == 1,
    }
