"""How alike two failures of one case are, and how alike they must be to be called the same bug."""

import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.error_model import RATIO_LIMIT
from gemma_hub_conformance.diagnosis.recording import Observation

PATH = Path(__file__).with_name("calibration.json")
"""The limit of the misfit and its evidence; written by `diagnosis.measure`."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True, slots=True, order=True)
class Naming:
    """A bug under test, and a known one that it was compared with.

    Attributes:
        misfit: of the two.
        bug: the one under test, with rounding noise.
        known: the one of the bank.
        case: by which they were compared, or "layer N" for bugs in that layer only.
    """

    misfit: float
    bug: str
    known: str
    case: str


def limit_between(right: Naming, wrong: Naming) -> float:
    """The misfit up to which a bug is named: the geometric mean of the two, to two digits.

    Args:
        right: the largest misfit of a bug with the known one that it is.
        wrong: the smallest of a bug with a known one that it is not.

    Raises:
        ValueError: they overlap, so that no limit separates them.
    """
    if right.misfit >= wrong.misfit:
        raise ValueError(f"{wrong} fits no worse than {right}: no limit separates them.")
    return float(f"{math.sqrt(right.misfit * wrong.misfit):.2g}")


def misfit_limit() -> float:
    """Largest misfit of a bug that counts as found; see `diagnosis.measure`."""
    text = resources.files(__package__).joinpath(PATH.name).read_text("utf-8")
    return float(json.loads(text)["misfit_limit"])


def misfit(one: Observation, other: Observation) -> float:
    """0 if both subjects failed alike up to rounding, 1 if they have nothing in common.

    The root mean square over the comparisons in which one of them is off by more than rounding,
    and over the requirements at which the case ended. Symmetric.
    """
    parts = []
    for name in one.residuals.keys() | other.residuals.keys():
        a, b = one.residuals.get(name), other.residuals.get(name)
        # A case that passed keeps nothing; one that ended early has not made the comparison.
        if (a is not None and _loud(a)) or (b is not None and _loud(b)):
            parts.append(1.0 if a is None or b is None else _distance(a, b))
    if one.requirement or other.requirement:
        parts.append(_message_distance(one.requirement, other.requirement))
    return math.sqrt(sum(part**2 for part in parts) / len(parts)) if parts else 0.0


def alignment(subject: Observation, bug: Observation) -> tuple[float | None, float | None]:
    """Cosine of the angle between the errors, and the subject's size along the bug's direction.

    None where one of them has no errors to compare.
    """
    names = [
        name
        for name, value in subject.residuals.items()
        if name in bug.residuals and bug.residuals[name].shape == value.shape
    ]
    if not names or not (subject.wrong and bug.wrong):
        return None, None
    s, b = (
        np.concatenate([each.residuals[name] for name in names]).astype(np.float64)
        for each in (subject, bug)
    )
    product, square = float(s @ b), float(b @ b)
    length = math.sqrt(float(s @ s) * square)
    return (product / length, product / square) if length > 0 else (None, None)


def compared(residual: np.ndarray) -> Observation:
    """One comparison by itself, as an observation."""
    return Observation("", {"logits": residual}, ("logits",) if _loud(residual) else (), "")


def _loud(residual: np.ndarray) -> bool:
    """Whether it is more than rounding may make."""
    return _length(residual) > _allowed(residual)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """What is between them beyond rounding, over the longer of the two; 1 at most."""
    if a.shape != b.shape:
        return 1.0
    between = _length(a.astype(np.float64) - b) ** 2 - _allowed(a) ** 2
    return min(1.0, math.sqrt(max(0.0, between)) / max(_length(a), _length(b)))


def _allowed(residual: np.ndarray) -> float:
    """Length of a residual at the error model's limit."""
    return RATIO_LIMIT * math.sqrt(residual.size)


def _length(residual: np.ndarray) -> float:
    return float(np.linalg.norm(residual.astype(np.float64)))


def _message_distance(one: str, other: str) -> float:
    """Relative distance of the numbers in two messages that have the same words; else 1."""
    if _NUMBER.sub("#", one) != _NUMBER.sub("#", other):
        return 1.0
    a, b = (np.array([float(x) for x in _NUMBER.findall(text)]) for text in (one, other))
    if not a.size or np.array_equal(a, b):
        return 0.0
    relative: Any = np.abs(a - b) / np.maximum(np.maximum(np.abs(a), np.abs(b)), 1e-300)
    return min(1.0, float(np.sqrt(np.mean(np.square(relative)))))
