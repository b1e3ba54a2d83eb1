"""`gemma-hub doctor`: the state of this installation, with a remedy for each problem."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gemma_hub.cli.backends import backend_table, problem_text
from gemma_hub.cli.console import out, show_table, table, waiting, write

if TYPE_CHECKING:
    from gemma_hub.plugins.doctor import Diagnosis


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Examine versions, plug-ins and what they offer; exit code 1 if something is wrong."""
    from gemma_hub.cli.app import app
    from gemma_hub.cli.extensions import plugin_commands
    from gemma_hub.plugins.doctor import diagnose
    from gemma_hub.plugins.registry import plugin_registry

    with waiting("Examining plug-ins"):
        # Commands are added only after each plug-in was tried in a process of its own, and so that
        # one whose commands fail is among the problems.
        diagnosis = diagnose(plugin_registry(), lambda: plugin_commands(app))
    if as_json:
        write(json.dumps(diagnosis.to_dict(), ensure_ascii=False, indent=2) + "\n")
    else:
        _print(diagnosis)
    if not diagnosis.is_healthy:
        raise typer.Exit(1)


def _print(diagnosis: "Diagnosis") -> None:
    console = out()
    versions = table("what", "version")
    for name, version in diagnosis.versions.items():
        versions.add_row(name, version)
    show_table(console, "versions", versions)
    plugins = table("plug-in", "distribution", "state", "import")
    for entry in diagnosis.plugins:
        style = {"ready": "green", "disabled": "dim"}.get(entry.plugin.state, "bold red")
        measured = entry.measured
        seconds = None if measured is None else measured.seconds
        plugins.add_row(
            entry.plugin.entry_point,
            f"{entry.plugin.distribution} {entry.plugin.version}",
            Text(entry.plugin.state, style),
            "" if seconds is None else f"{1000 * seconds:.0f} ms",
        )
    show_table(console, "plug-ins", plugins)
    show_table(console, "backends", backend_table(diagnosis.backends))
    checkpoints = table("checkpoint", "summary", "folder")
    for checkpoint in diagnosis.checkpoints:
        checkpoints.add_row(checkpoint.name, checkpoint.summary, checkpoint.path)
    show_table(console, "checkpoints", checkpoints)
    formats = table("format", "summary", "distribution", "what it lacks")
    for info in diagnosis.formats:
        lacks = Text(info.problem, "bold red") if info.problem else Text(info.missing, "yellow")
        formats.add_row(info.name, info.summary, f"{info.distribution} {info.version}", lacks)
    show_table(console, "checkpoint formats", formats)
    for problem in diagnosis.problems:
        name = " ".join(filter(None, (problem.distribution, problem.version, problem.entry_point)))
        where = f"{name} ({problem.phase})".strip()
        console.print(problem_text(where, problem.cause, problem.remedy), soft_wrap=True)
    if diagnosis.is_healthy:
        console.print("All is well.", style="green")
    elif not diagnosis.problems:
        console.print("No backend is ready. Install one: pip install gemma-hub-torch", style="red")
