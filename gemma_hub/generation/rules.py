"""The rules that change a row's logits before a token is chosen, in NumPy and float64.

They depend on the row's own tokens and on nothing else, so a row stays independent of its batch.
Order: logit_bias, repetition_penalty, no_repeat_ngram_size, bad_words, min_new_tokens,
allowed_tokens, processors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma_hub.errors import InputError
from gemma_hub.generation.settings import GenerationSettings


@dataclass(slots=True)
class Row:
    """One row of a request.

    Attributes:
        index: of the row.
        prompt: ids that it began with.
        new: ids that were chosen since.
    """

    index: int
    prompt: np.ndarray
    new: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> np.ndarray:
        """(T,) int64, the prompt and what came since."""
        return np.concatenate([self.prompt, np.asarray(self.new, np.int64)]).astype(np.int64)


def apply_rules(
    logits: np.ndarray, rows: Sequence[Row], settings: GenerationSettings, stops: Sequence[int]
) -> np.ndarray:
    """The logits after every rule of `settings`.

    Args:
        logits: (B, V) of any floating type.
        rows: the B rows.
        settings: `bad_words` of ids only; texts are for a task that has a tokenizer.
        stops: ids that end a row, which `min_new_tokens` forbids.

    Returns:
        (B, V): `logits` itself where there is no rule, else float64.

    Raises:
        InputError: a rule leaves a row no token, or a function returns what it must not.
    """
    changed = change_scores(logits, rows, settings, stops)
    for place, row in enumerate(rows if changed is not logits else ()):
        if changed[place].max() == -np.inf and logits[place].max() > -np.inf:
            raise InputError(
                f"The rules of this call leave row {row.index} no token at step {len(row.new)}. "
                "Forbid less, or let allowed_tokens return an id that ends the row."
            )
    return changed


def change_scores(
    scores: np.ndarray, rows: Sequence[Row], settings: GenerationSettings, stops: Sequence[int]
) -> np.ndarray:
    """As `apply_rules`, for any scores of tokens; a row that is left no token has only -inf."""
    if not settings.has_rules:
        return scores
    changed = scores.astype(np.float64)
    for place, row in enumerate(rows):
        changed[place] = _applied(changed[place], row, settings, stops)
    return changed


def check_ids(settings: GenerationSettings, vocab_size: int) -> None:
    """Refuse ids in `settings` that the vocabulary does not have.

    Raises:
        InputError: naming the setting and the id.
    """
    named = [("logit_bias", token_id) for token_id, _ in settings.biases]
    named += [("bad_words", token_id) for word in settings.bad_word_ids for token_id in word]
    named += [("eos_token_id", token_id) for token_id in settings.eos_token_ids or ()]
    for name, token_id in named:
        if token_id >= vocab_size:
            raise InputError(
                f"{name} {token_id} is not in the vocabulary; expected 0 to {vocab_size - 1}."
            )


def _applied(
    scores: np.ndarray, row: Row, settings: GenerationSettings, stops: Sequence[int]
) -> np.ndarray:
    """(V,) float64 `scores`, which may be written to, after the rules."""
    token_ids = row.token_ids
    for token_id, bias in settings.biases:
        scores[token_id] += bias
    if settings.repetition_penalty != 1:
        seen = np.unique(token_ids)
        penalty = settings.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    if settings.no_repeat_ngram_size is not None:
        scores[_repeating(token_ids, settings.no_repeat_ngram_size)] = -np.inf
    for word in settings.bad_word_ids:
        *before, last = word
        if len(before) == 0 or np.array_equal(token_ids[-len(before) :], before):
            scores[last] = -np.inf
    if settings.min_new_tokens is not None and len(row.new) < settings.min_new_tokens:
        scores[list(stops)] = -np.inf
    if settings.allowed_tokens is not None:
        allowed = _allowed(settings.allowed_tokens(row.index, token_ids), len(scores), row)
        scores = np.where(allowed, scores, -np.inf)
    for process in settings.processors:
        scores = _checked(process(row.index, token_ids, scores), len(scores), row)
    return scores


def _repeating(token_ids: np.ndarray, size: int) -> np.ndarray:
    """The ids that would complete a sequence of `size` tokens which is there already."""
    if len(token_ids) < size:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(token_ids, size)
    tail = token_ids[len(token_ids) - size + 1 :]
    return np.asarray(windows[(windows[:, :-1] == tail).all(axis=1), -1])


def _allowed(found: object, size: int, row: Row) -> np.ndarray:
    """(V,) bool of what `allowed_tokens` returned."""
    ids = np.asarray(list(found) if not isinstance(found, np.ndarray) else found)  # type: ignore[call-overload]
    where = f"allowed_tokens of row {row.index} at step {len(row.new)}"
    if not ids.size:
        raise InputError(f"{where} returned no id; return at least one.")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{where} returned {ids.dtype} of shape {ids.shape}; expected ids.")
    if ids.min() < 0 or ids.max() >= size:
        raise InputError(f"{where} returned ids from {ids.min()} to {ids.max()}; expected 0 to "
                         f"{size - 1}.")  # fmt: skip
    allowed = np.zeros(size, np.bool_)
    allowed[ids] = True
    return allowed


def _checked(scores: object, size: int, row: Row) -> np.ndarray:
    """What a processor returned, if it is logits."""
    found = np.asarray(scores)
    if found.shape != (size,) or not np.issubdtype(found.dtype, np.floating):
        raise InputError(
            f"A processor returned {found.dtype} of shape {found.shape} for row {row.index} at "
            f"step {len(row.new)}; expected floating-point logits of shape ({size},)."
        )
    return found.astype(np.float64)
