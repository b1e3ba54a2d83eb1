"""Many prompts, one after another: where a row ends, the next prompt takes its place."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import GemmaHubError, InputError
from gemma_hub.generation.choosing import Ends, NewToken
from gemma_hub.generation.loop import Batch, GeneratedIds, joined
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.prompt_checks import checked_prompt
from gemma_hub.generation.rules import Row, check_ids
from gemma_hub.generation.settings import GenerationSettings

Progress = Callable[[int, int | None], None]
"""(results that are handed out, results in all or None where that is unknown)."""

_Result = TypeVar("_Result")

LOOK_AHEAD = 4
"""Batches of rows that may have begun and are not handed out yet."""

_SHARE = 4  # prompts are read once a quarter of the batch is free: each time copies the batch


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """One row that has ended.

    Attributes:
        row: its index among all rows.
        prompt: (T,) int64 ids that it began with.
        result: what came after them.
    """

    row: int
    prompt: np.ndarray
    result: GeneratedIds


def generate_many_ids(
    model: Model,
    config: GemmaConfig,
    prompts: Iterable[Sequence[int]],
    settings: GenerationSettings,
    *,
    batch_size: int,
    ends: Ends | None = None,
    prefix: Prefix | None = None,
) -> Iterator[FinishedRow]:
    """The continuations in the order of the prompts, each with the tokens of `generate_ids`.

    Rows run together, `batch_size` at a time. The prompts may be endless: they are read as rows
    begin, and at most `LOOK_AHEAD` batches of rows have begun and are not handed out yet. A backend
    whose rows cannot be edited runs batch after batch.

    Args:
        model: any backend's.
        config: the model's.
        prompts: token ids without padding, read as they are needed.
        settings: as for `stream_ids`.
        batch_size: rows that run at once.
        ends: ends rows at more than the stop ids.
        prefix: what all prompts begin with, which `model` has read already.

    Raises:
        InputError: a setting is wrong, or the prefix is another model's: in the call. A prompt is
            wrong: in its place, after the results of all prompts before it.
        CapacityError: a prompt needs more positions than the model has; in its place.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected an integer from 1 up.")
    if settings.num_beams > 1 or settings.draft is not None or settings.prompt_lookup is not None:
        raise InputError(
            "num_beams, draft and prompt_lookup are no settings of many prompts, whose rows come "
            "and go; leave them out, or give the prompts to generate as a list."
        )
    if prefix is not None:
        prefix.check_model(model)
    check_ids(settings, config.vocab_size)
    waiting = _Waiting(prompts, config, settings, prefix)
    batch = Batch(model, config, settings, ends, prefix, rounds_up=True)
    return _finished(batch, waiting, batch_size)


def _finished(batch: Batch, waiting: "_Waiting", batch_size: int) -> Iterator[FinishedRow]:
    running: dict[int, tuple[Row, list[NewToken]]] = {}
    ended: dict[int, FinishedRow] = {}
    handed_out = 0

    def places() -> int:
        """Rows that are to begin now."""
        free = batch_size - batch.num_running
        if batch.num_running and (not batch.can_change or free < max(1, batch_size // _SHARE)):
            return 0
        ahead = waiting.num_taken - handed_out
        return 0 if waiting.is_empty else min(free, LOOK_AHEAD * batch_size - ahead)

    while True:
        if rows := waiting.take(places()):
            running |= {row.index: (row, []) for row in rows}
            batch.admit(rows)
        if not batch.num_running:
            break
        for token in batch.choose():
            row, tokens = running[token.row]
            tokens.append(token)
            if token.finish_reason is not None:
                del running[row.index]
                ended[row.index] = FinishedRow(row.index, row.prompt, joined(tokens))
        while handed_out in ended:
            yield ended.pop(handed_out)
            handed_out += 1
        will_change = places() > 0
        if not will_change:
            batch.drop_ended()
        batch.advance(one_step=will_change)
    if waiting.error is not None:
        raise waiting.error


def counted(results: Iterator[_Result], progress: Progress, total: int | None) -> Iterator[_Result]:
    """`results`, of each of which `progress` is told as it is handed out."""
    for done, result in enumerate(results, 1):
        progress(done, total)
        yield result


class _Waiting:
    """The rows of prompts that are read as they are needed, up to the first that is wrong.

    Attributes:
        num_taken: rows so far.
        is_empty: whether it is known that there are no more.
        error: why the prompts ended early, if they did.
    """

    def __init__(
        self,
        prompts: Iterable[Sequence[int]],
        config: GemmaConfig,
        settings: GenerationSettings,
        prefix: Prefix | None,
    ) -> None:
        self.num_taken = 0
        self.is_empty = False
        self.error: GemmaHubError | None = None
        self._config, self._settings = config, settings
        self._prefix = () if prefix is None else prefix.token_ids
        self._rows = self._read(prompts)

    def take(self, count: int) -> list[Row]:
        """The next `count` rows, or all that are left."""
        rows = list(islice(self._rows, count))
        self.num_taken += len(rows)
        self.is_empty |= len(rows) < count
        return rows

    def _read(self, prompts: Iterable[Sequence[int]]) -> Iterator[Row]:
        each = self._settings.num_return_sequences
        try:
            for number, prompt in enumerate(prompts):
                ids = checked_prompt(
                    f"Prompt {number}",
                    prompt,
                    self._config,
                    self._settings.max_new_tokens,
                    self._prefix,
                )
                for copy in range(each):
                    yield Row(number * each + copy, ids)
        except GemmaHubError as error:
            self.error = error
