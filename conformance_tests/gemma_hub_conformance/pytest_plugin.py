"""The suite under pytest: `pytest --pyargs gemma_hub_conformance --gemma-backend NAME`.

Loaded by every pytest run of an environment that has this distribution, so it imports nothing but
pytest and the option has a name of its own (two plug-ins with one option break all of pytest).
"""

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gemma_hub_conformance.report import CaseResult

ENVIRONMENT_VARIABLE = "GEMMA_HUB_TEST_BACKEND"
RESULTS: "pytest.StashKey[list[CaseResult]]" = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --gemma-backend and what `gemma-hub conformance` has beside it."""
    group = parser.getgroup("gemma_hub", "gemma_hub conformance")
    group.addoption(
        "--gemma-backend",
        metavar="NAME",
        default=None,
        help="backend that gemma_hub_conformance tests; "
        f"the environment variable {ENVIRONMENT_VARIABLE} if absent",
    )
    group.addoption(
        "--gemma-profile", metavar="NAME", default="full", help="core, bf16, training or full"
    )
    group.addoption(
        "--gemma-seed",
        metavar="N",
        type=int,
        default=0,
        help="draw other weights, inputs and roundings than those of seed 0",
    )
    group.addoption(
        "--gemma-device",
        metavar="DEVICE",
        default="auto",
        help="build every model on this device of the backend",
    )
    group.addoption(
        "--gemma-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="option of the backend; may be given several times",
    )
    group.addoption(
        "--gemma-dtype",
        metavar="TYPE",
        action="append",
        default=[],
        help="type that the backend has with these options, if it is not all that it claims; it "
        "must refuse the others; may be given several times",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the results."""
    config.stash[RESULTS] = []


def chosen_backend(config: pytest.Config) -> str | None:
    """The backend that this run tests, or None."""
    option: str | None = config.getoption("gemma_backend")
    return option or os.environ.get(ENVIRONMENT_VARIABLE) or None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Do not let a run that asked for a backend pass when no case of the suite ran."""
    config = session.config
    asked = config.getoption("gemma_backend") and not config.getoption("collectonly")
    if asked and not config.stash[RESULTS] and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many cases of the suite had which verdict; the unsupported ones by name."""
    config = terminalreporter.config
    results = config.stash[RESULTS]
    if results:
        from gemma_hub_conformance.report import tested

        subject = tested(
            chosen_backend(config) or "",
            config.getoption("gemma_option"),
            config.getoption("gemma_dtype"),
        )
        verdicts = [str(result.verdict) for result in results]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
        terminalreporter.section(f"conformance of {subject}: {counts}")
        for result in results:
            if result.verdict == "unsupported":
                terminalreporter.line(f"{result.id}: {result.message}")
    elif config.getoption("gemma_backend"):
        terminalreporter.section("conformance: no case ran", red=True)
