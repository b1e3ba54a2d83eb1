"""The generated parts of the documentation: `python -m gemma_hub_conformance.pages PAGE ...`.

A page marks each part with `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from gemma_hub_conformance import catalogue
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.explain import entries, explanation
from gemma_hub_conformance.matrix import FAILS, Killer, Matrix, can_see, known_bugs, stored
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


def case_sections() -> str:
    """A section for each family of cases, with an entry and an anchor for each case."""
    families: dict[str, list[str]] = {}
    for id_ in all_cases():
        families.setdefault(family(id_), []).append(id_)
    parts = []
    for name, ids in families.items():
        intro = entries().get(f"{name}.*", {}).get("why")
        parts += [f"## {name}", *([intro] if intro else []), *(_case(id_, intro) for id_ in ids)]
    return "\n\n".join(parts)


def family(id_: str) -> str:
    """The first two parts of a case's id."""
    return ".".join(id_.split(".")[:2])


def _case(id_: str, intro: str | None) -> str:
    found = explanation(id_)
    killers = stored().killers(id_)
    named = [name for name, bug in known_bugs().items() if bug.case == id_]
    lines = {
        "Why": "" if found.why == intro else found.why,
        "Needs": ", ".join(found.needs),
        "Made for": _names(named),
        f"Kills {_counted(len(killers))}": _weakest(killers[:3]),
    }
    entry = [f'<a id="{id_}"></a>', f"### {id_}", "", found.what]
    entry += [f"- {label}: {text}" for label, text in lines.items() if text]
    # A list follows an empty line.
    return "\n".join([*entry[:4], "", *entry[4:]]).rstrip()


def _counted(mutants: int) -> str:
    return "one mutant" if mutants == 1 else f"{mutants} mutants, the weakest first"


def _names(mutants: Iterable[str]) -> str:
    return ", ".join(f"[{name}](mutant-matrix.md#{name})" for name in mutants)


def _weakest(killers: Iterable[Killer]) -> str:
    return "; ".join(
        f"{_names([killer.mutant])}, {_margin(killer.cell)}".rstrip(", ") for killer in killers
    )


def _margin(cell: str) -> str:
    """What a cell says of the error; a case that compares nothing has no margin."""
    if cell.isdigit():
        return f"{Killer('', cell).margin:.2g} times the limit"
    return "a condition" if cell == FAILS else "an exception"


def mutants_kills() -> str:
    """Every mutant with its own case, the margin there, and all cases that kill it, by family."""
    matrix = stored()
    rows = []
    for name, bug in known_bugs().items():
        kills = matrix.kills(name)
        own = _margin(matrix.cells[name, bug.case]) if bug.case in kills else "not run"
        rows.append(
            (
                f'<a id="{name}"></a>{name}',
                f"[{bug.case}](conformance-cases.md#{bug.case}), {own}",
                str(len(kills)),
                _by_family(matrix, name, kills),
            )
        )
    return _table(("mutant", "its own case, and by what it fails", "killed by", "of these"), rows)


_FEW = 3  # cases of a family that are named and not counted


def _by_family(matrix: Matrix, mutant: str, kills: Sequence[str]) -> str:
    bug = known_bugs()[mutant]
    sizes = Counter(family(id_) for id_ in matrix.cases if can_see(id_, bug))
    parts = []
    for name, count in Counter(map(family, kills)).items():
        if count == sizes[name]:
            what = f"all {count}" if count > 1 else "the only one"
        elif count <= _FEW:
            what = ", ".join(id_.removeprefix(f"{name}.") for id_ in kills if family(id_) == name)
        else:
            what = f"{count} of {sizes[name]}"
        parts.append(f"{name}: {what}")
    return "; ".join(parts)


def cases_kills() -> str:
    """Every case with how many mutants it kills, and the weakest."""
    rows = []
    for id_ in all_cases():
        killers = stored().killers(id_)
        link = f"[{id_}](conformance-cases.md#{id_})"
        rows.append((link, str(len(killers)), _weakest(killers[:1])))
    return _table(("case", "mutants", "the weakest, and by what it fails"), rows)


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PARTS = {
    "bugs": catalogue.table,
    "cases": cases_table,
    "mutants": mutants_table,
    "calibration": calibration_table,
    "case_sections": case_sections,
    "mutants_kills": mutants_kills,
    "cases_kills": cases_kills,
}


def main() -> None:
    """Rewrite the generated parts of the pages that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    for path in parser.parse_args().pages:
        path.write_text(filled(path.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
