"""The generated parts of the documentation: `python -m gemma_hub_conformance.pages PAGE ...`.

A page marks each part with `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.mutants import all_mutants

_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The Markdown `page` with its generated parts written anew."""
    return _PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}\n{part[3]}", page)


def cases_table() -> str:
    """Every case with what it needs and how many mutants name it."""
    named = [mutant.case for mutant in all_mutants().values()]
    rows = [
        (f"`{case.id}`", case.doc, ", ".join(sorted(case.needs)), str(named.count(case.id) or ""))
        for case in all_cases().values()
    ]
    return _table(("case", "what it checks", "needs", "mutants"), rows)


def mutants_table() -> str:
    """Every mutant with the case that kills it."""
    rows = [(m.name, m.hint.replace("|", "\\|"), f"`{m.case}`") for m in all_mutants().values()]
    return _table(("mutant", "what is right", "killed by"), rows)


def calibration_table() -> str:
    """The limits with their evidence."""
    text = resources.files("gemma_hub_conformance").joinpath("calibration.json").read_text("utf-8")
    content = json.loads(text)
    rows = []
    for name in ("ratio", "worst_ratio"):
        worst, weakest = content[name]["worst_valid"], content[name]["weakest_mutant"]
        rows.append(
            (
                f"`{name}`",
                f"{worst['value']:.2f} ({worst['run']}, `{worst['case']}`)",
                f"{weakest['value']:.1f} ({weakest['run']}, `{weakest['case']}`)",
                f"**{content[name]['limit']}**",
            )
        )
    runs = len(content["valid_runs"])
    table = _table(("", "worst valid run", "weakest mutant", "limit"), rows)
    return f"{table}\n\nFrom {runs} valid runs of every case and {content['mutants']} mutants."


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PARTS = {"cases": cases_table, "mutants": mutants_table, "calibration": calibration_table}


def main() -> None:
    """Rewrite the generated parts of the pages that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    for path in parser.parse_args().pages:
        path.write_text(filled(path.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
