"""What the tests of the suite share."""

from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner, Result

from gemma_hub_conformance import plugin
from gemma_hub_conformance.oracle import Oracle


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """One set of reference and witness results for the whole session."""
    return Oracle()


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs `gemma-hub conformance` with these arguments, beside another command."""
    app = typer.Typer()
    app.command("other")(lambda: None)
    plugin.gemma_hub_cli(app)
    return lambda *arguments: CliRunner().invoke(app, ["conformance", *map(str, arguments)])
