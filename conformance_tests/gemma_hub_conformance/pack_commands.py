"""The commands `gemma-hub golden-pack` and `gemma-hub check-pack`."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

USAGE = 2


def golden_pack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Make this unit only, such as gqa-float32; may be given several times."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Other weights and inputs than the usual ones.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a pack that is there.")] = False,
) -> None:
    """Write small models with everything that is right about them, to test a port without Python.

    Exit codes: 0 written, 2 wrong usage, or the folder cannot be written.
    """
    # Imported here, so that `gemma-hub --help` loads nothing of the suite.
    from gemma_hub.cli.console import out, progress_bar, size
    from gemma_hub.errors import GemmaHubError
    from gemma_hub_conformance.packs import write_pack

    try:
        with progress_bar() as progress:
            nbytes = write_pack(
                folder, only or None, seed=seed, overwrite=overwrite, progress=progress
            )
    except GemmaHubError as error:
        _refuse(error)
    out().print(f"{folder}: {size(nbytes)}; README.md says how to read it", soft_wrap=True)


def check_pack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The golden pack.")],
    outputs: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUTS", help="Folder or safetensors file with what your program computed."
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Judge this unit only; may be given several times."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
) -> None:
    """Judge a program's outputs by a golden pack.

    Exit codes: 0 right, 1 wrong, 2 wrong usage or bad files, 5 too little was compared.
    """
    from gemma_hub.cli.console import out, progress_bar
    from gemma_hub.errors import GemmaHubError, InputError
    from gemma_hub_conformance.packs import check_pack as check

    try:
        with progress_bar() as progress:
            report = check(folder, outputs, only or (), progress=progress)
        report.print(out())
        if json is not None:
            try:
                json.write_text(report.to_json(), encoding="utf-8")
            except OSError as error:
                raise InputError(f"{json} cannot be written: {error.strerror}.") from error
    except GemmaHubError as error:
        _refuse(error)
    raise typer.Exit(report.exit_code)


def _refuse(error: Exception) -> NoReturn:
    from gemma_hub.cli.console import say_error

    say_error(str(error))
    raise typer.Exit(USAGE) from error
