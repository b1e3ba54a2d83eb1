"""The suite as a command, `gemma-hub conformance NAME`. Light: it imports the suite to run it."""

from typing import Any

from gemma_hub.plugins.hookspecs import hookimpl


@hookimpl
def gemma_hub_cli(app: Any) -> None:
    """Add the command `conformance`."""
    from gemma_hub_conformance.command import conformance

    app.command()(conformance)
