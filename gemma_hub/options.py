"""The options that one backend has for itself: a dataclass of switches."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from gemma_hub.errors import InputError, nearest

Switches = TypeVar("Switches")


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
