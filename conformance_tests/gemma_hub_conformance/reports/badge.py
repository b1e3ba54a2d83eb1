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
    """The badge of a run; one of selected cases never says "certified".

    What was certified is not the whole backend, or not as users get it by default, where there is a
    profile, an option or a choice of types. It is in the label then.
    """
    word, colour = _WORDS[report.exit_code]
    if report.selected and report.exit_code in (0, 4):
        word, colour = "partial", "lightgrey"
    profile = () if report.profile == "full" else (report.profile,)
    parts = ", ".join([*profile, *report.options, *report.dtypes])
    of = f" ({parts})" if parts else ""
    return {
        "schemaVersion": 1,
        "label": f"gemma conformance{of}",
        "message": word,
        "color": colour,
        "isError": report.exit_code == 1,
    }
