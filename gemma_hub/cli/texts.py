"""What `classify`, `tag` and `score` share: their arguments, how they load, and their JSON."""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_hub.cli.console import waiting, write
from gemma_hub.cli.sources import local_source

if TYPE_CHECKING:
    from gemma_hub.tasks.loaded_model import LoadedModel

Source = Annotated[str, typer.Argument(help="A checkpoint, an installed name, or a repository id.")]
Texts = Annotated[
    list[str], typer.Argument(help="Texts; - reads standard input, a text on each line.")
]
Backend = Annotated[
    str | None, typer.Option(help="Backend; see gemma-hub backends.", show_default="torch")
]
Dtype = Annotated[str, typer.Option(help="Compute type; auto is the checkpoint's own.")]
Device = Annotated[str, typer.Option(help="Device, in the framework's words.")]
Option = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Option of the backend: true, false, a number or a text; may be given several times.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object with every number.")]


def read_texts(texts: Iterable[str]) -> list[str]:
    """The texts, with the lines of standard input in the place of "-"."""
    read: list[str] = []
    for text in texts:
        read += [line.rstrip("\r\n") for line in sys.stdin] if text == "-" else [text]
    return read


def backend_options(given: Iterable[str] | None) -> dict[str, Any]:
    """The values of `--option`, by their names.

    Raises:
        BadParameter: there is no name or no value, or a name comes twice.
    """
    options: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"--option {text!r} is no NAME=VALUE, such as compile=true.")
        if name in options:
            raise typer.BadParameter(f"--option {name} is given twice.")
        options[name] = _option_value(value)
    return options


def _option_value(text: str) -> bool | int | str:
    if text in {"true", "false"}:
        return text == "true"
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def loaded(
    source: str,
    task: str,
    backend: str | None,
    dtype: str,
    device: str,
    options: Mapping[str, Any] | None = None,
) -> "LoadedModel":
    """The model of `source` for a task, behind a spinner."""
    path = local_source(source)
    with waiting(f"Loading {source}"):
        from gemma_hub.gemma import Gemma

        return Gemma.load(
            path,
            backend=backend,
            task=task,
            dtype=dtype,
            device=device,
            backend_options=options,
        )


def write_row(*cells: object) -> None:
    """One line of cells with tabs between them; tabs and line ends in a cell become spaces."""
    lines = (" ".join(str(cell).splitlines()) for cell in cells)
    write("\t".join(line.replace("\t", " ") for line in lines) + "\n")


def write_record(source: str, model: "LoadedModel", results: list[dict[str, Any]]) -> None:
    """One JSON object with the results and what made them."""
    record = {
        "source": source,
        "results": results,
        "backend": model.backend.name,
        "distribution": model.backend.distribution,
        "version": model.backend.version,
        "dtype": model.dtype,
        "device": model.device,
    }
    write(json.dumps(record, ensure_ascii=False, indent=2) + "\n")
