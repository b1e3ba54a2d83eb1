"""The catalogue of bugs that ports of Gemma have had, and what guards each of them here.

It is catalogue.toml beside this file: one table for each bug.
"""

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.mutants import all_mutants

_FILE = "catalogue.toml"
_GUARDS = ("mutants", "elsewhere", "outside")


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug. Exactly one of `mutants`, `elsewhere` and `outside` is not empty.

    Attributes:
        id: permanent; lower case with dashes.
        what: what was wrong, in one line.
        seen: where it was seen, "owner/repository#issue", "owner/repository commit" or a project;
            empty for a bug that follows from others.
        mutants: names of the mutants that re-create it.
        elsewhere: the case, or "path::test" from the root of the repository, that guards it,
            because it is no bug of a backend's numbers.
        outside: why nothing here guards it.
    """

    id: str
    what: str
    seen: tuple[str, ...]
    mutants: tuple[str, ...] = ()
    elsewhere: str = ""
    outside: str = ""


@functools.cache
def bugs() -> tuple[Bug, ...]:
    """Every bug, in the order of the file.

    Raises:
        RuntimeError: an entry is not complete, or names a mutant or a case that there is not.
    """
    content = tomllib.loads(
        resources.files("gemma_hub_conformance").joinpath(_FILE).read_text("utf-8")
    )
    found = tuple(bug_of(entry) for entry in content["bugs"])
    ids = [bug.id for bug in found]
    if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
        raise RuntimeError(f"{_FILE} has {', '.join(twice)} twice.")
    return found


def bug_of(entry: Mapping[str, Any]) -> Bug:
    """One table of the file, checked.

    Raises:
        RuntimeError: it is not complete, or names a mutant or a case that there is not.
    """
    where = f"{_FILE}, {entry.get('id', 'a bug without an id')}"
    known = {field.name for field in fields(Bug)}
    if not {"id", "what", "seen"} <= entry.keys() <= known:
        raise RuntimeError(f"{where}: the keys are {sorted(entry)}; expected some of {known}.")
    if sum(bool(entry.get(guard)) for guard in _GUARDS) != 1:
        raise RuntimeError(f"{where}: expected exactly one of {', '.join(_GUARDS)}.")
    mutants, elsewhere = tuple(entry.get("mutants", ())), entry.get("elsewhere", "")
    if unknown := [name for name in mutants if name not in all_mutants()]:
        raise RuntimeError(f"{where}: there is no mutant {', '.join(unknown)}.")
    if elsewhere and "::" not in elsewhere and elsewhere not in all_cases():
        raise RuntimeError(f"{where}: there is no case {elsewhere}.")
    outside = entry.get("outside", "")
    return Bug(entry["id"], entry["what"], tuple(entry["seen"]), mutants, elsewhere, outside)


def table() -> str:
    """The catalogue as a table in Markdown."""
    lines = ["| bug | what was wrong | seen in | guarded by |", "| --- | --- | --- | --- |"]
    for bug in bugs():
        seen = ", ".join(_reference(each) for each in bug.seen)
        lines.append(f"| `{bug.id}` | {bug.what} | {seen} | {_guard(bug)} |")
    return "\n".join(lines)


def _reference(seen: str) -> str:
    """A link where `seen` says which page, else the text."""
    project, _, number = seen.partition("#")
    if number and "/" in project:
        return f"[{seen}](https://github.com/{project}/issues/{number})"
    project, _, commit = seen.partition(" ")
    if "/" in project and commit and not commit.startswith("("):
        return f"[{seen}](https://github.com/{project}/commit/{commit})"
    return seen


def _guard(bug: Bug) -> str:
    if bug.mutants:
        word = "mutant" if len(bug.mutants) == 1 else "mutants"
        return f"{word} {', '.join(f'`{name}`' for name in bug.mutants)}"
    if bug.elsewhere:
        return f"{'test' if '::' in bug.elsewhere else 'case'} `{bug.elsewhere}`"
    return f"outside: {bug.outside}"
