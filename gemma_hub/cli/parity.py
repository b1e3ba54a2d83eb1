"""`gemma-hub parity`: compare backends with the float64 reference."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from gemma_hub.cli.console import out, progress_bar, show_table, table
from gemma_hub.cli.files import checked_file
from gemma_hub.cli.sources import local_source
from gemma_hub.errors import InputError

if TYPE_CHECKING:
    from gemma_hub.parity.report import Cell, ParityReport

_MARKS = {
    "equal": ("\u2713", "green"),
    "tie": ("\u2248 tie", "yellow"),
    "different": ("\u2717", "bold red"),
}


def parity(
    source: Annotated[
        str, typer.Argument(help="A checkpoint, an installed name: tiny, or a repository id.")
    ],
    backends: Annotated[
        str, typer.Option(help="Backends to compare, with commas between them.")
    ] = "torch,flax",
    dtype: Annotated[
        str, typer.Option(help="Compute type: float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Device, in the framework's words.")] = "auto",
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text to compare on; may be given again.", show_default="five texts"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of each continuation.")] = 32,
    witnesses: Annotated[int, typer.Option(help="Runs that measure the rounding noise.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the sampled continuations.")] = 7,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a self-contained page here.", dir_okay=False, callback=checked_file
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write every number here.", dir_okay=False, callback=checked_file),
    ] = None,
) -> None:
    """Compare backends with the float64 reference; exit code 1 if one differs."""
    names = [name.strip() for name in backends.split(",") if name.strip()]
    local_source(source)
    with progress_bar() as progress:
        from gemma_hub.parity import parity as compare

        report = compare(
            source,
            backends=names,
            texts=text or None,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            witnesses=witnesses,
            progress=progress,
            device=device,
            seed=seed,
        )
    _print(report)
    for path, write in ((html, report.to_html), (json, report.to_json)):
        if path is not None:
            try:
                write(path)
            except OSError as error:
                raise InputError(f"{path} cannot be written: {error.strerror}.") from error
    if not report.passed:
        raise typer.Exit(1)


def _print(report: "ParityReport") -> None:
    console = out()
    if report.rows:
        title = f"{report.source}, {report.dtype}: error against float64 / rounding noise"
        show_table(console, f"{title} (worst element)", _layer_table(report))
    if report.tokens:
        show_table(console, "tokens against the float64 reference", _token_table(report))
    for run in report.backends:
        if run.error:
            console.print(Text.assemble((f"{run.name}: ", "bold red"), run.error), soft_wrap=True)
    word, style = ("PASSED", "bold green") if report.passed else ("FAILED", "bold red")
    console.print(Text.assemble((word, style), f"  {report.verdict}"), soft_wrap=True)


def _layer_table(report: "ParityReport") -> Table:
    names = [run.name for run in report.backends if not run.error]
    listed = table("place", "noise")
    listed.columns[1].justify = "right"
    for name in names:
        listed.add_column(name, justify="right")
    for row in report.rows:
        cells = [_cell(row.cells[name]) for name in names]
        listed.add_row(row.place, f"{row.noise:.1e}", *cells)
    return listed


def _cell(cell: "Cell") -> Text:
    style, mark = ("green", "") if cell.passed else ("bold red", "\u2717 ")
    return Text.assemble(
        (f"{mark}{_number(cell.ratio)}", style), (f" ({_number(cell.worst_ratio)})", "dim")
    )


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def _token_table(report: "ParityReport") -> Table:
    listed = table("text")
    for kind in ("greedy", "sampled"):
        for run in report.backends:
            if not run.error:
                listed.add_column(f"{run.name} {kind}", justify="center")
    for number, text in enumerate(report.texts):
        checks = {(c.kind, c.backend): c for c in report.tokens if c.text == number}
        cells = [
            Text(*_MARKS[checks[kind, run.name].verdict])
            for kind in ("greedy", "sampled")
            for run in report.backends
            if not run.error
        ]
        listed.add_row(_shortened(text.prompt), *cells)
    return listed


def _shortened(text: str, width: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "\u2026"
