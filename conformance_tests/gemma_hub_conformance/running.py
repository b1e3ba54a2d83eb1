"""The steps of `gemma-hub conformance` that take time, with their progress on the terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gemma_hub.cli.console import err, out, progress_bar
from gemma_hub_conformance.ahead import truths_ahead
from gemma_hub_conformance.diagnosis import Diagnosis, diagnose
from gemma_hub_conformance.distances import measure_distances
from gemma_hub_conformance.engine import run_conformance, select
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import CaseResult, Distance, Report
from gemma_hub_conformance.spec import Subject
from gemma_hub_conformance.waivers import Waiver


def run_cases(
    subject: Subject,
    oracle: Oracle,
    ids: list[str] | None,
    profile: str,
    seed: int,
    waivers: tuple[Waiver, ...],
) -> Report:
    """`run_conformance` under a progress bar."""
    chosen = [case.id for case in select(ids, profile)]
    total = len(chosen)
    with progress_bar() as progress, truths_ahead(chosen, seed, oracle):
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


def compare_backends(
    subject: Subject, others: Sequence[Subject], oracle: Oracle, seed: int
) -> tuple[Distance, ...]:
    """`measure_distances` of them all; none if there are no others."""
    if not others:
        return ()
    with _status("comparing backends") as say:
        return measure_distances([subject, *others], oracle, seed=seed, progress=say)


def find_causes(subject: Subject, report: Report, oracle: Oracle) -> tuple[Diagnosis, ...]:
    """What the diagnosis finds, printed. A backend may break anything, also this."""
    try:
        with _status("looking for the bug") as say:
            causes = diagnose(subject, report, oracle, progress=say)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - the verdict stands, whatever it does now
        err().print(f"The diagnosis broke off: {type(error).__name__}: {error}", soft_wrap=True)
        return ()
    for cause in causes:
        advice = "" if cause.advice in cause.text else f"{cause.advice}\n"
        out().print(f"\n{advice}{cause.text}", soft_wrap=True)
    return causes


@contextmanager
def _status(at_first: str) -> Iterator[Callable[[str], None] | None]:
    console = err()
    if not console.is_terminal:
        yield None
        return
    with console.status(at_first) as status:
        yield status.update
