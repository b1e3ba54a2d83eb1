"""The suite as commands. Light: they import the suite when they run."""

from typing import Any

from gemma_hub.plugins.hookspecs import hookimpl


@hookimpl
def gemma_hub_cli(app: Any) -> None:
    """Add `conformance`, `golden-pack` and `check-pack`."""
    from gemma_hub_conformance.command import conformance
    from gemma_hub_conformance.pack_commands import check_pack, golden_pack

    for command in (conformance, golden_pack, check_pack):
        app.command()(command)
