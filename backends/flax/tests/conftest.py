"""What the tests of this backend share."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What was compiled since the test began, one entry each."""
    seen: list[str] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED and watching:
            seen.append(event)

    watching = True
    jax.monitoring.register_event_duration_secs_listener(note)
    yield seen
    watching = False
