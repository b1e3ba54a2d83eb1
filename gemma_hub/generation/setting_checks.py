"""Checks of single generation settings: the value as it is used, or an error that names it."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gemma_hub.errors import InputError

BadWord = str | tuple[int, ...]


def integer(name: str, value: Any, least: int, hint: str = "") -> int:
    """A whole number from `least` up."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        advice = f" {hint}." if hint else ""
        raise InputError(f"{name} is {value!r}; expected an integer from {least} up.{advice}")
    return int(value)


def real(name: str, value: Any, expected: str) -> float:
    """A finite number; `expected` says in words which."""
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not math.isfinite(float(value))
    ):
        raise InputError(f"{name} is {value!r}; expected {expected}.")
    return float(value)


def share(name: str, value: Any, hint: str = "") -> float:
    """A number above 0 and up to 1."""
    expected = "a number above 0 and up to 1"
    checked = real(name, value, expected)
    if not 0 < checked <= 1:
        raise InputError(f"{name} is {value!r}; expected {expected}. {hint}".rstrip())
    return checked


def length_penalty(name: str, value: Any) -> float:
    """A power of lengths: small enough that the longest sequence gives a finite number."""
    expected = "a number from -10 to 10"
    checked = real(name, value, expected)
    if abs(checked) > 10:
        raise InputError(f"{name} is {value!r}; expected {expected}.")
    return checked


def early_stopping(name: str, value: Any) -> bool | str:
    """True, False or "never"."""
    if type(value) is not bool and not (isinstance(value, str) and value == "never"):
        raise InputError(f'{name} is {value!r}; expected True, False or "never".')
    return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """An id, or several."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        value = (value,)
    return tuple(integer(name, token_id, 0) for token_id in value)


def biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """((id, what to add to its logit), ...) from a mapping or from such pairs; -inf forbids."""
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        checked = [(token_id, bias) for token_id, bias in pairs]
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}; expected {{id: number, ...}}.") from None
    expected = f"{name}: a finite number, or -inf to forbid the token"
    return tuple(
        (integer(name, token_id, 0), bias if bias == -math.inf else real(name, bias, expected))
        for token_id, bias in checked
    )


def bad_words(name: str, value: Any) -> tuple[BadWord, ...]:
    """Texts and sequences of ids."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {value!r}; expected several texts or rows of ids.")
    words: list[BadWord] = []
    for word in value:
        checked = word if isinstance(word, str) else token_ids(name, word)
        if not checked:
            raise InputError(f"{name} is {value!r}; one of them is empty.")
        words.append(checked)
    return tuple(words)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A text, or several; none is empty."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Iterable) or not all(isinstance(x, str) and x for x in found):
        raise InputError(f"{name} is {value!r}; expected a text or several, none of them empty.")
    return tuple(found)


def function(name: str, value: Any) -> Callable[..., Any]:
    """Something that can be called."""
    if not callable(value):
        raise InputError(f"{name} is {value!r}; expected a function.")
    found: Callable[..., Any] = value
    return found


def functions(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    """Several functions."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{name} is {value!r}; expected a list of functions.")
    return tuple(function(name, each) for each in value)


def causal_model(name: str, value: Any) -> Any:
    """A loaded model that continues texts."""
    if getattr(value, "task", None) != "causal_lm" or not hasattr(value, "contract"):
        kind = f"a model for {value.task}" if hasattr(value, "task") else type(value).__name__
        raise InputError(
            f"{name} is {kind}; expected a causal language model, as gemma_hub.Gemma.load gives."
        )
    return value
