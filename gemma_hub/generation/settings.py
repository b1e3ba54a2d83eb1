"""GenerationSettings: how tokens are chosen and when to stop, checked on construction."""

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, cast

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError, nearest
from gemma_hub.generation import setting_checks as check
from gemma_hub.tokenizers import Tokenizer

_SEED_BITS = 64
_MOST_DRAFT_TOKENS = 64  # a row's logits are computed for all of them

AllowedTokens = Callable[[int, np.ndarray], Iterable[int]]
"""(row, ids of its prompt and new tokens) -> the ids that may come next."""

Processor = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(row, ids of its prompt and new tokens, (V,) float64 logits) -> other (V,) logits."""


class CausalModel(Protocol):
    """What a draft is: a `gemma_hub.tasks.causal_lm.CausalLM`."""

    @property
    def contract(self) -> Model: ...
    @property
    def config(self) -> GemmaConfig: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What a call of `generate` or `stream` may choose. docs/reference/generation.md has the rules.

    Attributes:
        max_new_tokens: stop after this many new tokens, the stop token included.
        min_new_tokens: the stop ids are forbidden before there are so many; None for none.
        temperature: logits are divided by it; 0 takes the most probable token (greedy), and then
            `top_k`, `top_p`, `min_p`, `typical_p` and `seed` have no effect.
        top_k: keep exactly this many of the most probable tokens; None for all.
        top_p: of those keep the fewest most probable ones whose probabilities reach this sum;
            None or 1 for all.
        min_p: of those keep the ones at least this times as probable as the most probable one;
            None for all.
        typical_p: of those keep the fewest whose surprise is nearest to the expected one and whose
            probabilities reach this sum; None or 1 for all.
        logit_bias: {id: what is added to its logit}; -inf forbids it. Read it as `biases`.
        repetition_penalty: logits of tokens that are in the row already, the prompt included, are
            divided by it where they are positive and multiplied where they are negative; 1 is off.
        no_repeat_ngram_size: no sequence of so many tokens comes twice in a row; None is off.
        bad_words: texts, or sequences of ids, that never come. Read them as `bad_word_ids`.
        allowed_tokens: called for each new token with the row's index and its ids so far; only the
            ids that it returns may come next.
        processors: called after all other rules, in order, with the row's index, its ids so far and
            its logits; each returns the logits to go on with.
        seed: 0 to 2**64 - 1, the key of the random bits. None with a temperature above 0 draws one
            from the operating system, once; it can be read here afterwards.
        eos_token_id: an id, or several, after which a row stops; None for the checkpoint's own, an
            empty sequence for none. Read it as `eos_token_ids`.
        stop: a text, or several, at which a row stops. The text ends before it. Read it as
            `stop_texts`.
        num_return_sequences: continuations of each prompt.
        num_beams: 1, or the width of a beam search, which gives the most probable continuations
            that it finds; the temperature must be 0. The next two are for it alone.
        length_penalty: a continuation is ranked by its log-probability divided by its length to
            this power; above 0 favours long ones.
        early_stopping: end a search once it has `num_beams` continuations (True), once no better
            one is likely (False) or once none is possible ("never").
        logprobs: also return the log-probability of each new token.
        draft: a causal language model with the same vocabulary, smaller and faster, that proposes
            tokens, so that one call of this one gives several. They are the tokens that come
            without it.
        prompt_lookup: instead of `draft`: propose what followed the last so many tokens of the row
            where they stood in it before.
        draft_tokens: tokens to propose at once, 1 to 64.

    Raises:
        InputError: naming the setting, its value and what was expected.
    """

    max_new_tokens: int = 64
    min_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    bad_words: Iterable[str | Iterable[int]] = ()
    allowed_tokens: AllowedTokens | None = None
    processors: Sequence[Processor] = ()
    seed: int | None = None
    eos_token_id: int | Iterable[int] | None = None
    stop: str | Iterable[str] = ()
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: bool = False
    draft: CausalModel | None = None
    prompt_lookup: int | None = None
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        for name, checked in self._checks().items():
            value = getattr(self, name)
            if value is not None or name in _REQUIRED:
                object.__setattr__(self, name, checked(name, value))
        self._check_together()
        if self.seed is None and self.temperature > 0:
            object.__setattr__(self, "seed", secrets.randbits(_SEED_BITS))

    @staticmethod
    def _checks() -> dict[str, Callable[[str, Any], Any]]:
        return {
            "max_new_tokens": lambda name, value: check.integer(name, value, 1),
            "min_new_tokens": lambda name, value: check.integer(name, value, 1),
            "temperature": _temperature,
            "top_k": lambda name, value: check.integer(name, value, 1, "None keeps every token"),
            "top_p": lambda name, value: check.share(
                name, value, "For greedy generation use temperature=0."
            ),
            "min_p": check.share,
            "typical_p": check.share,
            "logit_bias": check.biases,
            "repetition_penalty": _penalty,
            "no_repeat_ngram_size": lambda name, value: check.integer(name, value, 1),
            "bad_words": check.bad_words,
            "allowed_tokens": check.function,
            "processors": check.functions,
            "seed": _seed,
            "eos_token_id": check.token_ids,
            "stop": check.texts,
            "num_return_sequences": lambda name, value: check.integer(name, value, 1),
            "num_beams": lambda name, value: check.integer(name, value, 1),
            "length_penalty": check.length_penalty,
            "early_stopping": check.early_stopping,
            "logprobs": _flag,
            "draft": check.causal_model,
            "prompt_lookup": lambda name, value: check.integer(name, value, 1),
            "draft_tokens": _draft_tokens,
        }

    def _check_together(self) -> None:
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens is "
                f"{self.max_new_tokens}; expected at most as many."
            )
        if self.num_beams > 1:
            self._check_beams()
        elif self.num_return_sequences > 1 and self.temperature == 0:
            raise InputError(
                f"num_return_sequences is {self.num_return_sequences} and temperature is 0, so "
                "that all would be equal; give a temperature above 0, or as many num_beams."
            )

        if self.draft is not None and self.prompt_lookup is not None:
            raise InputError("Both draft and prompt_lookup are given; give one.")

    def _check_beams(self) -> None:
        if self.draft is not None or self.prompt_lookup is not None:
            raise InputError(
                f"num_beams is {self.num_beams}; a beam search takes no drafts. Leave out draft "
                "and prompt_lookup."
            )
        if self.temperature > 0:
            raise InputError(
                f"num_beams is {self.num_beams} and temperature is {self.temperature}; a beam "
                "search draws nothing. Give temperature=0, or num_beams=1 to draw."
            )
        if self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences is {self.num_return_sequences} and num_beams is "
                f"{self.num_beams}; expected at most as many."
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...] | None:
        """The ids that stop a row; None where the checkpoint's own apply."""
        ids = self.eos_token_id
        return ids if ids is None or isinstance(ids, tuple) else check.token_ids("", ids)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(id, what is added to its logit) of each id that has a bias."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def bad_word_ids(self) -> tuple[tuple[int, ...], ...]:
        """The bad words as ids.

        Raises:
            InputError: one is a text, which only a task with a tokenizer takes.
        """
        words = cast(tuple[check.BadWord, ...], self.bad_words)
        for word in words:
            if isinstance(word, str):
                raise InputError(f"bad_words has the text {word!r}; without a tokenizer give ids.")
        return cast(tuple[tuple[int, ...], ...], words)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts at which a row stops."""
        return cast(tuple[str, ...], self.stop)

    @property
    def has_rules(self) -> bool:
        """Whether anything changes the logits before temperature and filters do."""
        return bool(
            self.min_new_tokens
            or self.logit_bias
            or self.repetition_penalty != 1
            or self.no_repeat_ngram_size
            or self.bad_words
            or self.allowed_tokens
            or self.processors
        )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Settings from keyword arguments of a user.

        Raises:
            InputError: for a name that is not a setting of this version, or a wrong value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                hint = nearest(name, known)
                raise InputError(
                    f"There is no generation setting {name!r}. {hint}{' ' if hint else ''}"
                    f"This version knows {', '.join(known)}."
                )
        return cls(**settings)


_REQUIRED = {
    field.name for field in dataclasses.fields(GenerationSettings) if field.default is not None
}


def _temperature(name: str, value: Any) -> float:
    checked = check.real(name, value, "a finite number from 0 up")
    if checked < 0:
        raise InputError(f"{name} is {value!r}; expected a number from 0 up.")
    return checked


def _penalty(name: str, value: Any) -> float:
    checked = check.real(name, value, "a number above 0")
    if checked <= 0:
        raise InputError(f"{name} is {value!r}; expected a number above 0. 1 is off.")
    return checked


def _seed(name: str, value: Any) -> int:
    checked = check.integer(name, value, 0)
    if checked.bit_length() > _SEED_BITS:
        raise InputError(f"{name} is {value!r}; expected an integer below 2**64.")
    return checked


def _draft_tokens(name: str, value: Any) -> int:
    checked = check.integer(name, value, 1)
    if checked > _MOST_DRAFT_TOKENS:
        raise InputError(f"{name} is {value!r}; expected at most {_MOST_DRAFT_TOKENS}.")
    return checked


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise InputError(f"{name} is {value!r}; expected True or False.")
    return value
