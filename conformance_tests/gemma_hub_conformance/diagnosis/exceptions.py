"""What it takes to make a backend raise: the features of the checkpoint, of the call, the input."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gemma_hub.errors import GemmaHubError
from gemma_hub_conformance.checkpoints import GQA, DesignedCheckpoint
from gemma_hub_conformance.diagnosis.crashes import Crash
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.recording import Observation
from gemma_hub_conformance.diagnosis.shrinking import shrink
from gemma_hub_conformance.diagnosis.watching import Seen

_INPUTS_TRIED = 12


@dataclass(frozen=True, slots=True)
class Trigger:
    """What makes a backend raise.

    Attributes:
        crash: the exception.
        seen: the shortest input that raises it; None if no input of the case does by itself, or
            none is needed.
        takes: what cannot be left out: values of the config and what the call asks for, in words.
        in_build: whether building the model raises it already.
    """

    crash: Crash
    seen: Seen | None = None
    takes: tuple[str, ...] = ()
    in_build: bool = False

    @property
    def text(self) -> str:
        """For a reader, several lines."""
        raised = f"Raised in {self.crash.at}"
        if not self.crash.own:
            raised += ", which is not the backend's own code: the case was given something else"
        lines = [f"{raised}."]
        if self.in_build:
            lines.append("Building the model raises it; no input is needed.")
        if self.takes:
            lines.append(f"It takes {', '.join(self.takes)}; without that nothing is raised.")
        elif self.seen is not None or self.in_build:
            lines.append(f"No feature of the checkpoint is needed: `{GQA.name}` raises it too.")
        else:
            lines.append("No call of this case raises it by itself.")
        return "\n".join(lines)


def find_trigger(prober: Prober, first: Observation) -> Trigger | None:
    """What makes the subject raise what `first` saw; None if that was no exception."""
    crash = first.crash
    if crash is None:
        return None
    for checkpoint in first.built[-1:]:  # the case ended at the exception
        if crash.is_like(prober.crash_in_build(checkpoint)):
            return _of_build(prober, crash, checkpoint)
    for seen in first.inputs[: -_INPUTS_TRIED - 1 : -1]:
        if crash.is_like(prober.crash(seen)):
            return _of_input(prober, crash, seen)
    return Trigger(crash)


def _of_build(prober: Prober, crash: Crash, checkpoint: DesignedCheckpoint) -> Trigger:
    takes = []
    for what, simpler in _simpler(checkpoint):
        plain = simpler(checkpoint)
        if plain is not None and crash.is_like(prober.crash_in_build(plain)):
            checkpoint = plain
        else:
            takes.append(what)
    return Trigger(crash, None, tuple(takes), in_build=True)


def _of_input(prober: Prober, crash: Crash, seen: Seen) -> Trigger:
    def raises(other: Seen) -> bool:
        return crash.is_like(prober.crash(other))

    takes = []
    for name in seen.asked:
        less = replace(seen, asked=tuple(each for each in seen.asked if each != name))
        if raises(less):
            seen = less
        else:
            takes.append(f"`{name}`")
    if seen.chunks is not None:
        whole = replace(seen, chunks=None)
        if raises(whole):
            seen = whole
        else:
            takes.append("a cache")
    for what, simpler in _simpler(seen.checkpoint):
        plain = simpler(seen.checkpoint)
        if plain is not None and raises(replace(seen, checkpoint=plain)):
            seen = replace(seen, checkpoint=plain)
        else:
            takes.append(what)
    if prober.dtype != "float32":
        single = Prober(prober.subject, "float32", prober.oracle)
        if not crash.is_like(single.crash(seen)):
            takes.append(f"dtype {prober.dtype!r}")
    return Trigger(crash, shrink(prober, seen, fails=raises), tuple(takes))


# -- checkpoints with less in them -----------------------------------------------------------------

Simpler = Callable[[DesignedCheckpoint], DesignedCheckpoint | None]


def _simpler(checkpoint: DesignedCheckpoint) -> Iterator[tuple[str, Simpler]]:
    """What sets `checkpoint` apart from the main one, and how to take it away."""
    if type(checkpoint) is not DesignedCheckpoint or checkpoint.storage != "memory":
        stored = "several files" if checkpoint.storage != "memory" else "the weights of the case"
        yield stored, partial(_changed, what="plain weights")
    if checkpoint.task != GQA.task:
        yield f"the task {checkpoint.task!r}", partial(_changed, what=GQA.task, task=GQA.task)
    for field in dataclasses.fields(checkpoint.config):
        value, main = (getattr(each.config, field.name) for each in (checkpoint, GQA))
        if value != main:
            yield (
                f"`{field.name}={value!r}`",
                partial(_changed, what=f"{GQA.name}'s {field.name}", **{field.name: main}),
            )


def _changed(
    checkpoint: DesignedCheckpoint, *, what: str, task: str | None = None, **config: Any
) -> DesignedCheckpoint | None:
    """`checkpoint` with other values and weights of its own; None if there is no such model."""
    try:
        changed = dataclasses.replace(checkpoint.config, **config)
    except GemmaHubError:
        return None
    name = f"{checkpoint.name} + {what}"
    return DesignedCheckpoint(name, checkpoint.purpose, changed, task=task or checkpoint.task)
