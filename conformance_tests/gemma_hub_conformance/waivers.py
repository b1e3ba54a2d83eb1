"""Waivers: failures that a plug-in's author knows of and asks to let pass, each for a while.

They are in a TOML file of the plug-in's own, so that everybody can see them:

    [[waiver]]
    case = "L3.float16.forward.gqa.left_padding"
    reason = "The chip sums float16 in float16."
    bound = 40.0
    expires = 2027-06-30
"""

import datetime
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_hub.errors import InputError, nearest
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.report import CaseResult, Verdict
from gemma_hub_conformance.small_file import small_text

_KEYS = {"case", "reason", "bound", "expires"}


@dataclass(frozen=True, slots=True)
class Waiver:
    """Leave to fail for one case.

    Attributes:
        case: its exact id.
        reason: why it fails and may.
        bound: the largest ratio of the error to the noise, and of the worst element, that is let
            pass; more is another bug.
        expires: the last day on which it counts.
    """

    case: str
    reason: str
    bound: float
    expires: datetime.date


def read_waivers(path: Path) -> tuple[Waiver, ...]:
    """The waivers of a file.

    Raises:
        InputError: it cannot be read, is not TOML, or a waiver in it is not complete, of no case,
            or the second of its case.
    """
    try:
        content = tomllib.loads(small_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}.") from error
    entries = content.pop("waiver", None)
    if content or not isinstance(entries, list):
        raise InputError(
            f"{path} holds {', '.join(content) or 'no waivers'}; expected [[waiver]] tables only."
        )
    waivers = tuple(_waiver(f"{path}, waiver {i}", entry) for i, entry in enumerate(entries, 1))
    names = [waiver.case for waiver in waivers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} waives {', '.join(twice)} twice; expected one waiver for a case.")
    return waivers


def _waiver(where: str, entry: Any) -> Waiver:
    if not isinstance(entry, Mapping) or set(entry) != _KEYS:
        found = ", ".join(entry) if isinstance(entry, Mapping) else repr(entry)
        raise InputError(f"{where} has {found}; expected {', '.join(sorted(_KEYS))}.")
    case, reason, bound, expires = (entry[key] for key in ("case", "reason", "bound", "expires"))
    if case not in all_cases():
        hint = nearest(str(case), all_cases())
        raise InputError(f"{where}: there is no case {case!r}. {hint}".rstrip())
    if not isinstance(reason, str) or not reason.strip():
        raise InputError(f"{where}: the reason is {reason!r}; expected a sentence.")
    is_number = isinstance(bound, int | float) and not isinstance(bound, bool)
    if not is_number or not 0 < bound < math.inf:
        raise InputError(f"{where}: the bound is {bound!r}; expected a number above 0.")
    if type(expires) is not datetime.date:
        raise InputError(f"{where}: expires is {expires!r}; expected a date such as 2027-06-30.")
    return Waiver(case, reason.strip(), float(bound), expires)


def apply_waivers(
    results: Iterable[CaseResult], waivers: Sequence[Waiver], today: datetime.date | None = None
) -> tuple[tuple[CaseResult, ...], tuple[str, ...]]:
    """The results with what is waived, and what is wrong with waivers of cases that ran.

    Args:
        results: of a run.
        waivers: from `read_waivers`.
        today: the day; None for that of the clock.
    """
    today = datetime.date.today() if today is None else today
    by_case = {waiver.case: waiver for waiver in waivers}
    waived: list[CaseResult] = []
    problems: list[str] = []
    for result in results:
        waiver = by_case.get(result.id)
        reason = "" if waiver is None else _refusal(waiver, result, today)
        if waiver is None:
            waived.append(result)
        elif reason:
            waived.append(result)
            problems.append(f"The waiver of {result.id} does not count: {reason}.")
        else:
            message = f"waived until {waiver.expires}: {waiver.reason} ({result.message})"
            waived.append(replace(result, verdict=Verdict.WAIVED, message=message))
    return tuple(waived), tuple(problems)


def _refusal(waiver: Waiver, result: CaseResult, today: datetime.date) -> str:
    """Why a waiver does not count, or ''."""
    if result.verdict in (Verdict.PASS, Verdict.UNSUPPORTED):
        return f"the case does not fail ({result.verdict}); remove it"
    if today > waiver.expires:
        return f"it expired on {waiver.expires}"
    if result.verdict is Verdict.ERROR:
        return "an exception cannot be waived"
    ratios = [each for each in (result.ratio, result.worst_ratio) if each is not None]
    if not ratios:
        return "the case compares no numbers that its bound could hold for"
    # Not `max`, which lets a NaN pass.
    if not all(ratio <= waiver.bound for ratio in ratios):
        return f"the ratios are {', '.join(f'{r:.3g}' for r in ratios)}, above {waiver.bound:g}"
    return ""
