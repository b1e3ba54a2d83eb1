"""What of a process is shared by all that runs in it, and a library must leave as it was."""

import decimal
import gc
import hashlib
import locale
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

State = dict[str, str]
"""{what it is, in words: its value as text}."""


def snapshot() -> State:
    """The state of this process now; that of a framework only if it is imported."""
    state = _python() | _numpy()
    for framework, questions in _FRAMEWORKS.items():
        if module := sys.modules.get(framework):
            with suppress(AttributeError):  # it is being imported, and not all there
                state |= questions(module)
    return state


def changes(before: State, after: State) -> list[str]:
    """Every difference, in words."""
    return [
        f"{what} from {_short(before.get(what))} to {_short(after.get(what))}"
        for what in sorted(before.keys() | after.keys())
        if before.get(what) != after.get(what)
    ]


def _short(value: str | None) -> str:
    if value is None:
        return "unset"
    return value if len(value) <= 60 else f"{value[:57]}..."


def _python() -> State:
    umask = os.umask(0o077)
    os.umask(umask)
    root = logging.getLogger()
    return {
        "the working folder": str(os.getcwd()),  # noqa: PTH109 - as the process has it
        "the umask": oct(umask),
        "the locale": str(locale.setlocale(locale.LC_ALL)),
        "sys.path": repr(sys.path),
        "sys.stdin, stdout and stderr": repr((sys.stdin, sys.stdout, sys.stderr)),
        "sys.excepthook": repr(sys.excepthook),
        "sys.displayhook": repr(sys.displayhook),
        "sys.unraisablehook": repr(sys.unraisablehook),
        "threading.excepthook": repr(threading.excepthook),
        "the recursion limit": str(sys.getrecursionlimit()),
        "the switch interval": str(sys.getswitchinterval()),
        "the garbage collector": repr((gc.isenabled(), gc.get_threshold())),
        "the decimal context": repr(decimal.getcontext()),
        "random's state": _digest(random.getstate()),
        "the filters of warnings": repr(warnings.filters),
        "the root logger": repr((root.level, root.handlers, root.filters, root.manager.disable)),
        "the default timeout of sockets": repr(socket.getdefaulttimeout()),
        "the start method of processes": repr(multiprocessing.get_start_method(allow_none=True)),
        "threads that keep the process alive": repr(
            [each.name for each in threading.enumerate() if not each.daemon]
        ),
    } | {f"the handler of {each!r}": repr(signal.getsignal(each)) for each in _signals()}


def _signals() -> list[signal.Signals]:
    return [each for each in signal.Signals if each in signal.valid_signals()]


def _numpy() -> State:
    tiny = np.float32(1e-40) * np.float32(0.5)
    return {
        "numpy.geterr()": repr(np.geterr()),
        "numpy.geterrcall()": repr(np.geterrcall()),
        "numpy.get_printoptions()": repr(np.get_printoptions()),
        "numpy.getbufsize()": repr(np.getbufsize()),
        "numpy.random's state": _digest(np.random.get_state()),  # noqa: NPY002 - that of everybody
        # Some compilers' start-up code makes the processor round subnormal numbers to 0.
        "subnormal numbers": "kept" if tiny > 0 else "rounded to 0",
    }


def _digest(state: object) -> str:
    """A text in place of hundreds of numbers."""
    with np.printoptions(threshold=sys.maxsize):
        return hashlib.sha256(repr(state).encode()).hexdigest()[:12]


def _torch(torch: Any) -> State:
    questions = (
        "get_default_dtype",
        "get_default_device",
        "is_grad_enabled",
        "is_inference_mode_enabled",
        "are_deterministic_algorithms_enabled",
        "get_num_threads",
        "get_num_interop_threads",
        "get_float32_matmul_precision",
        "is_anomaly_enabled",
    )
    state = {
        f"torch.{name}()": str(getattr(torch, name)()) for name in questions if hasattr(torch, name)
    }
    state["torch.get_rng_state()"] = _digest(torch.get_rng_state().tolist())
    return state


def _jax(jax: Any) -> State:
    return {f"jax.config.{name}": repr(value) for name, value in jax.config.values.items()}


def _transformers(transformers: Any) -> State:
    return {"transformers.logging": str(transformers.logging.get_verbosity())}


_FRAMEWORKS: dict[str, Callable[[Any], State]] = {
    "torch": _torch,
    "jax": _jax,
    "transformers": _transformers,
}
"""Asked for only where a backend has imported them: the suite itself knows no framework."""
