"""All report files of one run, written whole or not at all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_hub.checkpoints.output import whole_folder
from gemma_hub.errors import InputError
from gemma_hub_conformance.report import Report
from gemma_hub_conformance.reports import badge, certificate, junit, page

if TYPE_CHECKING:
    from gemma_hub_conformance.diagnosis import Diagnosis

FILES = ("report.json", "junit.xml", "badge.json", "certificate.json", "index.html")


def write_reports(folder: Path, report: Report, causes: "Sequence[Diagnosis]" = ()) -> None:
    """Write `FILES` into `folder`; earlier reports there are replaced.

    A certificate is written only if the run certifies the backend.

    Args:
        folder: to make, with the folders above it.
        report: of the run.
        causes: what `gemma_hub_conformance.diagnosis.diagnose` found.

    Raises:
        InputError: the folder holds something else, or cannot be written. Nothing was changed.
    """
    folder = folder.expanduser().resolve()
    check_folder(folder)
    texts = {
        "report.json": report.to_json(causes),
        "junit.xml": junit.render(report),
        "badge.json": json.dumps(badge.content(report), indent=2) + "\n",
        "index.html": page.render(report, causes),
    }
    if report.exit_code in (0, 4) and not report.selected:
        texts["certificate.json"] = json.dumps(certificate.content(report), indent=2) + "\n"
    try:
        with whole_folder(folder) as hidden:
            for name, text in texts.items():
                # A backend's message may hold what UTF-8 does not.
                (hidden / name).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}).") from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but reports, as it would be lost; before a run is made.

    Raises:
        InputError: it does, or is a file, or cannot be read.
    """
    try:
        found = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be the report's folder ({error.strerror or error})."
        ) from error
    if strange := sorted(found.difference(FILES)):
        raise InputError(
            f"{folder} holds {', '.join(strange[:3])}, which is no report. Choose a folder of its "
            "own, as all of it is replaced."
        )
