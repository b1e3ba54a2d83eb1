"""The suite under pytest: `pytest --pyargs gemma_hub_conformance --gemma-backend NAME`.

Loaded by every pytest run of an environment that has this distribution, so it imports nothing but
pytest and the option has a name of its own (two plug-ins with one option break all of pytest).
"""

import os

import pytest

ENVIRONMENT_VARIABLE = "GEMMA_HUB_TEST_BACKEND"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --gemma-backend."""
    group = parser.getgroup("gemma_hub", "gemma_hub conformance")
    group.addoption(
        "--gemma-backend",
        metavar="NAME",
        default=None,
        help="backend that gemma_hub_conformance tests; "
        f"the environment variable {ENVIRONMENT_VARIABLE} if absent",
    )


def chosen_backend(config: pytest.Config) -> str | None:
    """The backend that this run tests, or None."""
    option: str | None = config.getoption("gemma_backend")
    return option or os.environ.get(ENVIRONMENT_VARIABLE) or None
