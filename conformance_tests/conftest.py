"""For this repository's own runs: the shipped suite is collected only when a run asks for it."""

from pathlib import Path

import pytest

from gemma_hub_conformance.pytest_plugin import chosen_backend

SUITE = Path(__file__).parent / "gemma_hub_conformance"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the suite out of `pytest` without arguments; tests/test_backends.py runs it there."""
    asked_for = chosen_backend(config) or any("gemma_hub_conformance" in arg for arg in config.args)
    return True if SUITE in (collection_path, *collection_path.parents) and not asked_for else None
