"""A time limit on the code of others, which may sleep or loop for ever."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Never


class TimedOut(BaseException):
    """The time is over. No `Exception`, so that code which catches those does not catch this."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """What runs within it is broken off after so many seconds.

    Only in the main thread of a system that has such signals, where nobody else's alarm is set, and
    only between two steps of Python: a call into C that does not return is not broken off.

    Raises:
        TimedOut: the time is over.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer") or any(signal.getitimer(signal.ITIMER_REAL)):
        yield
        return

    def stop(_: int, __: FrameType | None) -> Never:
        raise TimedOut(f"did not finish within {seconds:g} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, earlier)
