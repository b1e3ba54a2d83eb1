"""From a report with failures to their causes."""

import time
from collections.abc import Callable, Collection

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.diagnosis.exceptions import Trigger, find_trigger
from gemma_hub_conformance.diagnosis.finding import Diagnosis
from gemma_hub_conformance.diagnosis.local import match_in_layer
from gemma_hub_conformance.diagnosis.matching import KnownBugs, Match, match
from gemma_hub_conformance.diagnosis.places import Place, find_place
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.recording import Observation, observe
from gemma_hub_conformance.diagnosis.reproduction import Failure
from gemma_hub_conformance.diagnosis.shrinking import shrink
from gemma_hub_conformance.diagnosis.subjects import fresh, planted
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import Report, Verdict
from gemma_hub_conformance.seeds import seeded
from gemma_hub_conformance.spec import Subject
from gemma_hub_conformance.time_limit import TimedOut

MAX_CAUSES = 3
"""Causes that one run is searched for."""

MAX_SECONDS = 30.0
"""After so many no further cause is looked for."""

_UNLIKE = 0.995  # share of the errors that a bug leaves unexplained; naming it would mislead
_LEVELS = (2, 5, 1, 6, 3, 4, 7, 0)  # the ones whose failures say most come first

Say = Callable[[str], None]


def diagnose(
    subject: Subject,
    report: Report,
    oracle: Oracle,
    *,
    progress: Say | None = None,
    known: KnownBugs | None = None,
) -> tuple[Diagnosis, ...]:
    """What is wrong with `subject`.

    The failing case that says most is looked into. What the bug found there does not explain is
    looked into next, until nothing is left, nothing is found, or there are `MAX_CAUSES`.

    Args:
        subject: the backend that `report` is about.
        report: a run of it.
        oracle: of that run, so that nothing is computed again.
        progress: told in a few words what is done next.
        known: the bugs to compare with; every mutant if None.

    Returns:
        One for each cause, the most certain first; none if no case failed.
    """
    say = progress or (lambda _: None)
    with seeded(report.seed):
        search = _Search(subject, report, KnownBugs(oracle) if known is None else known, say)
        if search.failed and subject.harm:
            return (_harmful(search.failed[0], subject.harm),)
        try:
            return tuple(search.causes())
        except TimedOut as stop:
            return (_harmful(search.failed[0], f"the diagnosis {stop}"),)


class _Search:
    def __init__(self, subject: Subject, report: Report, known: KnownBugs, say: Say) -> None:
        self.subject = subject
        self.oracle = known.oracle
        self.say = say
        self.known = known
        self.failed = _most_telling(report)
        self.passed = {each.id for each in report.results if each.verdict is Verdict.PASS}

    def causes(self) -> list[Diagnosis]:
        late = time.monotonic() + MAX_SECONDS
        left, found = list(self.failed), []
        while left:
            cause, explains = self._cause(left[0])
            found.append(cause)
            if explains is None or len(found) == MAX_CAUSES:
                break
            self.say("looking for another cause")
            rest = []
            for case in left[1:]:
                if time.monotonic() > late:
                    return found
                if not observe(all_cases()[case], explains(), self.oracle).failed:
                    rest.append(case)
            left = rest
        return found

    def _cause(self, case: str) -> tuple[Diagnosis, Callable[[], Subject] | None]:
        """The cause of one failure, and how to make a backend that has just that bug."""
        self.say(f"repeating {case}")
        first = observe(all_cases()[case], self.subject, self.oracle)
        if not first.failed:
            return _unstable(case), None
        self.say("comparing with every known bug")
        matching = match(self.subject, first, self.known, self.passed)
        best = matching.matches[0] if matching.matches else None
        prober = Prober(self.subject, all_cases()[case].dtype)
        if first.crash is not None:
            self.say("looking for what makes it raise")
            trigger = find_trigger(prober, first) or Trigger(first.crash)
            return _of_exception(first, trigger, best), self._maker(best, None)
        self.say("looking for the layer")
        place = find_place(prober, first)
        only_there: int | None = None
        if place.in_logits and place.seen and place.layer is not None and not _fits(best):
            self.say(f"comparing with every known bug in layer {place.layer}")
            local = match_in_layer(prober, place.seen, place.layer, self.known.mutants)
            if local and (best is None or local.misfit < best.misfit):
                best, only_there = local, place.layer
        self.say("looking for the shortest input")
        shortest = shrink(prober, place.seen, fails=place.fails) if place.seen else None
        known = _match_text(best, only_there)
        if matching.late and not _fits(best):
            known += f" (There was time for {matching.compared} of {len(self.known.mutants)} bugs.)"
        cause = self._diagnosis(first, best, known, place, shortest, prober)
        return cause, self._maker(best, only_there)

    def _maker(self, best: Match | None, only_there: int | None) -> Callable[[], Subject] | None:
        if best is None or not best.fits:
            return None
        bug = self.known.mutants[best.names[0]]
        if only_there is None:
            return lambda: fresh(bug)
        return lambda: planted(bug.kind, only_there, exact=True)  # type: ignore[arg-type]

    def _diagnosis(
        self,
        first: Observation,
        best: Match | None,
        known: str,
        place: Place,
        shortest: Seen | None,
        prober: Prober,
    ) -> Diagnosis:
        failure = None
        if shortest is not None and place.in_logits:
            weights = shortest.checkpoint.weights(prober.dtype)
            failure = Failure(
                self.subject.name,
                prober.dtype,
                shortest,
                weights,
                prober.truth(shortest),
                self.subject.extra,
            )
        lines = [f"{first.case}: {known}", place.text, _input_text(shortest)]
        return Diagnosis(
            case=first.case,
            mutant=_name(best),
            alignment=None if best is None else best.alignment,
            advice=_advice(best) or place.text,
            layer=place.layer,
            branch=branch_of(place.where) or None,
            shortest_input=() if shortest is None else _ids(shortest),
            text="\n".join(line for line in lines if line),
            failure=failure,
        )


def _of_exception(first: Observation, trigger: Trigger, best: Match | None) -> Diagnosis:
    crash = trigger.crash
    known = f" This is {best.text}" if best is not None and best.fits else ""
    lines = [f"{first.case}: {crash.text}.{known}", trigger.text, _input_text(trigger.seen)]
    return Diagnosis(
        case=first.case,
        mutant=_name(best),
        alignment=None,
        advice=_advice(best) or f"{crash.text} ({crash.at})",
        layer=None,
        branch=None,
        shortest_input=() if trigger.seen is None else _ids(trigger.seen),
        text="\n".join(line for line in lines if line),
        exception=crash.text,
        raised_in=crash.at if crash.own else "",
        takes=trigger.takes,
    )


def _fits(best: Match | None) -> bool:
    return best is not None and best.fits


def _name(best: Match | None) -> str | None:
    return best.names[0] if best is not None and best.fits else None


def _advice(best: Match | None) -> str:
    """What the known bug's hints say; empty if none fits."""
    return " / ".join(dict.fromkeys(best.hints)) if best is not None and best.fits else ""


def branch_of(where: str) -> str:
    """The branch that a place of `branches` is in: "norm" for every kind of norm."""
    if where == "norms" or where == "final norm" or where.endswith(": norm"):
        return "norm"
    return where.partition(":")[0]


def _most_telling(report: Report) -> list[str]:
    """The cases that failed, the one to look into first in front."""
    cases = all_cases()
    failed = [each.id for each in report.results if each.verdict in (Verdict.FAIL, Verdict.ERROR)]
    order = {id_: place for place, id_ in enumerate(cases)}
    return sorted(failed, key=lambda id_: (_LEVELS.index(cases[id_].level), order[id_]))


def _harmful(case: str, harm: str) -> Diagnosis:
    text = (
        f"The backend hangs or kills the process, so it is not run again to look for the bug: "
        f"{harm}. See where it waits, for instance with `python -X faulthandler` and a debugger."
    )
    return Diagnosis(case, None, None, text, None, None, (), text)


def _unstable(case: str) -> Diagnosis:
    advice = f"{case} failed in the run and passed now: the backend does not repeat itself."
    return Diagnosis(case, None, None, advice, None, None, (), advice)


def _match_text(best: Match | None, only_there: int | None) -> str:
    if best is None or best.misfit >= _UNLIKE:
        return "no known bug fails like this."
    where = "" if only_there is None else f" (in layer {only_there} only)"
    if best.fits:
        return best.text + where
    left = f"{100 * best.misfit:.0f} % of the errors are left unexplained"
    return f"no known bug fits. The nearest{where}, where {left}: {best.text}"


def _input_text(shortest: Seen | None) -> str:
    if shortest is None:
        return ""
    rows: Collection[list[int]] = [list(each.ids) for each in shortest.batch.rows if each.ids]
    positions = [each.positions for each in shortest.batch.rows if each.positions is not None]
    at = f" at positions {[list(each) for each in positions]}" if positions else ""
    slots = shortest.batch.mask.shape[1]
    cached = "" if shortest.chunks is None else f", {list(shortest.chunks)} slots a call"
    asked = f", with {', '.join(shortest.asked)}" if shortest.asked else ""
    where = f"in {slots} slots{cached}{asked}, checkpoint `{shortest.checkpoint.name}`"
    return f"Shortest failing input: {rows}{at}, {where}."


def _ids(seen: Seen) -> tuple[int, ...]:
    return tuple(id_ for each in seen.batch.rows for id_ in each.ids)
