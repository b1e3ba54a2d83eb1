"""Who claims which name. Where two claim one, neither has it."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_hub.backend import Backend
from gemma_hub.errors import PluginError
from gemma_hub.plugins import advice
from gemma_hub.plugins.admission import Admitted
from gemma_hub.plugins.checks import api_failure, requirement_failure, speaks_our_api
from gemma_hub.plugins.discovery import Candidate
from gemma_hub.plugins.info import BackendInfo, BackendState, LoadedBackend, PluginState
from gemma_hub.plugins.problems import PluginFailure, Problem, in_words
from gemma_hub.plugins.spec import BackendSpec, CheckpointSpec


@dataclass(slots=True, eq=False)
class Plugin:
    """An entry point and what became of it.

    Attributes:
        admitted: what it holds, if it passed every check.
        problem: what is wrong with it, if it did not.
        error: the exception behind the problem.
    """

    candidate: Candidate
    state: PluginState = "ready"
    admitted: Admitted | None = None
    problem: Problem | None = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class BackendClaim:
    """One plug-in's claim to a backend name, and what became of it.

    Attributes:
        name: the backend's name; the entry point's where the plug-in failed before it gave one.
        spec: what the plug-in says of it.
        state: as in `BackendInfo`, but for "conflict".
        problem: what is wrong with it, conflicts aside.
        error: the exception behind the problem.
        conflict: (cause, remedy), if others claim the name.
        loaded: the backend, once it was asked for.
    """

    name: str
    candidate: Candidate
    spec: BackendSpec | None
    state: BackendState = "ready"
    problem: Problem | None = None
    error: BaseException | None = None
    conflict: tuple[str, str] | None = None
    loaded: LoadedBackend | None = None

    def fail(self, state: BackendState, failure: PluginFailure) -> Problem:
        """Note that the backend cannot be used."""
        self.state = state
        self.problem = problem_of(self.candidate, failure)
        self.error = failure.__cause__ or failure
        return self.problem

    def info(self) -> BackendInfo:
        """What users are told of it."""
        cause, remedy = self.conflict or ("", "")
        if self.problem is not None:
            cause, remedy = self.problem.cause, self.problem.remedy
        return BackendInfo(
            spec=self.spec,
            name=self.name,
            distribution=self.candidate.distribution,
            version=self.candidate.version,
            state="conflict" if self.conflict and self.problem is None else self.state,
            problem=cause,
            remedy=remedy,
        )

    def load(self) -> LoadedBackend:
        """The backend, made at the first call. A failure stays: a second import may do harm.

        Raises:
            PluginError: it cannot be loaded; the cause is chained.
        """
        if self.loaded is None and self.problem is None and self.spec is not None:
            try:
                backend = _made_backend(self.spec)
            except PluginFailure as failure:
                self.fail("quarantined", failure)
            else:
                self.loaded = LoadedBackend(
                    name=self.name,
                    spec=self.spec,
                    distribution=self.candidate.distribution,
                    version=self.candidate.version,
                    backend=backend,
                )
        if self.loaded is not None:
            return self.loaded
        assert self.problem is not None  # without a spec there is one
        problem = self.problem
        stop = "" if problem.cause.endswith((".", "?")) else "."
        raise PluginError(
            f"Backend {self.name!r} of {problem.distribution or 'an unknown distribution'} "
            f"{problem.version} is installed and cannot be loaded ({problem.phase}): "
            f"{problem.cause}{stop} {problem.remedy}"
        ) from self.error


def backend_claims(plugins: Sequence[Plugin]) -> tuple[list[BackendClaim], list[Problem]]:
    """Every claim to a backend name, ordered by name, and what is wrong with some of them."""
    claims: list[BackendClaim] = []
    problems: list[Problem] = []
    for plugin in plugins:
        candidate = plugin.candidate
        if plugin.problem is not None:
            failed = BackendClaim(candidate.name, candidate, None, "quarantined", plugin.problem)
            failed.error = plugin.error
            claims.append(failed)
        for spec in plugin.admitted.backends if plugin.admitted else ():
            if any(spec == c.spec and candidate.owner == c.candidate.owner for c in claims):
                continue  # two entry points of one distribution name one module
            claim = BackendClaim(spec.name, candidate, spec)
            claims.append(claim)
            if not speaks_our_api(spec):
                failure = api_failure(spec, candidate.distribution)
                problems.append(claim.fail("incompatible", failure))
            elif lacking := requirement_failure(spec):
                problems.append(claim.fail("unavailable", lacking))
    # A plug-in that failed before it gave a name is no rival of one that works.
    named = [claim for claim in claims if claim.spec is not None]
    for claim in named:
        rivals = [rival.candidate for rival in named if rival.name == claim.name]
        if len(rivals) > 1:
            cause, remedy = advice.conflict("backend", claim.name, rivals)
            claim.conflict = cause, remedy
            problems.append(problem_of(claim.candidate, PluginFailure("names", cause, remedy)))
    return sorted(claims, key=lambda claim: claim.name), problems


def checkpoint_claims(
    plugins: Sequence[Plugin],
) -> tuple[dict[str, CheckpointSpec], list[Problem]]:
    """{name: checkpoint}, with "distribution:name" for each of those that claim one name."""
    claims: dict[str, list[tuple[Candidate, CheckpointSpec]]] = {}
    for plugin in plugins:
        for spec in plugin.admitted.checkpoints if plugin.admitted else ():
            rivals = claims.setdefault(spec.name, [])
            if all((plugin.candidate.owner, spec) != (c.owner, s) for c, s in rivals):
                rivals.append((plugin.candidate, spec))
    checkpoints: dict[str, CheckpointSpec] = {}
    problems: list[Problem] = []
    for name, rivals in claims.items():
        if len(rivals) == 1:
            checkpoints[name] = rivals[0][1]
            continue
        owners = [candidate for candidate, _ in rivals]
        failure = PluginFailure("names", *advice.conflict("checkpoint", name, owners))
        for candidate, spec in rivals:
            problems.append(problem_of(candidate, failure))
            if [c.owner for c in owners].count(candidate.owner) == 1:
                checkpoints[f"{candidate.distribution}:{name}"] = spec
    return checkpoints, problems


def problem_of(candidate: Candidate, failure: PluginFailure) -> Problem:
    """A failure of one plug-in, for `PluginRegistry.problems`."""
    return Problem(
        distribution=candidate.distribution,
        version=candidate.version,
        entry_point=candidate.name,
        phase=failure.phase,
        cause=failure.cause,
        remedy=advice.with_way_out(failure.remedy, candidate),
    )


def made_by(factory: str) -> Any:
    """What "module:Class" makes. Here, and only here, a framework is imported.

    Raises:
        PluginFailure: it failed; the cause is chained.
    """
    module, _, attributes = factory.partition(":")
    try:
        made: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            made = getattr(made, attribute)
        return made()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit and Rust panics are no Exception
        raise PluginFailure("factory", f"{factory}: {in_words(error)}") from error


def _made_backend(spec: BackendSpec) -> Backend:
    backend = made_by(spec.factory)
    if not isinstance(backend, Backend):
        raise PluginFailure(
            "factory",
            f"{spec.factory} made a {type(backend).__name__}, which lacks devices() or build()",
        )
    return backend
