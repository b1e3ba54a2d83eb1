"""The seed of a run, from which every weight, input and witness is drawn.

Seed 0 is the suite as it was calibrated. Any other gives fresh weights, tokens and witnesses of the
same design, so that a backend cannot have been made for the numbers of one run. The cases are
values that are shared by all runs, so the seed is not theirs: it is set around the whole run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gemma_hub.errors import InputError

_SEED: ContextVar[int] = ContextVar("seed of the run", default=0)


def current_seed() -> int:
    """The seed of the run that this is called in; 0 outside of one."""
    return _SEED.get()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it everything is drawn from `seed`.

    Raises:
        InputError: the seed is no integer from 0 up.
    """
    token = _SEED.set(checked_seed(seed))
    try:
        yield
    finally:
        _SEED.reset(token)


def checked_seed(seed: int) -> int:
    """`seed` itself.

    Raises:
        InputError: it is no integer from 0 up.
    """
    if type(seed) is not int or seed < 0:
        raise InputError(f"The seed is {seed!r}; expected an integer from 0 up.")
    return seed


def entropy(*key: int) -> list[int]:
    """What a random generator is made from: `key`, and the seed of a run that is not 0."""
    seed = current_seed()
    return [*key, seed] if seed else [*key]
