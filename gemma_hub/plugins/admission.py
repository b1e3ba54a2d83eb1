"""One plug-in from metadata to checked specs. Nothing of a plug-in that fails a step stays."""

from dataclasses import dataclass
from typing import Any

import pluggy

from gemma_hub.errors import nearest
from gemma_hub.plugins import hookspecs
from gemma_hub.plugins.checks import checked_backends, checked_checkpoints, checked_formats
from gemma_hub.plugins.discovery import Candidate
from gemma_hub.plugins.guard import call_guarded
from gemma_hub.plugins.problems import PluginFailure, in_words
from gemma_hub.plugins.spec import BackendSpec, CheckpointSpec, FormatSpec


@dataclass(frozen=True, slots=True)
class Admitted:
    """A plug-in that passed every check.

    Attributes:
        hooks: a pluggy manager that holds this plug-in alone. With one manager for all, the same
            module in two distributions could not be registered twice, one failing implementation
            would lose the results of the others, and no exception would say whose it is.
        backends: what `gemma_hub_backends` returned.
        checkpoints: what `gemma_hub_checkpoints` returned.
        formats: what `gemma_hub_checkpoint_formats` returned.
    """

    hooks: pluggy.PluginManager
    backends: tuple[BackendSpec, ...]
    checkpoints: tuple[CheckpointSpec, ...]
    formats: tuple[FormatSpec, ...]

    def implements(self, hook: str) -> bool:
        """Whether the plug-in implements a hook."""
        return bool(getattr(self.hooks.hook, hook).get_hookimpls())


def admit(candidate: Candidate, limit: float) -> Admitted:
    """Import a plug-in, check its hooks, call those that describe it, check what they return.

    Args:
        candidate: what to import.
        limit: seconds that each step may take.

    Raises:
        PluginFailure: at the first step that fails.
    """
    if fault := candidate.metadata_fault():
        raise PluginFailure("metadata", fault)
    entry_point = candidate.entry_point
    plugin = call_guarded(entry_point.load, "import", f"importing {entry_point.value!r}", limit)
    hooks = call_guarded(
        lambda: _registered(plugin, candidate), "hooks", "reading its hooks", limit
    )
    backends = checked_backends(_called(hooks, "gemma_hub_backends", limit))
    checkpoints = checked_checkpoints(_called(hooks, "gemma_hub_checkpoints", limit))
    formats = checked_formats(_called(hooks, "gemma_hub_checkpoint_formats", limit))
    return Admitted(hooks, backends, checkpoints, formats)


def _registered(plugin: Any, candidate: Candidate) -> pluggy.PluginManager:
    """A manager that holds `plugin`, whose hooks exist and take arguments that the core passes."""
    if plugin is None:
        raise PluginFailure("hooks", f"{candidate.entry_point.value!r} is None; expected a module")
    hooks = pluggy.PluginManager(hookspecs.PROJECT)
    hooks.add_hookspecs(hookspecs)
    known = sorted(vars(hooks.hook))
    try:
        hooks.register(plugin, name=f"{candidate.distribution}:{candidate.name}")
        hooks.check_pending()
    except pluggy.PluginValidationError as error:
        misspelt = [name for name in vars(hooks.hook) if name not in known]
        hint = nearest(misspelt[0], known) if misspelt else ""
        cause = f"{' '.join(in_words(error).split())}. {hint}"
        raise PluginFailure("hooks", cause.rstrip(". ")) from error
    for name in known:
        implementations = getattr(hooks.hook, name).get_hookimpls()
        if not implementations and callable(getattr(plugin, name, None)):
            raise PluginFailure("hooks", f"{name} is not marked with @hookimpl")
        for implementation in implementations:
            if defaults := implementation.kwargnames:
                raise PluginFailure(
                    "hooks",
                    f"{name} gives a default to {', '.join(defaults)}; pluggy never passes an "
                    "argument that has one",
                )
    if not hooks.get_hookcallers(plugin):
        raise PluginFailure("hooks", f"it implements none of {', '.join(known)}")
    return hooks


def _called(hooks: pluggy.PluginManager, hook: str, limit: float) -> list[object]:
    """What each implementation of `hook` in one plug-in returned."""
    caller = getattr(hooks.hook, hook)
    returned: list[object] = call_guarded(caller, "hooks", f"calling {hook}", limit)
    # pluggy drops None, which here is a forgotten `return`.
    expected = sum(
        not (implementation.wrapper or implementation.hookwrapper)
        for implementation in caller.get_hookimpls()
    )
    if len(returned) < expected:
        raise PluginFailure("specs", f"{hook} returned None; expected a list")
    return returned
