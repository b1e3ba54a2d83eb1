"""The command `gemma-hub conformance`."""

import dataclasses
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gemma_hub.cli.texts import Option, backend_options

if TYPE_CHECKING:
    from gemma_hub_conformance.spec import Subject

USAGE, UNAVAILABLE = 2, 3


def conformance(
    name: Annotated[
        str | None, typer.Argument(help="The backend, as in `gemma-hub backends`.")
    ] = None,
    profile: Annotated[str, typer.Option(help="core, bf16, training or full.")] = "full",
    case: Annotated[
        list[str] | None, typer.Option(help="Run this case only; may be given several times.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Draw other weights, inputs and roundings than those of seed 0.")
    ] = 0,
    device: Annotated[
        str, typer.Option(help="Build every model on this device of the backend.")
    ] = "auto",
    option: Option = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="A type that the backend has with these options, if it is not all that it claims; "
            "it must refuse the others. May be given several times."
        ),
    ] = None,
    waivers: Annotated[
        Path | None, typer.Option(help="TOML file of failures that may be, each for a while.")
    ] = None,
    recheck: Annotated[
        Path | None,
        typer.Option(help="Run what this certificate.json is about again, with a fresh seed."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Measure how far this backend is from it; may be given several times."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write JSON, JUnit, a badge, the certificate and a page to this folder."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    diagnose: Annotated[
        bool, typer.Option(help="After a failure, look for the bug and the layer.")
    ] = True,
    explain: Annotated[
        str | None,
        typer.Option(help="Say what this case checks, why, and which bugs it is for; run nothing."),
    ] = None,
) -> None:
    """Test a backend against the float64 reference.

    Exit codes: 0 certified, 1 failed, 2 wrong usage, 3 backend unavailable, 4 certified but for
    what is waived, 5 too little ran.
    """
    # Imported here, so that `gemma-hub --help` loads nothing of the suite.
    from gemma_hub.cli.console import out
    from gemma_hub.errors import BackendNotFoundError, InputError, PluginError
    from gemma_hub_conformance.engine import load_subject, select
    from gemma_hub_conformance.oracle import Oracle
    from gemma_hub_conformance.reports.writing import check_folder, write_reports
    from gemma_hub_conformance.running import compare_backends, find_causes, run_cases
    from gemma_hub_conformance.seeds import checked_seed
    from gemma_hub_conformance.waivers import read_waivers

    try:
        if explain is not None:
            out().print(_explained(explain), soft_wrap=True)
            return
        if recheck is not None:
            name, profile, seed, option, dtype = _rechecked(recheck, name, option, dtype)
        if name is None:
            raise InputError("Name a backend; `gemma-hub backends` lists those that there are.")
        select(case or None, profile)
        checked_seed(seed)
        allowed = read_waivers(waivers) if waivers else ()
        if report is not None:
            check_folder(report.expanduser().resolve())
        options = backend_options(option)
        subject = load_subject(name, device=device, extra=options, dtypes=dtype or ())
        others = _others(subject, compare or [])
    except (BackendNotFoundError, PluginError) as error:
        _refuse(error, UNAVAILABLE)
    except InputError as error:
        _refuse(error, USAGE)
    oracle = Oracle()
    found = run_cases(subject, oracle, case or None, profile, seed, allowed)
    distances = compare_backends(subject, others, oracle, seed)
    found = dataclasses.replace(found, distances=distances)
    found.print(out())
    causes = find_causes(subject, found, oracle) if diagnose and found.failed else ()
    try:
        if json is not None:
            _write(json, found.to_json(causes))
        if report is not None:
            write_reports(report, found, causes)
    except InputError as error:
        _refuse(error, USAGE)
    raise typer.Exit(found.exit_code)


def _explained(id_: str) -> str:
    """What the documentation says about a case."""
    from gemma_hub_conformance.engine import select
    from gemma_hub_conformance.explain import explanation

    (case,) = select([id_])
    found = explanation(case.id)
    bugs = "".join(f"\n  - {bug}" for bug in found.bugs)
    text = f"{case.id}\n\n{found.what}\n\n{found.why}"
    return f"{text}\n\nBugs that it finds:{bugs}" if bugs else text


def _others(subject: "Subject", compared: list[str]) -> "list[Subject]":
    """The backends to compare `subject` with, each once, under whatever name it is asked for."""
    from gemma_hub.errors import InputError
    from gemma_hub_conformance.engine import load_subject

    others = {other.name: other for other in map(load_subject, compared)}
    if subject.name in others:
        raise InputError(f"--compare {subject.name} is the backend under test; name another one.")
    return list(others.values())


def _rechecked(
    path: Path, name: str | None, option: list[str] | None, dtype: list[str] | None
) -> tuple[str, str, int, list[str], list[str]]:
    """Backend, profile, a fresh seed, options and types for the certificate at `path`."""
    from gemma_hub.cli.console import err
    from gemma_hub.errors import InputError
    from gemma_hub_conformance.reports import read_certificate

    certificate = read_certificate(path)
    if name not in (None, certificate.backend):
        raise InputError(f"{path} is about {certificate.backend!r}, not {name!r}.")
    if option or dtype:
        raise InputError("--recheck takes options and types from the certificate; name none.")
    for change in certificate.changes:
        err().print(f"Note: {change}.", soft_wrap=True)
    seed = secrets.randbelow(2**31)
    err().print(f"Seed {seed}; the certificate's was {certificate.seed}.")
    options, dtypes = list(certificate.options), list(certificate.dtypes)
    return certificate.backend, certificate.profile, seed, options, dtypes


def _write(path: Path, text: str) -> None:
    from gemma_hub.errors import InputError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}).") from error


def _refuse(error: Exception, code: int) -> NoReturn:
    from gemma_hub.cli.console import say_error

    say_error(str(error))
    raise typer.Exit(code) from error
