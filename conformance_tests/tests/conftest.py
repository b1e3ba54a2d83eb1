"""What the tests of the suite share."""

import pytest

from gemma_hub_conformance.oracle import Oracle


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """One set of reference and witness results for the whole session."""
    return Oracle()
