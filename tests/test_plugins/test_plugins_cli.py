"""Commands that plug-ins add to the command line: all of a plug-in's, or none."""

import pytest
import typer
from typer.testing import CliRunner


@pytest.fixture
def app():
    app = typer.Typer()

    @app.callback()
    def main() -> None:
        """The program."""

    @app.command()
    def generate() -> None:
        typer.echo("generated")

    return app


GOOD = """
import typer

@hookimpl
def gemma_hub_cli(app):
    @app.command()
    def bench_it(times: int = 1):
        typer.echo(f"benched {times}")

    tools = typer.Typer()

    @tools.command()
    def count():
        typer.echo("counted")

    @tools.command()
    def weigh():
        typer.echo("weighed")

    app.add_typer(tools, name="tools")
"""

BAD = {
    "raises halfway": (
        "    @app.command()\n    def half(): pass\n    1 / 0\n",
        "gemma_hub_cli failed: ZeroDivisionError",
    ),
    "takes a name": ("    @app.command()\n    def generate(): pass\n", "there already: generate"),
    "cannot be built": (
        "    @app.command()\n    def half(x: 'Nope'): pass\n",
        "building its commands",
    ),
    "sets a callback": ("    @app.callback()\n    def half(): pass\n", "sets a callback"),
    "exits": ("    raise SystemExit\n", "SystemExit"),
}


def commands(app):
    return set(typer.main.get_group(app).commands)


def test_commands_are_added(environment, app):
    environment.install("gemma-hub-good", GOOD)
    registry = environment.registry()
    registry.extend_cli(app)
    assert commands(app) == {"generate", "bench-it", "tools"}
    runner = CliRunner()
    assert runner.invoke(app, ["bench-it", "--times", "3"]).output == "benched 3\n"
    assert runner.invoke(app, ["tools", "weigh"]).output == "weighed\n"
    assert runner.invoke(app, ["generate"]).output == "generated\n"
    assert registry.problems() == ()


@pytest.mark.parametrize(("body", "cause"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("bad_name", ["gemma-hub-bad", "zz-bad"])
def test_bad_commands_leave_no_trace(environment, app, body, cause, bad_name):
    environment.install(bad_name, f"@hookimpl\ndef gemma_hub_cli(app):\n{body}")
    environment.install("gemma-hub-good", GOOD)
    registry = environment.registry()
    registry.extend_cli(app)
    assert commands(app) == {"generate", "bench-it", "tools"}
    assert CliRunner().invoke(app, ["generate"]).output == "generated\n"
    (problem,) = registry.problems()
    assert problem.distribution == bad_name
    assert cause in problem.cause


def test_commands_that_fail_cost_no_backend(environment, app):
    before = "@hookimpl\ndef gemma_hub_cli(app):\n    1 / 0\n"
    environment.install_backend("gemma-hub-half", before=before)
    registry = environment.registry()
    registry.extend_cli(app)
    assert len(registry.problems()) == 1
    assert registry.load("half").name == "half"


def test_plugins_without_commands_add_none(environment, app):
    environment.install_backend("gemma-hub-plain")
    environment.install("gemma-hub-empty", "@hookimpl\ndef gemma_hub_cli(app):\n    pass\n")
    registry = environment.registry()
    registry.extend_cli(app)
    assert commands(app) == {"generate"}
    assert registry.problems() == ()
