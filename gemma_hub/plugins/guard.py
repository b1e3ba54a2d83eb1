"""Run a plug-in's code so that it cannot stop the caller: every exception caught, time limited."""

import math
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

from gemma_hub.plugins.problems import Phase, PluginFailure, Problem, in_words

TIMEOUT_VARIABLE = "GEMMA_HUB_PLUGIN_TIMEOUT"
DEFAULT_TIMEOUT = 5.0

T = TypeVar("T")


def timeout_from_environment() -> tuple[float, list[Problem]]:
    """Seconds that each step of a plug-in may take, and what is wrong with the user's setting."""
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    if not text:
        return DEFAULT_TIMEOUT, []
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if 0 < seconds < threading.TIMEOUT_MAX:
        return seconds, []
    wrong = Problem(
        distribution="",
        version="",
        entry_point="",
        phase="metadata",
        cause=f"{TIMEOUT_VARIABLE} is {text!r}; expected a positive number of seconds",
        remedy=f"Set it to a number, or unset it. {DEFAULT_TIMEOUT:g} s is used.",
    )
    return DEFAULT_TIMEOUT, [wrong]


def call_guarded(function: Callable[[], T], phase: Phase, what: str, limit: float) -> T:
    """`function()`, run in a thread that is left behind if it takes longer than `limit` seconds.

    A thread, because Python cannot interrupt an import. KeyboardInterrupt is the one exception
    that passes through.

    Raises:
        PluginFailure: it raised anything else, SystemExit included (chained), or took too long.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  # SystemExit and Rust panics are no Exception
            errors.append(error)

    thread = threading.Thread(target=run, name=f"gemma_hub: {what}", daemon=True)
    thread.start()
    thread.join(limit)
    if results:
        return results[0]
    if not errors:
        raise PluginFailure(phase, f"{what} did not finish within {limit:g} s{_place(thread)}")
    error = errors[0]
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, PluginFailure):
        raise error
    raise PluginFailure(phase, f"{what} failed: {in_words(error)}") from error


def _place(thread: threading.Thread) -> str:
    """Where a thread is now, in words."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return ""
    last = traceback.extract_stack(frame)[-1]
    return f"; it was at {last.filename}:{last.lineno}"
