"""Greedy tokens that the model chooses by itself, several steps in one call, in a queue."""

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from gemma_hub.generation.context import CachedContext
from gemma_hub.generation.settings import GenerationSettings

MOST_STEPS = 32
"""Steps of one call at most."""

MOST_SECONDS = 0.1
"""What one call may take, so that a stream stays smooth and Ctrl-C is heard."""


def is_plain(settings: GenerationSettings) -> bool:
    """Whether every token is the one with the largest logit, and nothing else is asked for."""
    return settings.temperature == 0 and not settings.has_rules and not settings.logprobs


class GreedyQueue:
    """What the model has chosen and nobody has taken yet, step by step.

    A call ends with the step at which a row chooses a stop id, so that only rows which end at
    something else, such as a text, leave steps behind that are not theirs any more.
    """

    def __init__(self, stops: Sequence[int]) -> None:
        """An empty queue.

        Args:
            stops: ids that end a row.
        """
        self._stops = stops
        self._steps: list[np.ndarray] = []  # the next one last
        self._size = 1  # of the next call

    def __bool__(self) -> bool:
        """Whether there is a step."""
        return bool(self._steps)

    def fill(self, context: CachedContext, ids: np.ndarray, running: np.ndarray, most: int) -> None:
        """Let the model take some steps; none are left before.

        Args:
            context: of the rows, which has read all but their last tokens.
            ids: (B,) the last token of each row.
            running: (B,) bool, the rows that go on.
            most: steps that every running row needs.
        """
        asked = min(self._size, most)
        start = perf_counter()
        chosen = context.greedy_steps(ids, running, asked, self._stops)
        seconds = perf_counter() - start
        self._steps = list(chosen.T[::-1])
        fitting = int(MOST_SECONDS * max(len(self._steps), 1) / seconds) if seconds else MOST_STEPS
        self._size = max(1, min(2 * self._size, fitting, MOST_STEPS))

    def take(self) -> np.ndarray:
        """(B,) int64 ids of the next step; only those of running rows count."""
        return self._steps.pop()

    def clear(self) -> None:
        """Forget the rest."""
        self._steps.clear()
