"""Checkpoint formats: who claims which name, and making the one that is asked for."""

import dataclasses
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name

from gemma_hub.errors import CheckpointError, InputError, PluginError
from gemma_hub.plugins import advice
from gemma_hub.plugins.built_in import FORMATS
from gemma_hub.plugins.checks import (
    api_failure,
    installed_version,
    requirement_failure,
    speaks_our_api,
)
from gemma_hub.plugins.claims import Plugin, made_by, problem_of
from gemma_hub.plugins.discovery import GROUP, Candidate
from gemma_hub.plugins.guard import call_guarded
from gemma_hub.plugins.info import FormatInfo
from gemma_hub.plugins.problems import PluginFailure, Problem
from gemma_hub.plugins.spec import FormatSpec

if TYPE_CHECKING:  # asking what is installed shall not import the readers
    from gemma_hub.checkpoints.formats.interface import CheckpointFormat

CORE = "gemma-hub"
"""The distribution of the built-in formats."""


@dataclass(slots=True, eq=False)
class FormatClaim:
    """One distribution's claim to a format name, and what became of it.

    Attributes:
        is_built_in: whether it is the core's own.
        problem: why it cannot be used, conflicts aside.
        error: the exception behind the problem.
        loaded: the format, once it was asked for.
        lock: held while the format is made. One for each claim, since a plug-in's format may ask
            for a built-in one, and does so in another thread.
    """

    spec: FormatSpec
    candidate: Candidate
    is_built_in: bool = False
    problem: Problem | None = None
    error: BaseException | None = None
    loaded: "CheckpointFormat | None" = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fail(self, failure: PluginFailure) -> Problem:
        """Note that the format cannot be used."""
        self.problem = problem_of(self.candidate, failure)
        if self.is_built_in:  # nobody can switch it off, or remove it alone
            remedy = f"Install it again with 'pip install --force-reinstall {CORE}'."
            self.problem = dataclasses.replace(self.problem, remedy=remedy)
        self.error = failure.__cause__ or failure
        return self.problem

    def info(self, name: str) -> FormatInfo:
        """What users are told of it, who call it `name`."""
        lacking = requirement_failure(self.spec) if speaks_our_api(self.spec) else None
        return FormatInfo(
            name=name,
            distribution=self.candidate.distribution,
            version=self.candidate.version,
            summary=self.spec.summary,
            missing=f"{lacking.cause}. {lacking.remedy}" if lacking else "",
            problem=self.problem.cause if self.problem else "",
        )

    def load(self, limit: float) -> "CheckpointFormat":
        """The format, made at the first call. A failure stays: a second import may do harm.

        Args:
            limit: seconds that making one of a plug-in may take. All formats are made to find that
                of a path, so that one that hangs would stop the others.

        Raises:
            PluginError: it cannot be loaded; the cause is chained.
        """
        with self.lock:
            if self.loaded is None and self.problem is None:
                try:
                    self.loaded = self._made(limit)
                except PluginFailure as failure:
                    self.fail(failure)
            if self.loaded is not None:
                return self.loaded
        assert self.problem is not None
        problem = self.problem
        owner = f"{problem.distribution or 'an unknown distribution'} {problem.version}".rstrip()
        stop = "" if problem.cause.endswith((".", "?")) else "."
        raise PluginError(
            f"Checkpoint format {self.spec.name!r} of {owner} is installed and cannot be loaded "
            f"({problem.phase}): {problem.cause}{stop} {problem.remedy}"
        ) from self.error

    def _made(self, limit: float) -> "CheckpointFormat":
        if self.is_built_in:
            return _made_format(self.spec)
        what = f"making {self.spec.factory}"
        return call_guarded(lambda: _made_format(self.spec), "factory", what, limit)


def format_claims(plugins: Sequence[Plugin]) -> tuple[dict[str, FormatClaim], list[Problem]]:
    """{name: claim}, the built-in ones first, and what is wrong with some.

    A name of a built-in format stays with it, and one that several distributions claim goes to
    none; the plug-ins' are there as "distribution:name".
    """
    own = Candidate(
        CORE, installed_version(CORE), EntryPoint("built_in", "gemma_hub.plugins.built_in", GROUP)
    )
    built_in = {spec.name: FormatClaim(spec, own, is_built_in=True) for spec in FORMATS}
    others: dict[str, FormatClaim] = {}
    problems: list[Problem] = []
    for name, rivals in sorted(_by_name(plugins).items()):
        for claim in rivals:
            if not speaks_our_api(claim.spec):
                problems.append(claim.fail(api_failure(claim.spec, claim.candidate.distribution)))
        if len(rivals) == 1 and name not in built_in:
            others[name] = rivals[0]
            continue
        owners = [claim.candidate for claim in rivals]
        for claim in rivals:
            is_single = [owner.owner for owner in owners].count(claim.candidate.owner) == 1
            if is_single:
                others[f"{claim.candidate.distribution}:{name}"] = claim
            if is_single and name in built_in:
                fault = advice.taken_name(name, claim.candidate)
            else:
                fault = advice.conflict("format", name, owners)
            problems.append(problem_of(claim.candidate, PluginFailure("names", *fault)))
    return built_in | others, problems


def found_format(
    asked: str, claims: Mapping[str, FormatClaim], problems: Iterable[Problem]
) -> FormatClaim:
    """The claim that `asked` means: a name, or "distribution:name".

    Raises:
        CheckpointError: there is no such format; names the nearest, and all that there are.
    """
    if not isinstance(asked, str):
        raise InputError(f"The checkpoint format is {asked!r}; expected a name such as 'gguf'.")
    if asked in claims:
        return claims[asked]
    owner, colon, name = asked.rpartition(":")
    for claim in claims.values():
        is_owner = claim.candidate.owner == canonicalize_name(owner)
        if colon and is_owner and claim.spec.name == name:
            return claim
    raise CheckpointError(advice.no_format(asked, claims, problems))


def _by_name(plugins: Sequence[Plugin]) -> dict[str, list[FormatClaim]]:
    """{name: the plug-ins' claims to it}."""
    claims: dict[str, list[FormatClaim]] = {}
    for plugin in plugins:
        for spec in plugin.admitted.formats if plugin.admitted else ():
            rivals = claims.setdefault(spec.name, [])
            # Two entry points of one distribution may name one module.
            if all((c.candidate.owner, c.spec) != (plugin.candidate.owner, spec) for c in rivals):
                rivals.append(FormatClaim(spec, plugin.candidate))
    return claims


def _made_format(spec: FormatSpec) -> "CheckpointFormat":
    """What a spec's factory makes, if it is a format of the spec's name."""
    from gemma_hub.checkpoints.formats.interface import CheckpointFormat

    made = made_by(spec.factory)
    members = sorted(
        name
        for name in {*CheckpointFormat.__annotations__, *vars(CheckpointFormat)}
        if not name.startswith("_")
    )
    if missing := [name for name in members if not hasattr(made, name)]:
        raise PluginFailure(
            "factory",
            f"{spec.factory} made a {type(made).__name__}, which lacks {', '.join(missing)}; "
            f"expected a CheckpointFormat, which has {', '.join(members)}",
        )
    if made.name != spec.name:
        raise PluginFailure(
            "factory",
            f"{spec.factory} made a format that calls itself {made.name!r}; expected "
            f"{spec.name!r}, as its spec says",
        )
    checked: CheckpointFormat = made
    return checked
