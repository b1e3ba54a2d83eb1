"""GenerationSettings: how tokens are chosen and when to stop, checked on construction."""

import dataclasses
import math
import numbers
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from gemma_hub.errors import InputError, nearest

_SEED_BITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What a call of `generate` or `stream` may choose.

    Attributes:
        max_new_tokens: stop after this many new tokens, the stop token included.
        temperature: logits are divided by it; 0 takes the most probable token (greedy), and then
            `top_k`, `top_p` and `seed` have no effect.
        top_k: keep exactly this many of the most probable tokens; None for all.
        top_p: of those keep the fewest most probable ones whose probabilities reach this sum;
            None or 1 for all.
        seed: 0 to 2**64 - 1, the key of the random bits. None with a temperature above 0 draws one
            from the operating system, once; it can be read here afterwards.
        eos_token_id: an id, or several, after which a row stops; None for the checkpoint's own, an
            empty sequence for none. Read it as `eos_token_ids`.
        logprobs: also return the log-probability of each new token.

    Raises:
        InputError: naming the setting, its value and what was expected.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    eos_token_id: int | Iterable[int] | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "max_new_tokens": _integer("max_new_tokens", self.max_new_tokens, 1),
            "temperature": _real("temperature", self.temperature, "a finite number from 0 up"),
            "eos_token_id": _token_ids(self.eos_token_id),
        }
        if checked["temperature"] < 0:
            raise InputError(f"temperature is {self.temperature!r}; expected a number from 0 up.")
        if self.top_k is not None:
            checked["top_k"] = _integer("top_k", self.top_k, 1, "None keeps every token")
        if self.top_p is not None:
            checked["top_p"] = _real("top_p", self.top_p, "a number above 0 and up to 1")
            if not 0 < checked["top_p"] <= 1:
                raise InputError(
                    f"top_p is {self.top_p!r}; expected a number above 0 and up to 1. For greedy "
                    "generation use temperature=0."
                )
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, 0)
            if checked["seed"].bit_length() > _SEED_BITS:
                raise InputError(f"seed is {self.seed!r}; expected an integer below 2**64.")
        elif checked["temperature"] > 0:
            checked["seed"] = secrets.randbits(_SEED_BITS)
        if type(self.logprobs) is not bool:
            raise InputError(f"logprobs is {self.logprobs!r}; expected True or False.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def eos_token_ids(self) -> tuple[int, ...] | None:
        """The ids that stop a row; None where the checkpoint's own apply."""
        ids = self.eos_token_id
        return ids if ids is None or isinstance(ids, tuple) else _token_ids(ids)

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


def _integer(name: str, value: Any, least: int, hint: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        advice = f" {hint}." if hint else ""
        raise InputError(f"{name} is {value!r}; expected an integer from {least} up.{advice}")
    return int(value)


def _real(name: str, value: Any, expected: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not math.isfinite(float(value))
    ):
        raise InputError(f"{name} is {value!r}; expected {expected}.")
    return float(value)


def _token_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        value = (value,)
    return tuple(_integer("eos_token_id", token_id, 0) for token_id in value)
