"""What a case checks, why it is there and which bugs it is for: `gemma-hub conformance --explain`.

The reasons are in explanations.toml, where a pattern of ids speaks for a family of cases. The rest
follows from the cases, the manifest, the mutants and the matrix.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources

from gemma_hub.errors import InputError, nearest
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.manifest import Facts, recorded
from gemma_hub_conformance.matrix import Killer, known_bugs, stored

WEAKEST = 3
"""How many mutants speak for a case that none names."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The documentation of one case.

    Attributes:
        what: what it checks, what it compares, and how much.
        why: what goes wrong in ports that it finds.
        needs: features and tasks that it does not apply without, in order.
        bugs: "name: what is right" of the mutants that were made for it; without any, of those
            that it kills with the least margin, which is given.
    """

    what: str
    why: str
    needs: tuple[str, ...]
    bugs: tuple[str, ...]


def explanation(id_: str) -> Explanation:
    """The documentation of the case `id_`.

    Raises:
        InputError: there is no such case, or explanations.toml has nothing for it.
    """
    cases = all_cases()
    if id_ not in cases:
        raise InputError(f"There is no case {id_!r}. {nearest(id_, cases)}".rstrip())
    compared = f"Compared: {text_of(id_, 'compares')}"
    parts = [cases[id_].doc, compared, amount(recorded().get(id_))]
    return Explanation(
        what=" ".join(part for part in parts if part),
        why=text_of(id_, "why"),
        needs=tuple(sorted(cases[id_].needs)),
        bugs=_bugs(id_),
    )


@cache
def entries() -> Mapping[str, Mapping[str, str]]:
    """{pattern of ids: its texts} of explanations.toml, each text as one line."""
    file = resources.files("gemma_hub_conformance").joinpath("explanations.toml")
    content = tomllib.loads(file.read_text("utf-8"))
    return {
        pattern: {key: " ".join(text.split()) for key, text in entry.items()}
        for pattern, entry in content.items()
    }


def text_of(id_: str, key: str) -> str:
    """The text of the most specific entry that matches the case and has the key.

    Raises:
        InputError: none has.
    """
    patterns = patterns_for(id_, key)
    if not patterns:
        raise InputError(f"explanations.toml has no {key!r} for the case {id_!r}; add an entry.")
    return entries()[max(patterns, key=lambda pattern: len(pattern.replace("*", "")))][key]


def patterns_for(id_: str, key: str) -> list[str]:
    """The patterns that match the case and have the key; the one with most letters decides."""
    return [
        pattern
        for pattern, entry in entries().items()
        if key in entry and fnmatchcase(id_, pattern)
    ]


def amount(facts: Facts | None) -> str:
    """How much a case compares and checks, in words; '' for one that the manifest does not have."""
    if facts is None:
        return ""
    comparisons = _counted(facts.comparisons, "comparison") + f" of {facts.values:,} numbers"
    parts = {
        comparisons: facts.comparisons,
        _counted(facts.requirements, "condition"): facts.requirements,
        _counted(facts.calls, "call") + " of the backend": facts.calls,
    }
    counted = [part for part, count in parts.items() if count]
    return f"In {facts.dtype}: {', '.join(counted)}." if counted else ""


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _bugs(id_: str) -> tuple[str, ...]:
    bugs = known_bugs()
    named = [f"{name}: {bug.hint}" for name, bug in bugs.items() if bug.case == id_]
    weakest = stored().killers(id_)[:WEAKEST]
    return tuple(named or (_line(killer) for killer in weakest if killer.mutant in bugs))


def _line(killer: Killer) -> str:
    return f"{killer}: {known_bugs()[killer.mutant].hint}"
