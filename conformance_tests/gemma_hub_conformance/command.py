"""The command `gemma-hub conformance`."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from gemma_hub_conformance.diagnosis import Diagnosis
    from gemma_hub_conformance.oracle import Oracle
    from gemma_hub_conformance.report import Report
    from gemma_hub_conformance.spec import Subject
    from gemma_hub_conformance.waivers import Waiver

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
    waivers: Annotated[
        Path | None, typer.Option(help="TOML file of failures that may be, each for a while.")
    ] = None,
    recheck: Annotated[
        Path | None,
        typer.Option(help="Run what this certificate.json is about again, with a fresh seed."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write JSON, JUnit, a badge, the certificate and a page to this folder."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    diagnose: Annotated[
        bool, typer.Option(help="After a failure, look for the bug and the layer.")
    ] = True,
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
    from gemma_hub_conformance.seeds import checked_seed
    from gemma_hub_conformance.waivers import read_waivers

    try:
        if recheck is not None:
            name, profile, seed = _rechecked(recheck, name)
        if name is None:
            raise InputError("Name a backend; `gemma-hub backends` lists those that there are.")
        select(case or None, profile)
        checked_seed(seed)
        allowed = read_waivers(waivers) if waivers else ()
        if report is not None:
            check_folder(report.expanduser().resolve())
        subject = load_subject(name)
    except (BackendNotFoundError, PluginError) as error:
        _refuse(error, UNAVAILABLE)
    except InputError as error:
        _refuse(error, USAGE)
    oracle = Oracle()
    found = _run(subject, oracle, case or None, profile, seed, allowed)
    found.print(out())
    causes = _causes(subject, found, oracle) if diagnose and found.failed else ()
    try:
        if json is not None:
            _write(json, found.to_json())
        if report is not None:
            write_reports(report, found, causes)
    except InputError as error:
        _refuse(error, USAGE)
    raise typer.Exit(found.exit_code)


def _rechecked(path: Path, name: str | None) -> tuple[str, str, int]:
    """Backend, profile and a fresh seed for the certificate at `path`."""
    from gemma_hub.cli.console import err
    from gemma_hub.errors import InputError
    from gemma_hub_conformance.reports import read_certificate

    certificate = read_certificate(path)
    if name not in (None, certificate.backend):
        raise InputError(f"{path} is about {certificate.backend!r}, not {name!r}.")
    for change in certificate.changes:
        err().print(f"Note: {change}.", soft_wrap=True)
    seed = secrets.randbelow(2**31)
    err().print(f"Seed {seed}; the certificate's was {certificate.seed}.")
    return certificate.backend, certificate.profile, seed


def _run(
    subject: "Subject",
    oracle: "Oracle",
    ids: list[str] | None,
    profile: str,
    seed: int,
    waivers: "tuple[Waiver, ...]",
) -> "Report":
    from gemma_hub.cli.console import progress_bar
    from gemma_hub_conformance.engine import run_conformance, select
    from gemma_hub_conformance.report import CaseResult

    total = len(select(ids, profile))
    with progress_bar() as progress:
        done = 0

        def show(result: CaseResult) -> None:
            nonlocal done
            done += 1
            if progress:
                progress(result.id, done, total)

        return run_conformance(
            subject,
            ids,
            profile=profile,
            seed=seed,
            waivers=waivers,
            oracle=oracle,
            on_result=show,
        )


def _causes(subject: "Subject", report: "Report", oracle: "Oracle") -> "tuple[Diagnosis, ...]":
    """What the diagnosis finds, printed. A backend may break anything, also this."""
    from gemma_hub.cli.console import err, out
    from gemma_hub_conformance.diagnosis import diagnose

    try:
        with _status() as say:
            causes = diagnose(subject, report, oracle, progress=say)
    except Exception as error:  # noqa: BLE001 - the verdict stands, whatever the backend does now
        err().print(f"The diagnosis broke off: {type(error).__name__}: {error}", soft_wrap=True)
        return ()
    for cause in causes:
        advice = "" if cause.advice in cause.text else f"{cause.advice}\n"
        out().print(f"\n{advice}{cause.text}", soft_wrap=True)
    return causes


@contextmanager
def _status() -> Iterator[Callable[[str], None] | None]:
    from gemma_hub.cli.console import err

    console = err()
    if not console.is_terminal:
        yield None
        return
    with console.status("looking for the bug") as status:
        yield status.update


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
