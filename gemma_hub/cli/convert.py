"""`gemma-hub convert`: a checkpoint from any format to any other."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_hub.cli.console import err, out, progress_bar, show_table, size, table, write
from gemma_hub.cli.sources import local_source
from gemma_hub.hub import repository

if TYPE_CHECKING:
    from gemma_hub.config import GemmaConfig
    from gemma_hub.conversion import Conversion


def convert(
    source: Annotated[
        str, typer.Argument(help="A checkpoint: file, folder, installed name, or repository id.")
    ],
    target: Annotated[
        str | None, typer.Argument(help="The folder to make, or a file such as model.gguf.")
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="The format to write; 'gemma-hub formats' lists them.")
    ] = "huggingface",
    source_format: Annotated[
        str | None, typer.Option("--from", help="The format to read; found out if not given.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Round all weights to this type; says how many change.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="A config.json, or a preset such as gemma-2b, instead of the source's."),
    ] = None,
    pad_vocab_to: Annotated[
        int | None, typer.Option(help="Rows of the embedding in the file; those added are zero.")
    ] = None,
    max_shard_bytes: Annotated[
        int | None, typer.Option(help="Size above which weights go to several files.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Which of the format's own layouts.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be written; write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")
    ] = False,
    probe: Annotated[
        bool, typer.Option(help="Write the probe that 'gemma-hub verify' checks.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Write a checkpoint in another format; exit code 1 if the format cannot hold the model."""
    from gemma_hub.checkpoints.formats.interface import WriteOptions
    from gemma_hub.conversion import convert as run
    from gemma_hub.conversion import plan_conversion

    if target is None and not plan:
        raise typer.BadParameter("Give the folder to make, or --plan.", param_hint="TARGET")
    options = WriteOptions(
        max_shard_bytes=max_shard_bytes, pad_vocab_to=pad_vocab_to, layout=layout
    )
    given = _config(config)
    source = local_source(source)
    if plan or target is None:
        record = plan_conversion(
            source, to, dtype=dtype, source_format=source_format, config=given, options=options
        )
    else:
        with progress_bar() as bar:
            record = run(
                source,
                target,
                to,
                dtype=dtype,
                source_format=source_format,
                config=given,
                options=options,
                overwrite=overwrite,
                probe=probe,
                progress=bar and (lambda done, total: bar(_done(done, total), done, total)),
                probe_progress=bar and (lambda done, total: bar("making the probe", done, total)),
            )
    if as_json:
        write(json.dumps(record.to_dict(), ensure_ascii=False, indent=2) + "\n")
    else:
        _print(record, target, tensors=plan)
    if record.objections:
        raise typer.Exit(1)


def _config(given: str | None) -> "GemmaConfig | None":
    """The config in a file, a folder or a repository, or of a preset."""
    from gemma_hub.config import GemmaConfig

    if given is None:
        return None
    if Path(given).expanduser().exists() or repository(given):
        return GemmaConfig.from_pretrained(given)
    return GemmaConfig.preset(given)


def _done(done: int, total: int) -> str:
    return f"{size(done)} of {size(total)}"


def _print(record: "Conversion", target: str | None, tensors: bool) -> None:
    from gemma_hub.probe import PROBE_FILE

    console = out()
    if tensors and record.tensors:
        listed = table("tensor", "shape", "type")
        for name, (shape, dtype) in record.tensors.items():
            listed.add_row(name, " x ".join(map(str, shape)), dtype)
        show_table(console, f"{record.target_format} tensors", listed)
    facts = table("", "")
    facts.add_row("source", f"{record.source} ({record.source_format})")
    facts.add_row("target", f"{target or 'nowhere yet'} ({record.target_format})")
    facts.add_row("task", record.task)
    facts.add_row("tensors", f"{len(record.tensors)}, {size(record.nbytes)}")
    facts.add_row("files beside them", ", ".join(record.files) or "none")
    if target is not None and not tensors:
        written = (Path(target).expanduser() / PROBE_FILE).is_file()
        facts.add_row("probe", PROBE_FILE if written else "none")
    show_table(console, "plan" if tensors else "converted", facts)
    for name, reason in record.dropped.items():
        console.print(f"dropped: {name} ({reason})", soft_wrap=True)
    for name, count in record.changed.items():
        console.print(f"changed: {count:,} values of {name}", soft_wrap=True)
    if record.changed:
        console.print(f"changed: {sum(record.changed.values()):,} values in all", soft_wrap=True)
    for note in record.notes:
        err().print(f"note: {note}", soft_wrap=True)
    for reason in record.objections:
        err().print(f"cannot be written: {reason}", soft_wrap=True)
