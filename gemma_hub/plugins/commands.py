"""Add a plug-in's commands to the command line: all of them, or none."""

from typing import Any

import pluggy

from gemma_hub.plugins.guard import call_guarded
from gemma_hub.plugins.problems import PluginFailure


def add_commands(app: Any, hooks: pluggy.PluginManager, limit: float) -> None:
    """Call `gemma_hub_cli` of one plug-in and add to `app` what it added.

    The hook gets an empty Typer, not `app` itself, so that one that fails halfway, or takes the
    name of a command that is there already, leaves no trace.

    Args:
        app: the typer.Typer of `gemma-hub`.
        hooks: the manager that holds the plug-in.
        limit: seconds that the hook may take.

    Raises:
        PluginFailure: the hook failed, or its commands cannot be added.
    """
    import typer  # only the command line needs it

    scratch = typer.Typer()
    call_guarded(
        lambda: hooks.hook.gemma_hub_cli(app=scratch), "hooks", "calling gemma_hub_cli", limit
    )
    if scratch.registered_callback is not None:
        raise PluginFailure(
            "hooks", "gemma_hub_cli sets a callback, which would replace that of gemma-hub"
        )
    if not (scratch.registered_commands or scratch.registered_groups):
        return
    # Building them finds commands that typer cannot build; in `app` they would break every command.
    added = call_guarded(
        lambda: set(typer.main.get_group(scratch).commands), "hooks", "building its commands", limit
    )
    present = set(typer.main.get_group(app).commands)
    if taken := sorted(added & present):
        raise PluginFailure(
            "names", f"gemma_hub_cli adds commands that are there already: {', '.join(taken)}"
        )
    app.registered_commands.extend(scratch.registered_commands)
    app.registered_groups.extend(scratch.registered_groups)
