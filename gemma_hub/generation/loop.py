"""The generation loop: prompts in, new tokens out, over any backend's model.

It prefills all prompts at once, left-padded to one length, and then feeds one token a row and step.
A row's tokens depend on its prompt, the settings and its index in the request: not on the other
rows, the padding or the size of the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma_hub.backend import Model, SupportsCache
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError
from gemma_hub.generation.random import uniform
from gemma_hub.generation.rules import Row, apply_rules, check_ids
from gemma_hub.generation.sampling import check_logits, choose, log_probabilities
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs
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
    return _steps(model, config, rows, settings, ends) if rows else iter(())


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
    model: Model,
    config: GemmaConfig,
    rows: list[Row],
    settings: GenerationSettings,
    ends: Ends | None,
) -> Iterator[NewToken]:
    stops = config.eos_token_ids if settings.eos_token_ids is None else settings.eos_token_ids
    pad = config.pad_token_id or 0
    ids, mask = _left_padded([row.prompt for row in rows], pad)
    capacity = ids.shape[1] + settings.max_new_tokens - 1
    context: _Context = (
        _CachedContext(model, config, len(rows), capacity)
        if isinstance(model, SupportsCache)
        else _WholeContext(model, config)
    )
    running = np.ones(len(rows), np.bool_)
    for step in range(settings.max_new_tokens):
        # What a finished row's logits are is nobody's business; zeros pass every check.
        logits = np.where(running[:, None], context.next_logits(ids, mask), 0.0)
        chosen = _chosen(logits, rows, running, settings, stops, step)
        logprobs = log_probabilities(logits, chosen) if settings.logprobs else None
        stopped = np.isin(chosen, stops)
        is_last = step == settings.max_new_tokens - 1
        for index in np.flatnonzero(running):
            token_id = int(chosen[index])
            rows[index].new.append(token_id)
            if ends is not None:
                stopped[index] |= ends(int(index), token_id)
            reason: FinishReason | None = (
                "stop" if stopped[index] else "length" if is_last else None
            )
            logprob = None if logprobs is None else float(logprobs[index])
            yield NewToken(int(index), token_id, reason, logprob)
        running = running & ~stopped
        if not running.any():
            return
        ids, mask = np.where(running, chosen, pad)[:, None], running[:, None]


def _chosen(
    logits: np.ndarray,
    rows: list[Row],
    running: np.ndarray,
    settings: GenerationSettings,
    stops: tuple[int, ...],
    step: int,
) -> np.ndarray:
    """(B,) the next token of each row; anything where a row has ended."""
    if settings.has_rules:
        check_logits(logits, step)  # so that a rule is not blamed for what the model did
        live = np.flatnonzero(running)
        logits = logits.astype(np.float64)
        logits[live] = apply_rules(logits[live], [rows[index] for index in live], settings, stops)
    return choose(logits, settings, _uniforms(settings, len(rows), step), step=step)


def _uniforms(settings: GenerationSettings, rows: int, step: int) -> np.ndarray | None:
    return None if settings.seed is None else uniform(settings.seed, np.arange(rows), step)


def _left_padded(prompts: list[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) ids and bool mask with every prompt at the right end."""
    length = max(map(len, prompts))
    ids = np.full((len(prompts), length), pad, np.int64)
    mask = np.zeros((len(prompts), length), np.bool_)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return ids, mask


class _Context(Protocol):
    def next_logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(B, V) logits after the (B, T) tokens are added to what came before."""
        ...


class _CachedModel(Model, SupportsCache, Protocol):
    """A model with the "cache" feature."""


class _CachedContext:
    """The tokens so far are in the backend's cache."""

    def __init__(
        self, model: _CachedModel, config: GemmaConfig, batch_size: int, max_length: int
    ) -> None:
        self._model, self._config = model, config
        self._cache = model.init_cache(batch_size, max_length)

    def next_logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        inputs = ModelInputs.prepare(
            self._config, ids, mask, logits_to_keep=1, next_position=self._cache.next_position
        )
        outputs, self._cache = self._model.extend(inputs, self._cache)
        return self._model.to_numpy(outputs.logits)[:, -1]


class _WholeContext:
    """For a backend without a cache: the whole sequence runs again at every step."""

    def __init__(self, model: Model, config: GemmaConfig) -> None:
        self._model, self._config = model, config
        self._ids: np.ndarray | None = None
        self._mask: np.ndarray | None = None

    def next_logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if self._ids is not None and self._mask is not None:
            ids, mask = np.hstack([self._ids, ids]), np.hstack([self._mask, mask])
        self._ids, self._mask = ids, mask
        inputs = ModelInputs.prepare(self._config, ids, mask, logits_to_keep=1)
        outputs = self._model.forward(inputs)
        return self._model.to_numpy(outputs.logits)[:, -1]


def _record(tokens: list[NewToken]) -> GeneratedIds:
    logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
    reason = tokens[-1].finish_reason
    assert reason is not None
    return GeneratedIds(
        token_ids=tuple(token.token_id for token in tokens),
        finish_reason=reason,
        logprobs=logprobs if len(logprobs) == len(tokens) else None,
    )
