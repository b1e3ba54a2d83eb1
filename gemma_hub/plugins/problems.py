"""What went wrong with a plug-in, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal[
    "metadata",  # what pip wrote about the distribution, or an environment variable
    "import",  # the entry point's module
    "hooks",  # the hook functions: their signatures, and calling them
    "specs",  # what the hooks returned
    "names",  # two distributions claim one name
    "api version",  # written for a plug-in contract that this core does not speak
    "requires",  # a distribution that the backend needs is missing
    "factory",  # the class of the backend or of the checkpoint format
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with one plug-in.

    Attributes:
        distribution: name of the installed distribution, as pip lists it; empty if no one's.
        version: its version.
        entry_point: name of the entry point in the group `gemma_hub`.
        phase: where it went wrong.
        cause: what is wrong.
        remedy: what to do.
    """

    distribution: str
    version: str
    entry_point: str
    phase: Phase
    cause: str
    remedy: str


class PluginFailure(Exception):
    """A plug-in failed a step. Never leaves this package: it becomes a `Problem`.

    Attributes:
        phase: where it went wrong.
        cause: what is wrong.
        remedy: what to do; empty for the general advice.
    """

    def __init__(self, phase: Phase, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.phase: Phase = phase
        self.cause = cause
        self.remedy = remedy


def in_words(error: BaseException) -> str:
    """`ValueError: text` of an exception, or its type alone where it has no text."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  # a plug-in's exception may fail even at this
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
