"""`gemma-hub inspect`: what a checkpoint folder holds and what is wrong with it."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gemma_hub.cli.console import out, progress_bar, show_table, size, table, write
from gemma_hub.cli.sources import local_source

if TYPE_CHECKING:
    from gemma_hub.checkpoints import Description


def inspect(
    path: Annotated[
        str, typer.Argument(help="A checkpoint: file, folder, installed name, or repository id.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    hashes: Annotated[
        bool, typer.Option("--hashes", help="List every tensor with its SHA-256; reads them all.")
    ] = False,
) -> None:
    """Describe a checkpoint without loading it; exit code 1 if something is wrong with it."""
    from gemma_hub.conversion.describe import describe, tensor_hashes, with_hashes

    path = local_source(path)
    description = describe(path)
    if hashes and not description.problems:
        with progress_bar() as bar:
            found = tensor_hashes(
                path, bar and (lambda done, total: bar(f"{size(done)} read", done, total))
            )
        description = with_hashes(description, found)
    tensors = tensors or hashes
    if as_json:
        record = description.to_dict()
        if not tensors:
            del record["tensors"]
        write(json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    else:
        _print(description, tensors)
    if description.problems:
        raise typer.Exit(1)


def _print(description: "Description", tensors: bool) -> None:
    console = out()
    facts = table("config", "")
    facts.add_row("format", description.format)
    facts.add_row("task", description.task)
    facts.add_row("parameters", f"{description.num_parameters:,}")
    facts.add_row("type", description.dtype or "unknown")
    facts.add_row("tensors", str(len(description.tensors)))
    facts.add_row("end of text", ", ".join(map(str, description.eos_token_ids)) or "no id")
    for name, value in (description.config or {}).items():
        facts.add_row(name, json.dumps(value))
    if description.files:
        show_table(console, description.path, facts)
    files = table("file", "size")
    files.columns[1].justify = "right"
    for file in description.files:
        files.add_row(file.name, size(file.nbytes))
    if description.files:
        show_table(console, "files", files)
    if tensors:
        listed = table("tensor", "shape", "type", "size", "file", "SHA-256")
        for tensor in description.tensors:
            shape = " x ".join(map(str, tensor.shape))
            listed.add_row(
                tensor.name,
                shape,
                tensor.dtype,
                size(tensor.nbytes),
                tensor.file,
                tensor.sha256 or "not read",
            )
        show_table(console, "tensors", listed)
    for note in description.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    for problem in description.problems:
        console.print(Text.assemble(("problem: ", "bold red"), problem), soft_wrap=True)
    if not description.problems:
        console.print("No problems.", style="green")
