"""The generation loop: prompts in, new tokens out, over any backend's model.

It prefills all prompts at once, left-padded to one length, and then feeds one token a row and step.
Once half of the rows have ended, the others go on without them.
A row's tokens depend on its prompt, the settings and its index in the request: not on the other
rows, the padding or the size of the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError
from gemma_hub.generation.choosing import Chooser
from gemma_hub.generation.context import Context, can_edit, left_padded, open_context
from gemma_hub.generation.rules import Row, check_ids
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.outputs import FinishReason

Ends = Callable[[int, int], bool]
"""(row, id of its new token) -> whether the row ends with it; called once for each, in order."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """One new token of one row.

    Attributes:
        row: index of the row in the request: of its prompt, where each has one continuation.
        token_id: the id.
        finish_reason: set on the row's last token only.
        logprob: natural-log probability before temperature and filters, where asked for.
    """

    row: int
    token_id: int
    finish_reason: FinishReason | None
    logprob: float | None


@dataclass(frozen=True, slots=True)
class GeneratedIds:
    """All new tokens of one row; the fields are those of `gemma_hub.outputs.Generation`."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None


def generate_ids(
    model: Model,
    config: GemmaConfig,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    ends: Ends | None = None,
) -> list[GeneratedIds]:
    """The continuations, all of a prompt together; arguments and errors are as in `stream_ids`."""
    rows: list[list[NewToken]] = [[] for _ in prompts for _ in range(settings.num_return_sequences)]
    for token in stream_ids(model, config, prompts, settings, ends):
        rows[token.row].append(token)
    return [_record(row) for row in rows]


def stream_ids(
    model: Model,
    config: GemmaConfig,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    ends: Ends | None = None,
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

    Raises:
        InputError: a prompt is empty, or holds something that is no id of the vocabulary, or a
            setting does.
        CapacityError: a prompt and its new tokens need more positions than the model has.
    """
    checked = [
        _checked_prompt(row, prompt, config, settings.max_new_tokens)
        for row, prompt in enumerate(prompts)
    ]
    check_ids(settings, config.vocab_size)
    each = settings.num_return_sequences
    rows = [Row(index, checked[index // each]) for index in range(len(checked) * each)]
    chooser = Chooser.of(settings, config)
    return _steps(model, config, rows, chooser, ends) if rows else iter(())


def _checked_prompt(
    row: int, prompt: Sequence[int], config: GemmaConfig, max_new_tokens: int
) -> np.ndarray:
    if len(prompt) == 0:
        raise InputError(f"Prompt {row} has no tokens; give at least one, such as <bos>.")
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"Prompt {row} is {ids.dtype} of shape {ids.shape}; expected a row of ids."
        )
    bad = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
    if len(bad):
        raise InputError(
            f"Prompt {row} has the id {ids[bad[0]]} at place {bad[0]}; expected 0 to "
            f"{config.vocab_size - 1}. Use the tokenizer of the same checkpoint."
        )
    # The last new token is never fed, so it needs no position.
    limit = config.max_position_embeddings
    needed = len(ids) + max_new_tokens - 1
    if needed > limit:
        room = limit - len(ids) + 1
        advice = f"Ask for at most {room} new tokens" if room > 0 else "Shorten the prompt"
        raise CapacityError(
            f"Prompt {row} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}: that "
            f"needs {needed} positions, and this model has {limit} (max_position_embeddings). "
            f"{advice}."
        )
    return ids


def _steps(
    model: Model, config: GemmaConfig, rows: list[Row], chooser: Chooser, ends: Ends | None
) -> Iterator[NewToken]:
    settings, pad = chooser.settings, config.pad_token_id or 0
    context, logits = _prefilled(model, config, rows, settings)
    held, runs = rows, np.ones(len(rows), np.bool_)  # the rows of the context; some may have ended
    for step in range(settings.max_new_tokens):
        places = np.flatnonzero(runs)
        choice = chooser.choose(logits[places], [held[place] for place in places])
        is_last = step == settings.max_new_tokens - 1
        for index, place in enumerate(places):
            row, token_id = held[place], int(choice.token_ids[index])
            row.new.append(token_id)
            stops = token_id in chooser.stops
            if ends is not None:
                stops |= ends(row.index, token_id)
            runs[place] = not stops
            reason: FinishReason | None = "stop" if stops else "length" if is_last else None
            yield NewToken(row.index, token_id, reason, choice.logprob(index))
        if is_last or not runs.any():
            return
        if 2 * runs.sum() <= len(held) and can_edit(model):
            places = np.flatnonzero(runs)
            context = context.gather([(0, int(place)) for place in places], _slots(rows, settings))
            held, runs = [held[place] for place in places], np.ones(len(places), np.bool_)
        ids = np.array([row.new[-1] for row in held])
        logits = context.extend(np.where(runs, ids, pad)[:, None], runs[:, None])[:, -1]


def _prefilled(
    model: Model, config: GemmaConfig, rows: list[Row], settings: GenerationSettings
) -> tuple[Context, np.ndarray]:
    """A context that has read the prompt of each row, and the (B, V) logits after it."""
    # Each prompt is read once where rows can be repeated.
    each = settings.num_return_sequences if can_edit(model) else 1
    ids, mask = left_padded([row.prompt for row in rows[::each]], config.pad_token_id or 0)
    context = open_context(model, config, len(ids), _slots(rows, settings))
    logits = context.extend(ids, mask)[:, -1]
    if each == 1:
        return context, logits
    copies = [(0, prompt) for prompt in range(len(ids)) for _ in range(each)]
    return context.gather(copies, _slots(rows, settings)), np.repeat(logits, each, axis=0)


def _slots(rows: list[Row], settings: GenerationSettings) -> int:
    """Slots that the longest row needs; its last token is never fed."""
    return max(len(row.prompt) for row in rows) + settings.max_new_tokens - 1


def _record(tokens: list[NewToken]) -> GeneratedIds:
    logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
    reason = tokens[-1].finish_reason
    assert reason is not None
    return GeneratedIds(
        token_ids=tuple(token.token_id for token in tokens),
        finish_reason=reason,
        logprobs=logprobs if len(logprobs) == len(tokens) else None,
    )
