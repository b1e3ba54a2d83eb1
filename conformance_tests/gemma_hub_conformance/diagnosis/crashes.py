"""An exception that a backend raised: where in its own code."""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from gemma_hub_conformance.spec import Subject


@dataclass(frozen=True, slots=True)
class Crash:
    """An exception.

    Attributes:
        kind: name of its class.
        message: what it says.
        file: the innermost file of the backend's own package that it came through, from the
            package on; of the last file at all if the backend's has no part in it.
        line: in that file.
        function: in that file.
        own: whether the file is in the backend's package.
    """

    kind: str
    message: str
    file: str
    line: int
    function: str
    own: bool

    @property
    def text(self) -> str:
        """The exception as Python shows it."""
        return f"{self.kind}: {self.message}"

    @property
    def at(self) -> str:
        """The place, for a reader."""
        return f"{self.file}, line {self.line}, in `{self.function}`"

    def is_like(self, other: "Crash | None") -> bool:
        """Whether both are one exception from one place; the numbers in the message may differ."""
        return other is not None and (self.kind, self.file, self.line) == (
            other.kind,
            other.file,
            other.line,
        )


def crash_of(error: BaseException, subject: Subject) -> Crash:
    """Where `error` was raised, seen from the backend of `subject`."""
    frames = list(_frames(error.__traceback__))
    own = [(frame, line) for frame, line in frames if _module(frame) in _packages(subject.backend)]
    kind, message = type(error).__name__, " ".join(str(error).split())
    if not frames:  # made by hand, never raised
        return Crash(kind, message, "", 0, "", False)
    frame, line = own[-1] if own else frames[-1]
    return Crash(kind, message, _file(frame), line, frame.f_code.co_name, bool(own))


def _frames(start: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """Every frame that the exception came through, the innermost last."""
    yield from traceback.walk_tb(start)


def _packages(backend: Any) -> frozenset[str]:
    """Top-level names of the modules of the backend's class and of the classes that it holds."""
    kinds = [x if isinstance(x, type) else type(x) for x in (backend, *_parts(backend))]
    return frozenset(kind.__module__.partition(".")[0] for kind in kinds) - {"builtins"}


def _parts(backend: Any) -> list[Any]:
    """What its attributes hold, such as the class of its models."""
    names = getattr(type(backend), "__slots__", None) or getattr(backend, "__dict__", {})
    return [getattr(backend, name, None) for name in ([names] if isinstance(names, str) else names)]


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _file(frame: FrameType) -> str:
    """The file from its package on, so that it is the same on every machine."""
    path = Path(frame.f_code.co_filename)
    depth = len(str(frame.f_globals.get("__name__", "")).split("."))
    if path.name == "__init__.py":
        depth += 1
    return "/".join(path.parts[-depth:])
