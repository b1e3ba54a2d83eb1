"""Runs cases on a backend. The command line, pytest and Python all come through here."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gemma_hub.backend import Backend, TaskSpec
from gemma_hub.errors import InputError, nearest
from gemma_hub.options import option_texts
from gemma_hub.plugins.registry import PluginRegistry, plugin_registry
from gemma_hub.plugins.trial import set_aside_what_kills
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.claims import check_dtype_refused, check_refused, usable_dtype
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.package import package_of
from gemma_hub_conformance.profiles import DEFAULT, Profile, find_profile, required_cases
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.seeds import checked_seed, seeded
from gemma_hub_conformance.spec import CaseContext, CaseFailed, CaseSpec, Subject
from gemma_hub_conformance.time_limit import TimedOut, time_limit
from gemma_hub_conformance.waivers import Waiver, apply_waivers

__all__ = ["load_subject", "required_cases", "run_case", "run_conformance", "select"]


def load_subject(
    name: str,
    registry: PluginRegistry | None = None,
    *,
    device: str = "auto",
    extra: Mapping[str, Any] | None = None,
    dtypes: Sequence[str] = (),
) -> Subject:
    """The installed backend `name`.

    Args:
        name: as users type it.
        registry: where to look; that of this process if None.
        device: that every model is built on, one of the backend's; "auto" for its default.
        extra: options of the backend, `BuildOptions.extra` of every model.
        dtypes: compute types that it has with `extra`, where these are not all that it claims. The
            others are then unclaimed, so that it must refuse them.

    Raises:
        BackendNotFoundError: there is none of that name.
        InputError: the backend does not list the device or one of `dtypes`, or refuses `extra`.
        PluginError: it is there and cannot be loaded.
    """
    registry = plugin_registry() if registry is None else registry
    set_aside_what_kills(registry)
    loaded = registry.load(name)
    spec = loaded.spec
    _check_device(device, loaded.backend, loaded.name)
    subject = Subject(
        loaded.name,
        loaded.backend,
        spec.features,
        _narrowed(dtypes, spec.dtypes, loaded.name),
        extra=dict(extra or {}),
        tasks=spec.tasks,
        distribution=loaded.distribution,
        version=loaded.version,
        device=device,
        package=package_of(registry, loaded),
    )
    if extra:
        _check_options(subject)
    return subject


def _narrowed(chosen: Sequence[str], claimed: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Those of `claimed` that were chosen, in its order; all if none was."""
    for each in chosen:
        if each not in claimed:
            raise InputError(f"{name} does not claim {each!r}; it claims {', '.join(claimed)}.")
    return tuple(each for each in claimed if each in chosen) or claimed


def _check_options(subject: Subject) -> None:
    """Refuse options that the backend refuses: by them every case would fail."""
    options = subject.options(usable_dtype(subject))
    try:
        with time_limit(subject.time_limit):
            subject.backend.build(GQA.config, TaskSpec(), GQA.weights(), options)
    except InputError as error:
        raise InputError(f"{subject.name} refuses these options: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - of anything else a backend does the cases tell
        return


def _check_device(device: str, backend: Backend, name: str) -> None:
    if device == "auto":
        return
    try:
        known = [str(each) for each in backend.devices()]
    except Exception as error:
        raise InputError(f"{name} does not tell its devices ({error}).") from error
    if device not in known:
        raise InputError(f"{name} has no device {device!r}; it has {', '.join(known)}.")


def device_of(subject: Subject) -> str:
    """The device that `subject` builds on; empty where nobody names one and it does not tell."""
    if subject.device != "auto":
        return subject.device
    if subject.harm:
        return ""
    try:
        with time_limit(subject.time_limit):
            first: object = next(iter(subject.backend.devices()), "")
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - the case about devices says so; the report goes on
        return ""
    return first if isinstance(first, str) else ""


def chosen_dtypes(subject: Subject) -> tuple[str, ...]:
    """The compute types of `subject` if they are fewer than its package claims; else none."""
    spec = subject.package.spec if subject.package else None
    if spec is None or spec.name != subject.name:  # a stand-in has the package of another backend
        return ()
    return () if set(subject.dtypes) == set(spec.dtypes) else subject.dtypes


def select(ids: Iterable[str] | None = None, profile: str = DEFAULT) -> list[CaseSpec]:
    """The cases of these ids, or all of the profile if None.

    Raises:
        InputError: there is no such profile, or no case of one of the ids, or not in it.
    """
    part, cases = find_profile(profile), all_cases()
    if ids is None:
        return [case for case in cases.values() if part.contains(case.id)]
    return [_find(each, cases, part) for each in dict.fromkeys(ids)]


def _find(id_: str, cases: dict[str, CaseSpec], profile: Profile) -> CaseSpec:
    if id_ not in cases:
        raise InputError(f"There is no case {id_!r}. {nearest(id_, cases)}".rstrip())
    if not profile.contains(id_):
        raise InputError(
            f"The case {id_!r} is not in the profile {profile.name!r}. Leave the profile out to "
            "run any case."
        )
    return cases[id_]


def run_conformance(
    subject: Subject,
    ids: Sequence[str] | None = None,
    *,
    profile: str = DEFAULT,
    seed: int = 0,
    waivers: Sequence[Waiver] = (),
    oracle: Oracle | None = None,
    on_result: Callable[[CaseResult], None] = lambda _: None,
) -> Report:
    """Run the cases of `ids`, or the whole profile, on `subject`.

    Args:
        subject: the backend under test.
        ids: case ids; None for the whole profile.
        profile: a key of `gemma_hub_conformance.profiles.PROFILES`.
        seed: 0 for the weights and inputs of the calibration, any other for fresh ones.
        waivers: failures to let pass, from `gemma_hub_conformance.waivers.read_waivers`.
        oracle: results to share with other runs.
        on_result: called after each case, before waivers are applied.

    Raises:
        InputError: no such profile or case, or a seed that is none.
    """
    oracle = Oracle() if oracle is None else oracle
    results = []
    with seeded(checked_seed(seed)):
        for case in select(ids, profile):
            results.append(run_case(case, subject, oracle))
            on_result(results[-1])
    report = Report(
        subject.name,
        tuple(results),
        required_cases(profile),
        selected=ids is not None,
        profile=profile,
        seed=seed,
        distribution=subject.distribution,
        version=subject.version,
        device=device_of(subject),
        options=option_texts(subject.extra),
        dtypes=chosen_dtypes(subject),
    )
    waived, problems = apply_waivers(report.results, waivers)
    return dataclasses.replace(report, results=waived, waivers=tuple(waivers), problems=problems)


def run_case(case: CaseSpec, subject: Subject, oracle: Oracle) -> CaseResult:
    """One case on one backend. Never raises for what the backend does.

    A backend that hangs, or kills a process, is not run any more: what is left of the cases fails.
    """
    if subject.harm:
        message = f"not run: {subject.harm}"
        return CaseResult(case.id, Verdict.ERROR, message, None, None, 0.0)
    context = CaseContext(subject, oracle, case.dtype)
    start = time.perf_counter()
    verdict, message = Verdict.PASS, ""
    try:
        with time_limit(subject.time_limit):
            unclaimed = _check_claims(case, subject)
            if unclaimed:
                verdict, message = Verdict.UNSUPPORTED, f"{unclaimed} is not claimed, and refused"
            else:
                case.run(context)
    except CaseFailed as failure:
        verdict, message = Verdict.FAIL, str(failure)
    except TimedOut as stop:
        verdict, message = Verdict.ERROR, str(stop)
        subject.harm = f"{case.id} {stop}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - it may raise anything, SystemExit(0) as well
        verdict, message = Verdict.ERROR, f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    ratios = [judgement.ratio for judgement in context.judgements]
    worst = [judgement.worst_ratio for judgement in context.judgements]
    return CaseResult(
        case.id,
        verdict,
        message,
        max(ratios, default=None),
        max(worst, default=None),
        seconds,
        context.layers,
    )


def _check_claims(case: CaseSpec, subject: Subject) -> str:
    """What `case` needs and `subject` does not claim, after seeing it refused; else ''."""
    if case.dtype not in subject.dtypes:
        check_dtype_refused(subject, case.dtype)
        return f"the dtype {case.dtype!r}"
    # The task first: a feature of a model that is not there cannot be asked for.
    for need in sorted(case.needs - subject.claims, reverse=True):
        check_refused(subject, need)
        return f"{need!r}"
    return ""
