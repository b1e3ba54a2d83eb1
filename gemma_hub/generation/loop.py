"""The generation loop: prompts in, new tokens out, over any backend's model.

It reads the prompts and then feeds one token a row and step, or lets the model take several greedy
steps by itself. Once half of the rows have ended, the others go on without them.
A row's tokens depend on its prompt, the settings and its index in the request: not on the other
rows, the padding or the size of the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.generation.choosing import Choice, Chooser, Ends, NewToken
from gemma_hub.generation.context import CachedContext, Context, can_edit
from gemma_hub.generation.drafting import open_drafter
from gemma_hub.generation.greedy import GreedyQueue, is_plain
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.prompt_checks import checked_prompt
from gemma_hub.generation.prompts import read_prompts
from gemma_hub.generation.rules import Row, check_ids
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.generation.speculation import speculate
from gemma_hub.outputs import DraftCounts, FinishReason


@dataclass(frozen=True, slots=True)
class GeneratedIds:
    """All new tokens of one row; the fields are those of `gemma_hub.outputs.Generation`."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    score: float | None = None
    drafts: DraftCounts | None = None


def generate_ids(
    model: Model,
    config: GemmaConfig,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    ends: Ends | None = None,
    prefix: Prefix | None = None,
) -> list[GeneratedIds]:
    """The continuations, all of a prompt together; arguments and errors are as in `stream_ids`."""
    rows: list[list[NewToken]] = [[] for _ in prompts for _ in range(settings.num_return_sequences)]
    for token in stream_ids(model, config, prompts, settings, ends, prefix):
        rows[token.row].append(token)
    return [joined(row) for row in rows]


def stream_ids(
    model: Model,
    config: GemmaConfig,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    ends: Ends | None = None,
    prefix: Prefix | None = None,
) -> Iterator[NewToken]:
    """New tokens as they are chosen: step by step, and by row within a step.

    The prompts are checked in the call; the model runs as the iterator is read, and it may be left
    at any point.

    Args:
        model: any backend's; one without a cache runs the whole sequence again at every step.
        config: the model's.
        prompts: token ids without padding, one sequence a row.
        settings: `eos_token_ids` of None means those of `config`. The texts of `stop` are for
            `ends`, which knows a row's text.
        ends: ends rows at more than the stop ids.
        prefix: what all prompts begin with, which `model` has read already.

    Raises:
        InputError: a prompt is empty, or holds something that is no id of the vocabulary, or a
            setting does; or the prefix is another model's or prompt's.
        CapacityError: a prompt and its new tokens need more positions than the model has.
    """
    if settings.num_beams > 1:
        raise InputError(
            f"num_beams is {settings.num_beams}; the tokens of a beam search are known at its end "
            "only, so that they cannot be streamed. Use generate."
        )
    if prefix is not None:
        prefix.check_model(model)
    first = () if prefix is None else prefix.token_ids
    checked = [
        checked_prompt(f"Prompt {row}", prompt, config, settings.max_new_tokens, first)
        for row, prompt in enumerate(prompts)
    ]
    check_ids(settings, config.vocab_size)
    each = settings.num_return_sequences
    rows = [Row(index, checked[index // each]) for index in range(len(checked) * each)]
    if not rows:
        return iter(())
    chooser = Chooser.of(settings, config)
    drafter = open_drafter(chooser, rows) if can_edit(model) else None
    if drafter is not None:
        return speculate(model, config, rows, chooser, drafter, ends, prefix)
    return _steps(Batch(model, config, settings, ends, prefix), rows)


def _steps(batch: "Batch", rows: list[Row]) -> Iterator[NewToken]:
    batch.admit(rows)
    while batch.num_running:
        yield from batch.choose()
        batch.drop_ended()
        batch.advance()


class Batch:
    """Rows that run together. Others can join them between two steps, where rows can be edited."""

    def __init__(
        self,
        model: Model,
        config: GemmaConfig,
        settings: GenerationSettings,
        ends: Ends | None = None,
        prefix: Prefix | None = None,
        *,
        rounds_up: bool = False,
    ) -> None:
        """A batch without rows; the arguments are checked ones of `stream_ids`.

        Args:
            model: any backend's.
            config: the model's.
            settings: of every row.
            ends: ends rows at more than the stop ids.
            prefix: what every row begins with.
            rounds_up: make room for a power of two of tokens, so that a batch which others join
                takes few different sizes.
        """
        self._can_edit = can_edit(model)
        self._model, self._config, self._prefix = model, config, prefix
        self._chooser, self._ends = Chooser.of(settings, config), ends
        self._rounds_up = rounds_up
        self._context: Context | None = None
        self._held: list[Row] = []  # the rows of the context
        self._runs = np.zeros(0, np.bool_)  # some of them may have ended
        self._logits = np.zeros((0, config.vocab_size), np.float32)
        self._ahead = GreedyQueue(self._chooser.stops)  # steps that `_logits` has nothing of

    @property
    def num_running(self) -> int:
        """Rows that have not ended."""
        return int(self._runs.sum())

    @property
    def can_change(self) -> bool:
        """Whether running rows can be joined by others and left by those that have ended, now."""
        return self._can_edit and not self._ahead

    def admit(self, rows: Sequence[Row]) -> None:
        """Read the prompts of `rows`, which run from now on; those that have ended leave.

        Between `advance` and `choose`; while rows run only where `can_change`.
        """
        kept = np.flatnonzero(self._runs)
        assert self.can_change or not len(kept)
        self._ahead.clear()
        held = [*(self._held[place] for place in kept), *rows]
        room = self._room(held)
        read = read_prompts(
            self._model,
            self._config,
            [row.prompt for row in rows],
            0 if len(kept) else room,
            self._prefix,
        )
        if self._context is None or not len(kept):
            contexts, places = read.contexts, read.places
        else:
            contexts = [self._context, *read.contexts]
            places = [(0, int(place)) for place in kept]
            places += [(context + 1, row) for context, row in read.places]
        if len(kept) or not read.is_one_context:
            self._context = contexts[0].gather(places, room, *contexts[1:])
        else:
            self._context = contexts[0]
        self._held, self._runs = held, np.ones(len(held), np.bool_)
        self._logits = np.concatenate([self._logits[kept], read.logits])

    def choose(self) -> Iterator[NewToken]:
        """The next token of each running row, as it is read."""
        places = np.flatnonzero(self._runs)
        if self._ahead:
            choice = Choice(self._ahead.take()[places], None)
        else:
            choice = self._chooser.choose(self._logits[places], [self._held[p] for p in places])
        for index, place in enumerate(places):
            token = self._chooser.take(
                self._held[place],
                int(choice.token_ids[index]),
                choice.logprob(index),
                self._ends,
            )
            self._runs[place] = token.finish_reason is None
            yield token

    def drop_ended(self) -> None:
        """Go on without the rows that have ended, once they are half, where rows can be edited."""
        kept = np.flatnonzero(self._runs)
        if self._context is None or not self.can_change or not 0 < 2 * len(kept) <= len(self._held):
            return
        self._held = [self._held[place] for place in kept]
        places = [(0, int(place)) for place in kept]
        self._context = self._context.gather(places, self._room(self._held))
        self._runs = np.ones(len(kept), np.bool_)

    def advance(self, *, one_step: bool = False) -> None:
        """Feed the token that each running row chose last, unless the model went ahead by itself.

        Args:
            one_step: do not let it go ahead, as the rows are to change after this step.
        """
        if self._context is None or self._ahead or not self._runs.any():
            return
        pad = self._config.pad_token_id or 0
        ids = np.where(self._runs, [row.new[-1] for row in self._held], pad)
        if not one_step:
            self._go_ahead(ids)
        if not self._ahead:  # nor where a row has logits that no token can be chosen from
            self._logits = self._context.extend(ids[:, None], self._runs[:, None])[:, -1]

    def _go_ahead(self, ids: np.ndarray) -> None:
        """Let the model choose the next tokens after (B,) `ids`, if it can and they are greedy."""
        context, settings = self._context, self._chooser.settings
        if isinstance(context, CachedContext) and context.takes_greedy_steps and is_plain(settings):
            new = max(len(self._held[place].new) for place in np.flatnonzero(self._runs))
            self._ahead.fill(context, ids, self._runs, settings.max_new_tokens - new)

    def _room(self, rows: list[Row]) -> int:
        """Tokens that a row may come to have until all have ended; the last is never fed."""
        limit = self._chooser.settings.max_new_tokens
        longest = max(len(row.prompt) + len(row.new) for row in rows)
        room = longest + max(limit - len(row.new) for row in rows) - 1
        return 1 << (room - 1).bit_length() if self._rounds_up else room


def joined(tokens: Sequence[NewToken]) -> GeneratedIds:
    """The record of one row, from all its tokens in their order."""
    logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
    reason = tokens[-1].finish_reason
    assert reason is not None
    return GeneratedIds(
        token_ids=tuple(token.token_id for token in tokens),
        finish_reason=reason,
        logprobs=logprobs if len(logprobs) == len(tokens) else None,
        drafts=tokens[-1].drafts,
    )
