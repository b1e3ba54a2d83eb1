"""The registry: what the installed plug-ins offer, and loading it.

A plug-in that fails is quarantined: `problems()` says why, and an error is raised only when
somebody asks for what it offers. Importing this module runs no plug-in.
"""

import os
import threading
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from packaging.utils import canonicalize_name

from gemma_hub.errors import BackendNotFoundError, CheckpointNotFoundError, InputError
from gemma_hub.plugins import advice
from gemma_hub.plugins.admission import admit
from gemma_hub.plugins.claims import (
    BackendClaim,
    Plugin,
    backend_claims,
    checkpoint_claims,
    problem_of,
)
from gemma_hub.plugins.commands import add_commands
from gemma_hub.plugins.discovery import Candidate, Switches, find_candidates
from gemma_hub.plugins.formats import FormatClaim, format_claims, found_format
from gemma_hub.plugins.guard import DEFAULT_TIMEOUT, timeout_from_environment
from gemma_hub.plugins.info import BackendInfo, FormatInfo, LoadedBackend, PluginInfo
from gemma_hub.plugins.problems import PluginFailure, Problem
from gemma_hub.plugins.spec import CheckpointSpec

if TYPE_CHECKING:
    from gemma_hub.checkpoints.formats.interface import CheckpointFormat

__all__ = [
    "BACKEND_VARIABLE",
    "BackendInfo",
    "FormatInfo",
    "LoadedBackend",
    "PluginInfo",
    "PluginRegistry",
    "Problem",
    "plugin_registry",
]

BACKEND_VARIABLE = "GEMMA_HUB_BACKEND"


class PluginRegistry:
    """What the installed plug-ins offer. Safe to use from several threads.

    Plug-ins are imported at the first question; GEMMA_HUB_PLUGINS and GEMMA_HUB_PLUGIN_TIMEOUT
    are read then. No array framework is imported before `load`.
    """

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        """A registry of `entry_points`, or of all that are installed if None."""
        self._entry_points = None if entry_points is None else tuple(entry_points)
        self._lock = threading.RLock()
        self._is_discovered = False
        self._found: tuple[list[Candidate], list[Problem]] | None = None
        self._quarantined: dict[tuple[str, str], PluginFailure] = {}
        self._limit = DEFAULT_TIMEOUT
        self._switches = Switches("")
        self._plugins: list[Plugin] = []
        self._claims: list[BackendClaim] = []
        self._checkpoints: dict[str, CheckpointSpec] = {}
        self._formats: dict[str, FormatClaim] = {}
        self._problems: list[Problem] = []

    # -- before any plug-in's code runs --------------------------------------------------------

    def candidates(self) -> tuple[Candidate, ...]:
        """Every installed plug-in that is switched on, from metadata alone."""
        candidates, _ = self._find_candidates()
        return tuple(candidate for candidate in candidates if self._switches.allow(candidate))

    def quarantine(self, candidate: Candidate, failure: PluginFailure) -> None:
        """Never import a plug-in that is known to do harm. No use once plug-ins are imported."""
        self._quarantined[candidate.owner, candidate.name] = failure

    @property
    def is_discovered(self) -> bool:
        """Whether the plug-ins have been imported."""
        return self._is_discovered

    # -- questions -----------------------------------------------------------------------------

    def plugins(self) -> tuple[PluginInfo, ...]:
        """Every installed plug-in, those that are switched off or quarantined included."""
        self._discover()
        return tuple(
            PluginInfo(
                distribution=plugin.candidate.distribution,
                version=plugin.candidate.version,
                entry_point=plugin.candidate.name,
                module=plugin.candidate.entry_point.value,
                state=plugin.state,
                problem=plugin.problem.cause if plugin.problem else "",
                remedy=plugin.problem.remedy if plugin.problem else "",
            )
            for plugin in self._plugins
        )

    def backends(self) -> tuple[BackendInfo, ...]:
        """Every backend, usable or not, ordered by name."""
        self._discover()
        return tuple(claim.info() for claim in self._claims)

    def checkpoints(self) -> dict[str, CheckpointSpec]:
        """Every installed checkpoint by name.

        A name that two distributions claim is not there; theirs are there as "distribution:name".
        """
        self._discover()
        return dict(self._checkpoints)

    def checkpoint(self, name: str) -> CheckpointSpec:
        """The installed checkpoint of that name.

        Raises:
            CheckpointNotFoundError: there is none, or two distributions claim the name.
        """
        self._discover()
        if name in self._checkpoints:
            return self._checkpoints[name]
        raise CheckpointNotFoundError(advice.no_checkpoint(name, self._checkpoints, self._problems))

    def formats(self) -> dict[str, FormatInfo]:
        """Every checkpoint format by name: the built-in ones in the order to try them, then others.

        A name that two distributions claim is not there, and one of a built-in format means that;
        the plug-ins' are there as "distribution:name".
        """
        self._discover()
        return {name: claim.info(name) for name, claim in self._formats.items()}

    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong, each with its remedy."""
        self._discover()
        found = [claim.problem for claim in self._claims]
        found += [claim.problem for claim in self._formats.values()]
        failed_factories = [
            problem for problem in found if problem is not None and problem.phase == "factory"
        ]
        return (*self._problems, *failed_factories)

    # -- actions -------------------------------------------------------------------------------

    def load(self, name: str | None = None) -> LoadedBackend:
        """The backend of that name. Its framework is imported now, once.

        Args:
            name: "flax", or "distribution:name" where two distributions claim the name. If None:
                GEMMA_HUB_BACKEND; else "torch" if it is installed; else the only usable one. The
                float64 reference "numpy" is taken only if no other backend is installed. A
                backend that fails is never replaced by another.

        Raises:
            BackendNotFoundError: there is none of that name, two claim it, or none was chosen.
            PluginError: it is installed and cannot be loaded; the cause is chained.
        """
        self._discover()
        claim = self._choose(name)
        with self._lock:
            return claim.load()

    def load_format(self, name: str) -> "CheckpointFormat":
        """The checkpoint format of that name. Its module is imported now, once.

        Args:
            name: "gguf", or "distribution:name".

        Raises:
            CheckpointError: there is none of that name, or two distributions claim it.
            PluginError: it is installed and cannot be loaded; the cause is chained.
        """
        self._discover()
        return found_format(name, self._formats, self._problems).load(self._limit)

    def extend_cli(self, app: Any) -> None:
        """Let every plug-in add its commands to `app`, a typer.Typer.

        A plug-in whose commands cannot be added adds none of them and is in `problems()`.
        """
        self._discover()
        for plugin in self._plugins:
            if plugin.admitted is None or not plugin.admitted.implements("gemma_hub_cli"):
                continue
            try:
                add_commands(app, plugin.admitted.hooks, self._limit)
            except PluginFailure as failure:
                problem = problem_of(plugin.candidate, failure)
                if problem not in self._problems:
                    self._problems.append(problem)

    # -- how -----------------------------------------------------------------------------------

    def _discover(self) -> None:
        with self._lock:
            if self._is_discovered:
                return
            candidates, problems = self._find_candidates()
            plugins = [self._examined(candidate) for candidate in candidates]
            failed = [plugin.problem for plugin in plugins if plugin.problem]
            claims, backend_problems = backend_claims(plugins)
            checkpoints, checkpoint_problems = checkpoint_claims(plugins)
            formats, format_problems = format_claims(plugins)
            # Only now, so that a KeyboardInterrupt on the way leaves no half of it.
            self._plugins, self._claims = plugins, claims
            self._checkpoints, self._formats = checkpoints, formats
            self._problems = problems + failed + backend_problems
            self._problems += checkpoint_problems + format_problems
            self._is_discovered = True

    def _find_candidates(self) -> tuple[list[Candidate], list[Problem]]:
        """Every installed plug-in, and what is wrong with metadata and environment variables."""
        with self._lock:
            if self._found is None:
                candidates, problems = find_candidates(self._entry_points)
                self._limit, wrong_limit = timeout_from_environment()
                self._switches = Switches.from_environment()
                problems += wrong_limit + self._switches.problems(candidates)
                self._found = candidates, problems
            return self._found

    def _examined(self, candidate: Candidate) -> Plugin:
        if not self._switches.allow(candidate):
            return Plugin(candidate, "disabled")
        try:
            if known := self._quarantined.get((candidate.owner, candidate.name)):
                raise known
            return Plugin(candidate, "ready", admit(candidate, self._limit))
        except PluginFailure as failure:
            return Plugin(
                candidate,
                "quarantined",
                problem=problem_of(candidate, failure),
                error=failure.__cause__ or failure,
            )

    def _choose(self, name: str | None) -> BackendClaim:
        if name is not None:
            return self._find(name)
        if wanted := os.environ.get(BACKEND_VARIABLE, "").strip():
            return self._find(wanted, f" {BACKEND_VARIABLE} asks for it.")
        return self._find(self._default())

    def _default(self) -> str:
        names = {claim.name for claim in self._claims}
        if advice.DEFAULT in names:
            return advice.DEFAULT  # working or not: a broken one is not replaced in silence
        if names == {advice.REFERENCE}:
            return advice.REFERENCE
        known = self.backends()
        usable = {info.name for info in known if info.state == "ready"} - {advice.REFERENCE}
        if len(usable) == 1:
            return usable.pop()
        raise BackendNotFoundError(advice.no_choice(known))

    def _find(self, asked: str, source: str = "") -> BackendClaim:
        if not isinstance(asked, str):
            raise InputError(f"backend is {asked!r}; expected a name such as 'torch', or None.")
        owner, colon, name = asked.rpartition(":")
        claims = [
            claim
            for claim in self._claims
            if claim.name == name
            and (not colon or claim.candidate.owner == canonicalize_name(owner))
        ]
        # A plug-in that failed too early to say what it offers claims its entry point's name, but
        # not against one that works.
        named = [claim for claim in claims if claim.spec is not None]
        if len(named) > 1:
            both = ". ".join(named[0].conflict or ())
            raise BackendNotFoundError(f"There is no single backend {asked!r}: {both}{source}")
        if claims:
            return (named or claims)[0]
        disabled = [plugin.candidate for plugin in self._plugins if plugin.state == "disabled"]
        raise BackendNotFoundError(
            advice.no_backend(asked, self.backends(), disabled, self._switches.text) + source
        )


_REGISTRY = PluginRegistry()


def plugin_registry() -> PluginRegistry:
    """The registry of this process."""
    return _REGISTRY
