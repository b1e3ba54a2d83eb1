"""Commands that plug-ins add. They are built only when a core command does not answer."""

from typing import Any

import typer
from typer.core import TyperGroup

from gemma_hub.cli.console import err


def plugin_commands(core: typer.Typer) -> dict[str, Any]:
    """{name: command} of everything that plug-ins add to `core`, which stays as it is.

    What fails is in `plugin_registry().problems()`, and nothing is raised.
    """
    from gemma_hub.plugins.registry import plugin_registry

    extended = typer.Typer()
    extended.registered_commands.extend(core.registered_commands)
    names = set(typer.main.get_group(extended).commands)
    plugin_registry().extend_cli(extended)
    commands = typer.main.get_group(extended).commands
    return {name: command for name, command in commands.items() if name not in names}


class CommandGroup(TyperGroup):
    """The commands of `gemma-hub`: those of the core first, then those of plug-ins.

    Attributes:
        core: the Typer that plug-ins extend; set by `gemma_hub.cli.app`.
    """

    core: typer.Typer
    _found: dict[str, Any] | None = None

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self.commands, *sorted(self._extensions())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        from gemma_hub.plugins.registry import plugin_registry
        from gemma_hub.plugins.trial import set_aside_what_kills

        # The status of `gemma-hub conformance` is a verdict, which no plug-in may give itself.
        set_aside_what_kills(plugin_registry())
        return self._extensions().get(cmd_name)

    def _extensions(self) -> dict[str, Any]:
        if self._found is None:
            try:
                self._found = plugin_commands(self.core)
            except Exception as error:  # noqa: BLE001 - whatever a plug-in does, the core answers
                err().print(f"Commands of plug-ins are left out: {error}", style="yellow")
                self._found = {}
        return self._found
