"""`gemma-hub backends`: what is installed and whether it works."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from gemma_hub.cli.console import out, show_table, table, write

if TYPE_CHECKING:
    from gemma_hub.plugins.info import BackendInfo

_STYLES = {"ready": "green", "unavailable": "yellow", "incompatible": "yellow"}


def backends(
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """List the backends, usable or not, with their options, what is wrong and what to do."""
    from gemma_hub.plugins.registry import plugin_registry

    infos = plugin_registry().backends()
    if as_json:
        records = [dataclasses.asdict(info) for info in infos]
        write(json.dumps(records, ensure_ascii=False, indent=2, default=sorted) + "\n")
        return
    console = out()
    if not infos:
        console.print("No backend is installed. Install one: pip install gemma-hub-torch")
        return
    show_table(console, "backends", backend_table(infos))
    options = option_table(infos)
    if options.row_count:
        show_table(console, "options: --option NAME=VALUE", options)
    for info in infos:
        if info.problem:
            console.print(
                problem_text(info.qualified_name, info.problem, info.remedy), soft_wrap=True
            )


def backend_table(infos: "tuple[BackendInfo, ...]") -> Table:
    """One row per backend."""
    columns = ("backend", "state", "distribution", "version", "tasks", "features", "types")
    listed = table(*columns)
    for info in infos:
        listed.add_row(
            info.name,
            Text(info.state, _STYLES.get(info.state, "bold red")),
            info.distribution,
            info.version,
            ", ".join(info.spec.tasks) if info.spec else "",
            ", ".join(sorted(info.spec.features)) if info.spec else "",
            ", ".join(info.spec.dtypes) if info.spec else "",
        )
    return listed


def option_table(infos: "tuple[BackendInfo, ...]") -> Table:
    """One row per option of a backend."""
    listed = table("backend", "option", "what it does")
    for info in infos:
        # What another version of the contract calls options is unknown here.
        if info.spec and info.state != "incompatible":
            for name, meaning in info.spec.options.items():
                listed.add_row(info.name, name, meaning)
    return listed


def problem_text(name: str, problem: str, remedy: str) -> Text:
    """A problem and its remedy, for `Console.print`."""
    return Text.assemble(
        (f"{name}: ", "bold red"), problem.rstrip(" ."), ".\n  What to do: ", remedy or "nothing."
    )
