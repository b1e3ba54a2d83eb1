"""The command `gemma-hub conformance`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gemma_hub.errors import BackendNotFoundError, InputError, PluginError

USAGE, UNAVAILABLE = 2, 3


def conformance(
    name: Annotated[str, typer.Argument(help="The backend, as in `gemma-hub backends`.")],
    case: Annotated[
        list[str] | None, typer.Option(help="Run this case only; may be given several times.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
) -> None:
    """Test a backend against the float64 reference.

    Exit codes: 0 certified, 1 failed, 2 wrong usage, 3 backend unavailable, 5 too little ran.
    """
    # Imported here, so that `gemma-hub --help` loads nothing of the suite.
    from gemma_hub_conformance.engine import load_subject, run_conformance, select

    console, errors = Console(), Console(stderr=True)
    try:
        select(case or ())
        subject = load_subject(name)
    except (BackendNotFoundError, PluginError) as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(UNAVAILABLE) from error
    except InputError as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(USAGE) from error
    with console.status(f"Testing {name} ...") as status:
        report = run_conformance(
            subject, case or None, on_result=lambda result: status.update(f"{name}: {result.id}")
        )
    report.print(console)
    if json is not None:
        json.write_text(report.to_json(), encoding="utf-8")
    raise typer.Exit(report.exit_code)
