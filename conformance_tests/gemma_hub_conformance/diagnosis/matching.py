"""The matched filter: which known bug makes the errors that a case saw?

Every mutant runs through the same case as the subject, and its errors are compared with the
subject's, element by element in units of the rounding noise. Errors that both must make are a
fingerprint: two bugs seldom have one direction, and seldom one size.
"""

import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from gemma_hub.error_model import RATIO_LIMIT
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.diagnosis.recording import Observation, observe
from gemma_hub_conformance.diagnosis.subjects import fresh
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import Mutant
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.spec import Subject

SHOWN = 3
"""Number of matches in a diagnosis."""

MORE_CASES = 8
"""Largest number of further cases that the subject is run on, to tell candidates apart."""

MAX_SECONDS = 10.0
"""Time for it all; the bugs that are likeliest for the case are compared first."""

_CASES_KEPT = 12  # the observations of every mutant in one case are up to 100 MB
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def misfit_limit() -> float:
    """Largest misfit of a bug that counts as found; see `diagnosis.measure`."""
    text = resources.files(__package__).joinpath("calibration.json").read_text("utf-8")
    return float(json.loads(text)["misfit_limit"])


@dataclass(frozen=True, slots=True)
class Match:
    """How well a known bug explains a failure.

    Attributes:
        names: the mutant; several if none of the cases tells them apart.
        hints: for each of them what is right.
        alignment: cosine between the subject's errors and the bug's; None if the case failed
            without comparing numbers.
        size: the subject's errors over the bug's, along the bug's; None likewise.
        misfit: share of the errors that the bug leaves unexplained, in the worst case of all that
            were looked at: 0 if they are the same up to rounding, 1 if they have nothing in common.
        fits: whether the misfit is small enough to say that this is the bug.
    """

    names: tuple[str, ...]
    hints: tuple[str, ...]
    alignment: float | None
    size: float | None
    misfit: float
    fits: bool

    @property
    def text(self) -> str:
        """One line."""
        names = " or ".join(f"`{name}`" for name in self.names)
        if self.alignment is None or self.size is None:
            how = "the same failure as" if self.fits else "a failure like that of"
        else:
            times = "" if self.fits else f", {self.size:.3g} times its size,"
            how = f"{100 * self.alignment:.0f} % aligned{times} with"
        return f"{how} {names}: {' / '.join(dict.fromkeys(self.hints))}"


@dataclass(frozen=True, slots=True)
class Matching:
    """What the matched filter found.

    Attributes:
        cases: what the subject was run on, the failing case first.
        matches: the best, at most `SHOWN`.
        compared: number of known bugs that there was time for.
    """

    cases: tuple[str, ...]
    matches: tuple[Match, ...]
    compared: int

    @property
    def found(self) -> Match | None:
        """The bug, if a known one fits."""
        return self.matches[0] if self.matches and self.matches[0].fits else None


class KnownBugs:
    """What cases see of the mutants; each is run once and then remembered.

    Args:
        oracle: what is right.
        mutants: the bank, by name; all there are if None.
    """

    def __init__(self, oracle: Oracle, mutants: Mapping[str, Mutant] | None = None) -> None:
        self.oracle = oracle
        self.mutants = dict(all_mutants() if mutants is None else mutants)
        self._seen: OrderedDict[str, dict[str, Observation]] = OrderedDict()

    def observation(self, name: str, case: str) -> Observation:
        """What `case` sees of the mutant `name`."""
        found = self._seen.setdefault(case, {})
        self._seen.move_to_end(case)
        while len(self._seen) > _CASES_KEPT:
            self._seen.popitem(last=False)
        if name not in found:
            seen = observe(all_cases()[case], fresh(self.mutants[name]), self.oracle)
            found[name] = seen if seen.failed else Observation(case, {}, (), "")
        return found[name]


def match(
    subject: Subject,
    first: Observation,
    known: KnownBugs,
    passed: Collection[str] = (),
    seconds: float = MAX_SECONDS,
) -> Matching:
    """Compare what a failing case saw of `subject` with what it sees of every known bug.

    Bugs that look alike there are told apart by the cases that are there to kill them, on which
    the subject is run too.

    Args:
        subject: the backend that failed.
        first: what the failing case saw of it.
        known: the bank.
        passed: cases that the subject is known to pass; it cannot have the bugs that they kill.
        seconds: after so many no further bug and no further case is looked at.
    """
    late = time.monotonic() + seconds
    evidence = {first.case: first}
    misfits, compared = {}, 0
    for name in _likeliest_first(first.case, known):
        if time.monotonic() > late:
            break
        compared += 1
        seen = known.observation(name, first.case)
        if seen.failed and known.mutants[name].case not in passed:
            misfits[name] = misfit(first, seen)
    limit = misfit_limit()
    for case in _telling_cases([name for name, value in misfits.items() if value <= limit], known):
        candidates = [name for name, value in misfits.items() if value <= limit]
        if len(evidence) > MORE_CASES or time.monotonic() > late:
            break
        if case in evidence or _alike(candidates, [case], known):
            continue
        evidence[case] = observe(all_cases()[case], subject, known.oracle)
        for name in candidates:
            seen = known.observation(name, case)
            misfits[name] = max(misfits[name], misfit(evidence[case], seen))
    ranked = sorted(misfits, key=lambda name: misfits[name])
    matches = tuple(_matches(ranked, misfits, limit, evidence, known))
    return Matching(tuple(evidence), matches, compared)


def _likeliest_first(case: str, known: KnownBugs) -> list[str]:
    """The bugs whose own case begins like `case` in front."""
    words = case.split(".")

    def shared(name: str) -> int:
        own = known.mutants[name].case.split(".")
        return sum(1 for end in range(1, len(words) + 1) if own[:end] == words[:end])

    return sorted(known.mutants, key=shared, reverse=True)


def _telling_cases(candidates: Iterable[str], known: KnownBugs) -> list[str]:
    """The cases that kill the candidates, each once."""
    return list(dict.fromkeys(known.mutants[name].case for name in candidates))


def _alike(names: list[str], cases: Iterable[str], known: KnownBugs) -> bool:
    """Whether the mutants differ by rounding only in every case."""
    return all(
        misfit(known.observation(names[0], case), known.observation(name, case)) == 0
        for case in cases
        for name in names[1:]
    )


def _matches(
    ranked: list[str],
    misfits: Mapping[str, float],
    limit: float,
    evidence: Mapping[str, Observation],
    known: KnownBugs,
) -> Iterable[Match]:
    first = next(iter(evidence.values()))
    left = list(ranked)
    for _ in range(SHOWN):
        if not left:
            return
        # A tie breaks on rounding, and those that nothing tells apart belong together.
        group = [name for name in left if _alike([left[0], name], evidence, known)]
        left = [name for name in left if name not in group]
        cosine, size = alignment(first, known.observation(group[0], first.case))
        worst = misfits[group[0]]
        hints = tuple(known.mutants[name].hint for name in group)
        yield Match(tuple(group), hints, cosine, size, worst, worst <= limit)


# -- how alike two observations of one case are ----------------------------------------------------


def misfit(one: Observation, other: Observation) -> float:
    """0 if both subjects failed alike up to rounding, 1 if they have nothing in common.

    The root mean square over the comparisons in which one of them is off by more than rounding,
    and over the requirements at which the case ended. Symmetric.
    """
    parts = []
    for name in one.residuals.keys() | other.residuals.keys():
        a, b = one.residuals.get(name), other.residuals.get(name)
        # A case that passed keeps nothing; one that ended early has not made the comparison.
        if (a is not None and _loud(a)) or (b is not None and _loud(b)):
            parts.append(1.0 if a is None or b is None else _distance(a, b))
    if one.requirement or other.requirement:
        parts.append(_message_distance(one.requirement, other.requirement))
    return math.sqrt(sum(part**2 for part in parts) / len(parts)) if parts else 0.0


def alignment(subject: Observation, bug: Observation) -> tuple[float | None, float | None]:
    """Cosine of the angle between the errors, and the subject's size along the bug's direction.

    None where one of them has no errors to compare.
    """
    names = [
        name
        for name, value in subject.residuals.items()
        if name in bug.residuals and bug.residuals[name].shape == value.shape
    ]
    if not names or not (subject.wrong and bug.wrong):
        return None, None
    s, b = (
        np.concatenate([each.residuals[name] for name in names]).astype(np.float64)
        for each in (subject, bug)
    )
    product, square = float(s @ b), float(b @ b)
    length = math.sqrt(float(s @ s) * square)
    return (product / length, product / square) if length > 0 else (None, None)


def compared(residual: np.ndarray) -> Observation:
    """One comparison by itself, as an observation."""
    return Observation("", {"logits": residual}, ("logits",) if _loud(residual) else (), "")


def _loud(residual: np.ndarray) -> bool:
    """Whether it is more than rounding may make."""
    return _length(residual) > _allowed(residual)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """What is between them beyond rounding, over the longer of the two; 1 at most."""
    if a.shape != b.shape:
        return 1.0
    between = _length(a.astype(np.float64) - b) ** 2 - _allowed(a) ** 2
    return min(1.0, math.sqrt(max(0.0, between)) / max(_length(a), _length(b)))


def _allowed(residual: np.ndarray) -> float:
    """Length of a residual at the error model's limit."""
    return RATIO_LIMIT * math.sqrt(residual.size)


def _length(residual: np.ndarray) -> float:
    return float(np.linalg.norm(residual.astype(np.float64)))


def _message_distance(one: str, other: str) -> float:
    """Relative distance of the numbers in two messages that have the same words; else 1."""
    if _NUMBER.sub("#", one) != _NUMBER.sub("#", other):
        return 1.0
    a, b = (np.array([float(x) for x in _NUMBER.findall(text)]) for text in (one, other))
    if not a.size or np.array_equal(a, b):
        return 0.0
    relative: Any = np.abs(a - b) / np.maximum(np.maximum(np.abs(a), np.abs(b)), 1e-300)
    return min(1.0, float(np.sqrt(np.mean(np.square(relative)))))
