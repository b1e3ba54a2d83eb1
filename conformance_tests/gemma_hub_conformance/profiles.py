"""Profiles: the parts of the suite that a backend can be certified for.

A profile is a rule about case ids, so that it also says which ids of the manifest a run must have,
those of cases that somebody deleted included.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from gemma_hub.errors import InputError, nearest

DEFAULT = "full"
_NARROW = re.compile(r"bfloat16|float16")
_TRAINING = {"loss", "gradients", "contract"}


@dataclass(frozen=True, slots=True)
class Profile:
    """A part of the suite.

    Attributes:
        name: what users type.
        doc: one line, for the reference page.
        contains: whether the case of an id belongs to it.
    """

    name: str
    doc: str
    contains: Callable[[str], bool]


def _core(id_: str) -> bool:
    return id_[:2] not in ("L3", "L5") and not _NARROW.search(id_)


def _bf16(id_: str) -> bool:
    return id_[:2] != "L5" and bool(_NARROW.search(id_))


def _training(id_: str) -> bool:
    return id_[:2] == "L5" and not _TRAINING.isdisjoint(id_.split("."))


PROFILES = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile("core", "All but L3 and L5, in float32.", _core),
            Profile("bf16", "L3, and what other levels have in narrower types.", _bf16),
            Profile("training", "Losses, gradients and their contract, of L5.", _training),
            Profile("full", "All cases.", lambda _: True),
        )
    }
)
"""Every profile by its name."""


def find_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        InputError: there is none.
    """
    if name not in PROFILES:
        known = ", ".join(PROFILES)
        raise InputError(
            f"There is no profile {name!r}. {nearest(name, PROFILES)} The profiles: {known}."
        )
    return PROFILES[name]


def required_cases(profile: str = DEFAULT) -> tuple[str, ...]:
    """The manifest: ids of the cases that a run of the whole profile must contain."""
    return members(find_profile(profile), json.loads(manifest()))


def members(profile: Profile, ids: Iterable[str]) -> tuple[str, ...]:
    """Those of `ids` that are in the profile, in their order."""
    return tuple(id_ for id_ in ids if profile.contains(id_))


def manifest() -> bytes:
    """The file that lists the required cases, with what pins each of them."""
    return resources.files("gemma_hub_conformance").joinpath("manifest.json").read_bytes()
