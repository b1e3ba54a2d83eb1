"""Drafts: tokens that are likely to follow, guessed at less cost than the model's own."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, GemmaHubError, InputError
from gemma_hub.generation.choosing import Chooser
from gemma_hub.generation.context import can_edit
from gemma_hub.generation.ragged import RaggedContext
from gemma_hub.generation.rules import Row
from gemma_hub.generation.settings import CausalModel
from gemma_hub.tokenizers import Tokenizer

LONGEST_WAIT = 7
"""Calls of the model between two proposals for a row, at most."""

_MOST_UNREAD = LONGEST_WAIT + 1  # tokens of a row since its last proposals
_COMPARED_PIECES = 256


class Drafter(Protocol):
    """Something that guesses what comes next."""

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[list[int]]:
        """At most `counts[place]` ids for each row, to follow its tokens; any may be wrong.

        Args:
            rows: each with a new token at least. They are the rows of the call before with more
                tokens, in their order, or some of them.
            counts: from 0 up.
        """
        ...


class PromptLookup:
    """What followed the row's last tokens where they stood before, in its prompt or since.

    Of several such places the latest counts. Where the copy reaches the end of the row it goes on
    with what it copied, so that a text which repeats itself is continued.
    """

    def __init__(self, size: int) -> None:
        """A lookup of the last `size` tokens."""
        self._size = size

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[list[int]]:
        return [
            self._following(row.token_ids, count) if count else []
            for row, count in zip(rows, counts, strict=True)
        ]

    def _following(self, ids: np.ndarray, count: int) -> list[int]:
        if len(ids) <= self._size:
            return []
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], self._size)
        found = np.flatnonzero((windows == ids[-self._size :]).all(axis=1))
        if not len(found):
            return []
        # What the row repeats has this period: the tokens stood so many places before.
        period = len(ids) - self._size - int(found[-1])
        return [int(ids[step % period - period]) for step in range(count)]


@dataclass(slots=True)
class _Guess:
    """A row with proposals.

    Attributes:
        row: a copy, with the proposals as new tokens.
        certain: new tokens that are no proposals.
        read: new tokens that the draft model has read.
    """

    row: Row
    certain: int = 0
    read: int = 0

    def now(self, row: Row) -> "tuple[_Guess, int]":
        """The guess from `row` as it has become, and how many tokens read the model must forget."""
        start = min(self.certain, self.read)
        right = start + matching(self.row.new[start : self.read], row.new[start:])
        copy = Row(row.index, row.prompt, list(row.new))
        return _Guess(copy, certain=len(row.new), read=right), self.read - right


class DraftModel:
    """What another model of the same vocabulary would choose.

    It chooses by the rules, the filters and the random bits of the request, so that it takes the
    same tokens where its logits are alike. It calls no function of the user.
    """

    def __init__(self, model: Model, config: GemmaConfig, chooser: Chooser) -> None:
        """A drafter that has read nothing.

        Args:
            model: one whose rows can be edited.
            config: the model's.
            chooser: of the request.
        """
        settings = dataclasses.replace(
            chooser.settings, allowed_tokens=None, processors=(), logprobs=False
        )
        self._model, self._config = model, config
        self._chooser = dataclasses.replace(chooser, settings=settings)
        self._context: RaggedContext | None = None
        self._guesses: list[_Guess] = []

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[list[int]]:
        if not any(counts):
            return [[] for _ in rows]
        context = self._caught_up(rows)
        for step in range(max(counts)):
            places = [place for place, count in enumerate(counts) if count > step]
            if not self._extended(context, places):
                break
        return [guess.row.new[guess.certain :] for guess in self._guesses]

    def _extended(self, context: RaggedContext, places: list[int]) -> bool:
        """Whether each guess at these places has one more proposal."""
        tokens: list[list[int]] = [[] for _ in self._guesses]
        guesses = [self._guesses[place] for place in places]
        for place, guess in zip(places, guesses, strict=True):
            tokens[place] = guess.row.new[guess.read :]
            guess.read = len(guess.row.new)
        logits = context.extend(tokens)[places, -1]
        try:
            choice = self._chooser.choose(logits, [guess.row for guess in guesses])
        except InputError:
            # A rule leaves a row nothing. With the right tokens it may have ended before.
            return False
        except GemmaHubError as error:
            raise GemmaHubError(f"The draft model fails. {error}") from error
        for guess, token_id in zip(guesses, choice.token_ids.tolist(), strict=True):
            guess.row.new.append(token_id)
        return True

    def _caught_up(self, rows: Sequence[Row]) -> RaggedContext:
        """The context of `rows`, once it has forgotten what was guessed wrong."""
        if self._context is None:
            settings = self._chooser.settings
            self._context, _ = RaggedContext.read(
                self._model,
                self._config,
                [row.prompt for row in rows],
                settings.max_new_tokens,
                _MOST_UNREAD,
            )
            self._guesses = [_Guess(row) for row in rows]
        if len(rows) < len(self._guesses):
            places = {guess.row.index: place for place, guess in enumerate(self._guesses)}
            kept = [places[row.index] for row in rows]
            self._context.select(kept)
            self._guesses = [self._guesses[place] for place in kept]
        pairs = [guess.now(row) for guess, row in zip(self._guesses, rows, strict=True)]
        self._guesses = [guess for guess, _ in pairs]
        self._context.forget(np.array([wrong for _, wrong in pairs]))
        return self._context


def check_draft(draft: CausalModel, config: GemmaConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse a draft model whose ids are not those of the model.

    Raises:
        InputError: the sizes of the vocabularies differ, or pieces of the tokenizers do.
    """
    if draft.config.vocab_size != config.vocab_size:
        raise InputError(
            f"The draft model has a vocabulary of {draft.config.vocab_size} tokens and this model "
            f"one of {config.vocab_size}; a draft must have the same tokens."
        )
    if tokenizer is None or draft.tokenizer is None or draft.tokenizer is tokenizer:
        return
    sizes = tokenizer.vocab_size, draft.tokenizer.vocab_size
    # A sample: to compare hundreds of thousands of pieces would take longer than a short text.
    for token_id in np.linspace(0, min(sizes) - 1, num=_COMPARED_PIECES, dtype=np.int64).tolist():
        own, other = tokenizer.id_to_token(token_id), draft.tokenizer.id_to_token(token_id)
        if own != other:
            raise InputError(
                f"The id {token_id} is {own!r} in this model's vocabulary and {other!r} in that of "
                "the draft model; a draft must have the same tokens."
            )


def open_drafter(chooser: Chooser, rows: Sequence[Row]) -> Drafter | None:
    """What the settings ask for, for these rows; None if nothing or where it cannot be.

    It cannot be with a draft model whose rows cannot be edited.

    Raises:
        CapacityError: the draft model has too few positions for a row.
    """
    settings = chooser.settings
    if settings.prompt_lookup is not None:
        return PromptLookup(settings.prompt_lookup)
    draft = settings.draft
    if draft is None or not can_edit(draft.contract):
        return None
    # It reads neither the last new token nor the one before, which it may propose.
    limit = draft.config.max_position_embeddings
    for row in rows:
        needed = len(row.prompt) + settings.max_new_tokens - 2
        if needed > limit:
            raise CapacityError(
                f"Prompt {row.index // settings.num_return_sequences} has {len(row.prompt)} tokens "
                f"and max_new_tokens is {settings.max_new_tokens}: that needs {needed} positions "
                f"of the draft model, which has {limit} (max_position_embeddings). Ask for fewer "
                "tokens, or leave out draft."
            )
    return DraftModel(draft.contract, draft.config, chooser)


def matching(guess: Sequence[int], truth: Sequence[int]) -> int:
    """How many ids both begin with."""
    for count, (one, other) in enumerate(zip(guess, truth, strict=False)):
        if one != other:
            return count
    return min(len(guess), len(truth))
