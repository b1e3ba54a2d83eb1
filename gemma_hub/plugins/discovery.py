"""Which plug-ins are installed and switched on. Reads metadata only: no plug-in's code runs."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions

from packaging.utils import canonicalize_name

from gemma_hub.errors import nearest
from gemma_hub.plugins.problems import Problem, in_words

GROUP = "gemma_hub"
SWITCHES_VARIABLE = "GEMMA_HUB_PLUGINS"
_VALUE = re.compile(r"[A-Za-z_][\w.]*(\s*:\s*[A-Za-z_][\w.]*)?")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One entry point of one distribution, not imported yet.

    Attributes:
        distribution: the distribution's name, as pip lists it; empty if unknown.
        version: its version; empty if unknown.
        entry_point: what it declares.
    """

    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def name(self) -> str:
        """The entry point's name."""
        return self.entry_point.name

    @property
    def owner(self) -> str:
        """The distribution's name in pip's normal form, to compare with."""
        return canonicalize_name(self.distribution)

    def is_called(self, name: str) -> bool:
        """Whether `name` means this plug-in: its entry point, its distribution, or dist:entry."""
        owner, colon, entry = name.rpartition(":")
        if colon:
            return canonicalize_name(owner) == self.owner and entry == self.name
        return name == self.name or (bool(self.owner) and canonicalize_name(name) == self.owner)

    def metadata_fault(self) -> str:
        """What is wrong with the declaration itself, or an empty string."""
        value = self.entry_point.value
        if not _VALUE.fullmatch(value):
            return f"the entry point's value is {value!r}; expected 'module' or 'module:object'"
        return ""


class Switches:
    """Which plug-ins GEMMA_HUB_PLUGINS leaves on: "none", "a,b" (only these) or "-c" (all but c).

    A name is that of an entry point, of a distribution, or "distribution:entry point".
    """

    def __init__(self, text: str) -> None:
        names = [name.strip() for name in text.split(",") if name.strip()]
        self.text = text
        self.is_none = names == ["none"]
        self.only = [] if self.is_none else [name for name in names if not name.startswith("-")]
        self.without = [name[1:].strip() for name in names if name.startswith("-")]

    @classmethod
    def from_environment(cls) -> "Switches":
        """The switches that the user's environment sets."""
        return cls(os.environ.get(SWITCHES_VARIABLE, ""))

    def allow(self, candidate: Candidate) -> bool:
        """Whether a plug-in may be imported."""
        if self.is_none or any(candidate.is_called(name) for name in self.without):
            return False
        return not self.only or any(candidate.is_called(name) for name in self.only)

    def problems(self, candidates: Iterable[Candidate]) -> list[Problem]:
        """One problem for each name that is no installed plug-in's: a typing error, most often."""
        known = tuple(candidates)
        unknown = [
            name
            for name in (*self.only, *self.without)
            if not any(candidate.is_called(name) for candidate in known)
        ]
        installed = sorted({candidate.name for candidate in known})
        return [
            Problem(
                distribution="",
                version="",
                entry_point=name,
                phase="metadata",
                cause=f"{SWITCHES_VARIABLE}={self.text!r} names {name!r}; "
                "no plug-in of that name is installed",
                remedy=f"{nearest(name, installed)} Installed: {', '.join(installed)}.".strip(),
            )
            for name in unknown
        ]


def find_candidates(
    entry_points: Iterable[EntryPoint] | None = None,
) -> tuple[list[Candidate], list[Problem]]:
    """Every installed plug-in, ordered by name so that the order on sys.path decides nothing.

    A distribution that is seen twice (an editable install beside a wheel) counts once; where the
    two have different versions, the one that comes first on sys.path is taken, as Python does, and
    a problem says so.

    Args:
        entry_points: the entry points to take; those of all installed distributions if None.
    """
    problems: list[Problem] = []
    found: list[EntryPoint] = []
    if entry_points is not None:
        found.extend(entry_points)
    else:
        for distribution in distributions():
            try:
                found.extend(_declared(distribution))
            except Exception as error:  # noqa: BLE001  # whatever a broken file makes a parser raise
                problems.append(_unreadable(distribution, error))
    candidates: dict[tuple[str, str, str], Candidate] = {}
    versions: dict[str, str] = {}
    for entry_point in found:
        candidate = Candidate(*_identity(entry_point.dist), entry_point)
        first = versions.setdefault(candidate.owner, candidate.version)
        if first == candidate.version:
            # Without a name, two distributions cannot be told from one that is seen twice.
            value = "" if candidate.owner else entry_point.value
            candidates.setdefault((candidate.owner, candidate.name, value), candidate)
        else:
            problems.append(_seen_twice(candidate, first))
    return [candidates[key] for key in sorted(candidates)], problems


def _declared(distribution: Distribution) -> list[EntryPoint]:
    """The distribution's entry points in our group; raises if its file cannot be parsed."""
    try:
        text = distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError:
        return []  # nothing says that it is a plug-in of ours
    # Most distributions are not ours: parsing them all costs time, and their faults are not ours.
    if f"[{GROUP}]" not in text:
        return []
    return [entry for entry in distribution.entry_points if entry.group == GROUP]


def _identity(distribution: Distribution | None) -> tuple[str, str]:
    """(name, version) of a distribution; empty strings where its metadata does not say."""
    if distribution is None:
        return "", ""
    try:
        return str(distribution.name or ""), str(distribution.version or "")
    except Exception:  # noqa: BLE001  # no METADATA file, or one that says nothing
        return "", ""


def _unreadable(distribution: Distribution, error: Exception) -> Problem:
    name, version = _identity(distribution)
    where = name or f"the distribution in {distribution.locate_file('')}"
    return Problem(
        distribution=name,
        version=version,
        entry_point="",
        phase="metadata",
        cause=f"entry_points.txt of {where} cannot be read: {in_words(error)}",
        remedy=f"Install it again with 'pip install --force-reinstall {name}' or remove it with "
        f"'pip uninstall {name}'.",
    )


def _seen_twice(candidate: Candidate, first: str) -> Problem:
    name = candidate.distribution
    return Problem(
        distribution=name,
        version=candidate.version,
        entry_point=candidate.name,
        phase="metadata",
        cause=f"{name} is on sys.path as {first} and as {candidate.version}; {first} comes first "
        "and is used",
        remedy=f"Remove both with 'pip uninstall {name}' (repeat until it finds none) and install "
        "the one you want.",
    )
