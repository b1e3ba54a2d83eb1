"""`gemma-hub new-backend`: the distribution of a new backend, which passes from the start."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_hub.cli.console import out


def new_backend(
    name: Annotated[str, typer.Argument(help="What users will type: a lower-case identifier.")],
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="The folder to make; gemma-hub-NAME here if not given."),
    ] = None,
) -> None:
    """Write a plug-in with a backend in NumPy, which you replace by your framework."""
    from gemma_hub.new_backend import checked_name, distribution_name, render

    checked_name(name)  # before a folder is named after it
    folder = render(name, directory or Path(distribution_name(name)))
    console = out()
    console.print(f"{folder} has a backend {name!r} in plain NumPy. Next:", soft_wrap=True)
    console.print(f'  pip install -e "{folder}[test]"', soft_wrap=True)
    console.print(f"  gemma-hub conformance {name}", soft_wrap=True)
