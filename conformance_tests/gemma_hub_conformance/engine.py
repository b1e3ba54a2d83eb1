"""Runs cases on a backend. The command line, pytest and Python all come through here."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import resources

from gemma_hub.errors import InputError, nearest
from gemma_hub.plugins.registry import plugin_registry
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.claims import check_dtype_refused, check_refused
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.spec import CaseContext, CaseFailed, CaseSpec, Subject


def load_subject(name: str) -> Subject:
    """The installed backend `name`.

    Raises:
        BackendNotFoundError: there is none of that name.
        PluginError: it is there and cannot be loaded.
    """
    loaded = plugin_registry().load(name)
    spec = loaded.spec
    return Subject(loaded.name, loaded.backend, spec.features, spec.dtypes, tasks=spec.tasks)


def required_cases() -> tuple[str, ...]:
    """The manifest: ids of the cases that a full run must contain."""
    text = resources.files("gemma_hub_conformance").joinpath("manifest.json").read_text("utf-8")
    return tuple(json.loads(text)["required"])


def select(ids: Iterable[str]) -> list[CaseSpec]:
    """The cases of these ids.

    Raises:
        InputError: there is no case of one of them.
    """
    cases = all_cases()
    chosen = []
    for each in ids:
        if each not in cases:
            raise InputError(f"There is no case {each!r}. {nearest(each, cases)}".rstrip())
        chosen.append(cases[each])
    return chosen


def run_conformance(
    subject: Subject,
    ids: Sequence[str] | None = None,
    *,
    oracle: Oracle | None = None,
    on_result: Callable[[CaseResult], None] = lambda _: None,
) -> Report:
    """Run the cases of `ids`, or all of them, on `subject`.

    Args:
        subject: the backend under test.
        ids: case ids; None for the whole suite.
        oracle: results to share with other runs.
        on_result: called after each case.
    """
    oracle = Oracle() if oracle is None else oracle
    results = []
    for case in all_cases().values() if ids is None else select(ids):
        results.append(run_case(case, subject, oracle))
        on_result(results[-1])
    return Report(subject.name, tuple(results), required_cases(), selected=ids is not None)


def run_case(case: CaseSpec, subject: Subject, oracle: Oracle) -> CaseResult:
    """One case on one backend. Never raises for what the backend does."""
    context = CaseContext(subject, oracle, case.dtype)
    start = time.perf_counter()
    verdict, message = Verdict.PASS, ""
    try:
        unclaimed = _check_claims(case, subject)
        if unclaimed:
            verdict, message = Verdict.UNSUPPORTED, f"{unclaimed} is not claimed, and refused"
        else:
            case.run(context)
    except CaseFailed as failure:
        verdict, message = Verdict.FAIL, str(failure)
    except Exception as error:  # noqa: BLE001 - a backend may raise anything; that is a verdict
        verdict, message = Verdict.ERROR, f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    ratios = [judgement.ratio for judgement in context.judgements]
    worst = [judgement.worst_ratio for judgement in context.judgements]
    return CaseResult(
        case.id, verdict, message, max(ratios, default=None), max(worst, default=None), seconds
    )


def _check_claims(case: CaseSpec, subject: Subject) -> str:
    """What `case` needs and `subject` does not claim, after seeing it refused; else ''."""
    # The task first: a feature of a model that is not there cannot be asked for.
    for need in sorted(case.needs - subject.claims, reverse=True):
        check_refused(subject, need)
        return f"{need!r}"
    if case.dtype not in subject.dtypes:
        check_dtype_refused(subject, case.dtype)
        return f"the dtype {case.dtype!r}"
    return ""
