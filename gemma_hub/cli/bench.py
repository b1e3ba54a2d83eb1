"""`gemma-hub bench`: how fast generation is, against other programs and the machine's limits."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_hub.cli import texts
from gemma_hub.cli.console import out, progress_bar, show_table, table
from gemma_hub.cli.files import checked_file, write_text
from gemma_hub.errors import InputError

if TYPE_CHECKING:
    from gemma_hub.bench.report import BenchReport


def _file(what: str) -> Any:
    return typer.Option(help=what, dir_okay=False, callback=checked_file)


def bench(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend; may be given again.", show_default="torch, flax"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights of a shape: small, 2b or 7b.", show_default="small"),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint folder instead of random weights.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Compute type; may be given again.", show_default="bfloat16"),
    ] = None,
    device: Annotated[str, typer.Option(help="Of the backends, in their words.")] = "auto",
    option: texts.Option = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Rows to decode at once; may be given again.", show_default="1, 8"),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt of prefill.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens to decode after the first.")] = 64,
    rounds: Annotated[int, typer.Option(help="Processes for each configuration.")] = 3,
    repeats: Annotated[int, typer.Option(help="Timed runs in each process.")] = 3,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Another program to measure; may be given again.", show_default="none"),
    ] = None,
    peers_dir: Annotated[
        Path, typer.Option(help="Folder with the scripts of peers, and of limits.")
    ] = Path("bench/peers"),
    cache: Annotated[
        Path | None,
        typer.Option(help="Where random checkpoints and environments of peers are kept."),
    ] = None,
    json: Annotated[Path | None, _file("Write every sample here.")] = None,
    markdown: Annotated[Path | None, _file("Write the table here.")] = None,
    plot: Annotated[Path | None, _file("Write an SVG plot of the ratios here.")] = None,
) -> None:
    """Measure load time, memory, first token, prefill and decoding; exit code 1 if one failed."""
    from gemma_hub.bench.benchmark import run_bench
    from gemma_hub.bench.plot import plot as draw
    from gemma_hub.bench.running import Settings

    if shape is not None and model is not None:
        raise InputError("--shape and --model are two ways to say the model; give one of them.")
    settings = Settings(
        dtypes=tuple(dtype or ("bfloat16",)),
        device=device,
        batches=tuple(batch or (1, 8)),
        prompt=prompt,
        new=new,
        rounds=rounds,
        repeats=repeats,
        backend_options=texts.backend_options(option),
    )
    with progress_bar() as progress:
        report = run_bench(
            settings,
            shape=shape or "small",
            model=model,
            backends=backend or ["torch", "flax"],
            peers=peer or [],
            peers_dir=peers_dir,
            cache=cache,
            progress=progress,
        )
    _print(report)
    written = ((json, report.to_json), (markdown, report.to_markdown), (plot, lambda: draw(report)))
    for path, content in written:
        if path is not None:
            write_text(path, content())
    if any(subject.error for subject in report.measured()):
        raise typer.Exit(1)


def _print(report: "BenchReport") -> None:
    header, *rows = report.table()
    listed = table(*header)
    for row in rows:
        listed.add_row(*row)
    title = f"{report.model}: median [least, most] fraction of the machine ×ratio to the first"
    show_table(out(), title, listed)
    for note in report.notes():
        out().print(note, soft_wrap=True)
