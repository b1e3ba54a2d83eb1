"""L0: the backend's package, before any number matters: what a new process sees, and its claims.

What concerns a process as a whole is judged in a new one, since this one has imported much already.
One new process loads the backend, builds a model and runs it; all cases share what it showed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_hub.backend import FEATURES
from gemma_hub.config import ARCHITECTURES
from gemma_hub.errors import GemmaHubError
from gemma_hub.plugins.checks import checked_backends
from gemma_hub.plugins.doctor import IMPORT_BUDGET
from gemma_hub.plugins.problems import PluginFailure
from gemma_hub_conformance.cases.forward import LENGTH, left_padded
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.claims import check_present, check_refused
from gemma_hub_conformance.observer import plain_spec
from gemma_hub_conformance.package import Light, Package, PackageFailure, Whole
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.spec import CaseContext, CaseSpec, prepare

MODEL = GQA
"""The model that the new process builds."""

BUSY = 4.0
"""Allowance of the import's time for a busy machine, where other processes empty the caches.

With eight of them on two cores the plug-ins of this repository took three times their 0.5 ms."""


def batch() -> Batch:
    """What the new process runs."""
    return Batch.of(left_padded(), LENGTH)


def cases() -> list[CaseSpec]:
    """The package in a new process, and every claim in this one."""
    checks: dict[str, tuple[str, Callable[[CaseContext], None]]] = {
        "package.fresh_process": (
            "In a new process it loads, builds and gives the right logits, and the process ends.",
            _fresh_process,
        ),
        "package.spec": ("The plug-in describes the backend well, and always so.", _spec),
        "package.light_module": (
            "The light module and its hooks import no array framework.",
            _light_module,
        ),
        "package.import_time": (
            f"The light module takes {1000 * IMPORT_BUDGET:.0f} ms of processor time to import.",
            _import_time,
        ),
        "package.core_alone": ("`import gemma_hub` imports nothing of it.", _core_alone),
        "package.quiet": ("Nothing is printed, from the import to a forward.", _quiet),
        "package.process_state": (
            "The process's state is as before: NumPy's, random, environment, signals, ...",
            _process_state,
        ),
        "claims.features": ("Every feature that it claims is there.", _features),
        "claims.tasks": ("A model of every task that it claims is built.", _tasks),
        "claims.dtypes": ("A model in every compute type that it claims is built.", _dtypes),
        "claims.nothing_else": (
            "Every feature and task that it does not claim is refused.",
            _nothing_else,
        ),
    }
    return [CaseSpec(f"L0.{name}", doc, run) for name, (doc, run) in checks.items()]


# -- in a new process ------------------------------------------------------------------------------


def _package(context: CaseContext) -> Package:
    package = context.subject.package
    if package is None:
        context.fail(
            "the backend comes from no installed distribution, so no new process can load it; "
            "install it, and name it to load_subject"
        )
    return package


def _light(context: CaseContext) -> Light:
    """What the light modules showed; fails if they cannot be imported."""
    try:
        light = _package(context).light()
    except PackageFailure as failure:
        context.fail(str(failure))
    context.require(not light.error, light.error)
    return light


def _whole(context: CaseContext) -> Whole:
    """What the new process showed. A backend that hangs or kills it is not run in this one."""
    subject = context.subject
    try:
        return _package(context).whole(subject.options("float32"), subject.time_limit / 2)
    except PackageFailure as failure:
        if failure.is_harmful:
            subject.harm = str(failure)
        context.fail(str(failure))


def _fresh_process(context: CaseContext) -> None:
    context.judge_logits(_whole(context).logits, MODEL, batch())


def _spec(context: CaseContext) -> None:
    spec = _package(context).spec
    try:
        checked_backends([[spec]])
    except PluginFailure as failure:
        context.fail(failure.cause)
    expected = plain_spec(spec)
    for specs in _light(context).specs:
        context.require(
            expected in specs,
            f"a new process is told {specs}; this one was told {expected}",
        )


def _light_module(context: CaseContext) -> None:
    found = ", ".join(_light(context).frameworks)
    context.require(
        not found,
        f"its light module, or a hook in it, imports {found}; only the factory's module may",
    )


def _import_time(context: CaseContext) -> None:
    seconds = _light(context).seconds
    context.require(
        seconds <= BUSY * IMPORT_BUDGET,
        f"importing its light module takes {1000 * seconds:.0f} ms of processor time; expected "
        f"{1000 * IMPORT_BUDGET:.0f} ms, and on a busy machine not more than {BUSY:g} times that",
    )


def _core_alone(context: CaseContext) -> None:
    found = ", ".join(_light(context).core_loads)
    context.require(not found, f"`import gemma_hub` alone imports {found}")


def _quiet(context: CaseContext) -> None:
    said = _whole(context).printed
    context.require(not said, "; ".join(said))


def _process_state(context: CaseContext) -> None:
    changes = _whole(context).changes
    context.require(not changes, "; ".join(changes[:5]))


# -- claims ----------------------------------------------------------------------------------------


def _features(context: CaseContext) -> None:
    for feature in sorted(context.subject.features):
        check_present(context.subject, feature)


def _tasks(context: CaseContext) -> None:
    for task in context.subject.tasks:
        check_present(context.subject, f"task:{task}")


def _dtypes(context: CaseContext) -> None:
    for dtype in context.subject.dtypes:
        try:
            model = context.subject.model(MODEL, dtype)
            logits: Any = model.forward(prepare(MODEL, batch())).to_numpy().logits
        except GemmaHubError as error:
            context.fail(f"the claimed dtype {dtype!r} is refused: {error}")
        expected = "float64" if dtype == "float64" else "float32"
        context.require(
            logits.dtype == np.dtype(expected),
            f"the logits of a model in {dtype} are {logits.dtype}; expected {expected}",
        )


def _nothing_else(context: CaseContext) -> None:
    subject = context.subject
    known = [*sorted(FEATURES), *(f"task:{task}" for task in ARCHITECTURES)]
    for feature in known:
        if feature not in subject.claims:
            check_refused(subject, feature)
