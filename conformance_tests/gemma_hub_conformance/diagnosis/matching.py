"""The matched filter: which known bug makes the errors that a case saw?

Every mutant runs through the same case as the subject, and its errors are compared with the
subject's, element by element in units of the rounding noise. Errors that both must make are a
fingerprint: two bugs seldom have one direction, and seldom one size.
"""

import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.diagnosis.misfits import alignment, misfit, misfit_limit
from gemma_hub_conformance.diagnosis.recording import Observation, observe
from gemma_hub_conformance.diagnosis.subjects import fresh, noisy
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import Mutant
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.spec import Subject

BLUR_SEEDS = (92, 93, 94)
"""Of the roundings by which a bug is compared with itself; no subject and no witness has them."""

SHOWN = 3
"""Number of matches in a diagnosis."""

MORE_CASES = 8
"""Largest number of further cases that the subject is run on, to tell candidates apart."""

MAX_SECONDS = 15.0
"""Time for it all; the bugs that are likeliest for the case are compared first."""

_CASES_KEPT = 12  # the observations of every mutant in one case are up to 100 MB


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
        compared: number of known bugs that were compared.
        late: whether there was no time for some of the others.
        misfits: of every known bug that fails the case.
    """

    cases: tuple[str, ...]
    matches: tuple[Match, ...]
    compared: int
    late: bool = False
    misfits: Mapping[str, float] = dataclasses.field(default_factory=dict)

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
        self._blurs: dict[tuple[str, str], float] = {}
        self._seen: OrderedDict[str, dict[str, Observation]] = OrderedDict()

    def observation(self, name: str, case: str) -> Observation:
        """What `case` sees of the mutant `name`."""
        found = self._seen.setdefault(case, {})
        self._seen.move_to_end(case)
        while len(self._seen) > _CASES_KEPT:
            self._seen.popitem(last=False)
        if name not in found:
            seen = observe(all_cases()[case], fresh(self.mutants[name]), self.oracle)
            kept = dataclasses.replace(seen, inputs=(), crash=None, built=())
            found[name] = kept if seen.failed else Observation(case, {}, (), "")
        return found[name]

    def beyond_blur(self, value: float, name: str, case: str) -> float:
        """`value`, a misfit with the mutant `name`, without what it has with itself.

        A bug that is itself a matter of rounding makes other errors each time, so a backend that
        has it differs from the mutant by as much as the mutant with rounding differs from itself,
        of a few roundings the worst.
        Where that is more than half of the errors' power nothing is taken off: what is mostly
        chance would fit anything.
        """
        if not misfit_limit() < value < 1:
            return value
        key = (name, case)
        if key not in self._blurs:
            exact = self.observation(name, case)
            rounding = (noisy(self.mutants[name], seed) for seed in BLUR_SEEDS)
            seen = [observe(all_cases()[case], each, self.oracle) for each in rounding]
            self._blurs[key] = max(misfit(each, exact) for each in seen)
        power = self._blurs[key] ** 2
        return math.sqrt(max(0.0, value**2 - power)) if power < 0.5 else value


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
    evidence, limit = {first.case: first}, misfit_limit()
    misfits, compared, is_late = _compared(first, known, passed, late)
    for case in _telling_cases([name for name, value in misfits.items() if value <= limit], known):
        candidates = [name for name, value in misfits.items() if value <= limit]
        if len(evidence) > MORE_CASES or time.monotonic() > late:
            break
        if case in evidence or _alike(candidates, [case], known):
            continue
        evidence[case] = observe(all_cases()[case], subject, known.oracle)
        for name in candidates:
            value = misfit(evidence[case], known.observation(name, case))
            misfits[name] = max(misfits[name], known.beyond_blur(value, name, case))
    ranked = sorted(misfits, key=lambda name: misfits[name])
    matches = tuple(_matches(ranked, misfits, limit, evidence, known))
    return Matching(tuple(evidence), matches, compared, is_late, misfits)


def _compared(
    first: Observation, known: KnownBugs, passed: Collection[str], late: float
) -> tuple[dict[str, float], int, bool]:
    """The misfits by name, the number of bugs that were run, and whether time was up."""
    misfits: dict[str, float] = {}
    compared = 0
    for kind in _likeliest_first(first, known, passed):
        for name in kind:
            if time.monotonic() > late:
                return misfits, compared, True
            compared += 1
            seen = known.observation(name, first.case)
            if seen.failed:
                misfits[name] = misfit(first, seen)
        nearest = min(misfits, key=lambda name: misfits[name], default=None)
        if nearest in kind:
            misfits[nearest] = known.beyond_blur(misfits[nearest], nearest, first.case)
            # A bug of the likeliest kind that explains it all leaves nothing for the others.
            if misfits[nearest] <= misfit_limit():
                break
    return misfits, compared, False


def _likeliest_first(
    first: Observation, known: KnownBugs, passed: Collection[str]
) -> list[list[str]]:
    """The bugs by the kind of their own case: those of the kind of the failing case in front.

    An exception is compared with that kind only: what does not raise has nothing in common with it.
    """
    words = first.case.split(".")

    def shared(name: str) -> int:
        own = known.mutants[name].case.split(".")
        return sum(1 for end in range(1, len(words) + 1) if own[:end] == words[:end])

    names = [name for name, mutant in known.mutants.items() if mutant.case not in passed]
    ranked = sorted(names, key=shared, reverse=True)
    near = [name for name in ranked if shared(name) >= 2]
    return [near] if first.crash else [near, ranked[len(near) :]]


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
