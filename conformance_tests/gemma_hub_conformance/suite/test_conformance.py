"""One test for each case, on the backend that --gemma-backend names.

A backend that is missing is an error, and so is running this file without naming one: a
conformance suite that skips says nothing.
"""

import pytest
import typer

from gemma_hub.cli.texts import backend_options
from gemma_hub.errors import GemmaHubError
from gemma_hub_conformance.engine import load_subject, run_case, select
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.pytest_plugin import ENVIRONMENT_VARIABLE, RESULTS, chosen_backend
from gemma_hub_conformance.report import Verdict
from gemma_hub_conformance.seeds import checked_seed, seeded
from gemma_hub_conformance.spec import CaseSpec, Subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case, once it is certain that there is a backend."""
    name = chosen_backend(metafunc.config)
    if name is None:
        raise pytest.Collector.CollectError(
            "The conformance suite needs a backend: pass --gemma-backend NAME or set "
            f"{ENVIRONMENT_VARIABLE}."
        )
    try:
        checked_seed(metafunc.config.getoption("gemma_seed"))
        cases = select(profile=metafunc.config.getoption("gemma_profile"))
        subject = load_subject(
            name,
            device=metafunc.config.getoption("gemma_device"),
            extra=backend_options(metafunc.config.getoption("gemma_option")),
            dtypes=metafunc.config.getoption("gemma_dtype"),
        )
    except (GemmaHubError, typer.BadParameter) as error:
        raise pytest.Collector.CollectError(str(error)) from error
    oracle = Oracle()
    metafunc.parametrize(
        ("case", "subject", "oracle"),
        [(case, subject, oracle) for case in cases],
        ids=[case.id for case in cases],
    )


def test_case(
    case: CaseSpec, subject: Subject, oracle: Oracle, pytestconfig: pytest.Config
) -> None:
    with seeded(pytestconfig.getoption("gemma_seed")):
        result = run_case(case, subject, oracle)
    pytestconfig.stash[RESULTS].append(result)
    if result.verdict in (Verdict.FAIL, Verdict.ERROR):
        pytest.fail(f"{result.id}: {result.message}", pytrace=False)
