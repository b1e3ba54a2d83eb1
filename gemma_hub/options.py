"""The options that one backend has for itself: a dataclass of switches."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from gemma_hub.errors import InputError, nearest

Switches = TypeVar("Switches")

# An attribute in a docstring, with its further lines, up to a semicolon.
_TOLD = re.compile(r"^ {4}(\w+): ((?:[^;\n]|\n {8})*)", re.MULTILINE)


def read_switches(kind: type[Switches], backend: str, extra: Mapping[str, Any]) -> Switches:
    """The switches that `extra` names; the others have their defaults.

    Args:
        kind: a dataclass whose fields are all bool, with defaults.
        backend: the name of the backend, for messages.
        extra: `BuildOptions.extra`.

    Raises:
        InputError: an unknown name, or a value of a wrong type.
    """
    known = [option.name for option in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name, value in extra.items():
        if name not in known:
            hint = nearest(str(name), known)
            raise InputError(
                f"The {backend} backend has no option {name!r}. {hint}{' ' if hint else ''}"
                f"Known: {', '.join(known)}."
            )
        if type(value) is not bool:
            raise InputError(f"The option {name} is {value!r}; expected True or False.")
    return kind(**extra)


def told_switches(kind: type) -> dict[str, str]:
    """What each switch does, by its name, for `BackendSpec.options`.

    The words are those of the docstring, under "Attributes:", so that they are written once. What
    follows a semicolon there is for readers of the code.

    Args:
        kind: as for `read_switches`.
    """
    told: dict[str, str] = dict(_TOLD.findall(inspect.cleandoc(kind.__doc__ or "")))
    return {
        option.name: " ".join(told.get(option.name, "").split()).removesuffix(".")
        for option in dataclasses.fields(kind)
    }


def option_texts(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The values as one types them after `--option`, which reads them again."""
    return tuple(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options.items()
    )
