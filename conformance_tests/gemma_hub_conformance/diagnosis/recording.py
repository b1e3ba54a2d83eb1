"""Running a case so that all it compared is kept, where the engine keeps the verdict only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Never

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.error_model import Judgement, NoiseBand, noise_band
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.claims import check_dtype_refused, check_refused
from gemma_hub_conformance.diagnosis.crashes import Crash, crash_of
from gemma_hub_conformance.diagnosis.watching import Seen, watched
from gemma_hub_conformance.oracle import Gradients, Oracle, Truth
from gemma_hub_conformance.rows import Row
from gemma_hub_conformance.spec import CaseContext, CaseFailed, CaseSpec, Subject
from gemma_hub_conformance.time_limit import TimedOut, time_limit

_NOT_FINITE = 1e30
"""Stands for an error of NaN or infinity: far above every other one, and squares stay finite."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one case saw of one subject.

    Attributes:
        case: its id.
        residuals: by comparison, the errors in units of the rounding noise of their element, as one
            float32 vector; an error that is NaN or infinite is a very large number.
        wrong: names of the comparisons that failed.
        requirement: message of the requirement or the exception at which the case ended; empty if
            it ran to its end.
        inputs: what the models of the case were called with, in order.
        crash: the exception at which the case ended, if it was one.
        built: the checkpoints that the case asked a model of, in order.
    """

    case: str
    residuals: dict[str, np.ndarray]
    wrong: tuple[str, ...]
    requirement: str
    inputs: tuple[Seen, ...] = ()
    crash: Crash | None = None
    built: tuple[DesignedCheckpoint, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the case did."""
        return bool(self.wrong or self.requirement)


def observe(case: CaseSpec, subject: Subject, oracle: Oracle) -> Observation:
    """Run `case` on `subject` to its end, past comparisons that fail.

    Raises:
        TimedOut: the case does not end.
    """
    context = RecordingContext(subject, RecordingOracle(oracle), case.dtype)
    requirement, crash = "", None
    try:
        with time_limit(subject.time_limit):
            if _claimed(case, subject):
                case.run(context)
    except CaseFailed as failure:
        requirement = str(failure)
    except (KeyboardInterrupt, TimedOut):
        raise
    except BaseException as error:  # noqa: BLE001 - a backend may raise anything, SystemExit too
        crash = crash_of(error, subject)
        requirement = crash.text
    if any(each.reason in requirement for each in context.judgements if not each.passed):
        requirement = ""  # it only repeats the comparisons
    return Observation(
        case.id,
        context.residuals,
        tuple(context.wrong),
        requirement,
        tuple(context.inputs),
        crash,
        tuple(context.built),
    )


def _claimed(case: CaseSpec, subject: Subject) -> bool:
    """Whether the subject claims what the case needs; if not, it must refuse it."""
    for need in sorted(case.needs - subject.claims, reverse=True):
        check_refused(subject, need)
        return False
    if case.dtype not in subject.dtypes:
        check_dtype_refused(subject, case.dtype)
        return False
    return True


class RecordingOracle(Oracle):
    """An oracle that takes what another one has, and knows the gradients that it gave last."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        self._oracle = oracle
        self.last_gradients: Gradients = {}

    def truth(self, checkpoint: DesignedCheckpoint, rows: Sequence[Row], dtype: str) -> Truth:
        return self._oracle.truth(checkpoint, rows, dtype)

    def attentions(
        self, checkpoint: DesignedCheckpoint, each: Row
    ) -> tuple[tuple[np.ndarray, ...], ...]:
        return self._oracle.attentions(checkpoint, each)

    def gradients(
        self,
        checkpoint: DesignedCheckpoint,
        rows: Sequence[Row],
        labels: Sequence[np.ndarray],
        divisor: int,
    ) -> tuple[Gradients, ...]:
        found = self._oracle.gradients(checkpoint, rows, labels, divisor)
        self.last_gradients = found[0]
        return found

    def name_of(self, reference: np.ndarray) -> str:
        """The parameter whose true gradient `reference` holds, in any shape; empty if none."""
        for name, value in self.last_gradients.items():
            # Not by the memory: a matrix that is laid out by columns is copied when it is reshaped.
            if value.size == reference.size and np.array_equal(value.ravel(), reference.ravel()):
                return name
        return ""


@dataclass
class RecordingContext(CaseContext):
    """A context whose comparisons are noted and do not end the case.

    Attributes:
        residuals: as in `Observation`.
        wrong: likewise.
        inputs: likewise.
        built: likewise.
    """

    oracle: RecordingOracle
    residuals: dict[str, np.ndarray] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    inputs: list[Seen] = field(default_factory=list)
    built: list[DesignedCheckpoint] = field(default_factory=list)

    def model(self, checkpoint: DesignedCheckpoint) -> Model:
        self.built.append(checkpoint)
        return watched(super().model(checkpoint), checkpoint, self.inputs)

    def compare(
        self,
        what: str,
        found: np.ndarray,
        reference: np.ndarray,
        witnesses: tuple[np.ndarray, ...],
    ) -> None:
        self._note(what, found, reference, witnesses)

    def judged(
        self, found: np.ndarray, reference: np.ndarray, witnesses: tuple[np.ndarray, ...]
    ) -> Judgement:
        return self._note(self.oracle.name_of(reference), found, reference, witnesses)

    def _note(
        self,
        what: str,
        found: np.ndarray,
        reference: np.ndarray,
        witnesses: tuple[np.ndarray, ...],
    ) -> Judgement:
        judgement = super().judged(found, reference, witnesses)
        if found.shape != reference.shape:
            self.fail(f"{what}: {judgement.reason}")
        name = what
        while name in self.residuals:  # the same comparison of another batch
            name += "'"
        self.residuals[name] = residual(found, reference, noise_band(reference, witnesses))
        if not judgement.passed:
            self.wrong.append(name)
        return judgement

    def fail(self, message: str) -> Never:
        raise CaseFailed(message)


def residual(found: np.ndarray, reference: np.ndarray, band: NoiseBand) -> np.ndarray:
    """(n * V,) float32: the error of every element over its noise."""
    width = reference.shape[-1]
    errors = np.asarray(found, np.float64).reshape(-1, width) - reference.reshape(-1, width)
    units = np.where(np.isfinite(errors), errors, _NOT_FINITE) / band.element_rms
    return np.clip(units, -_NOT_FINITE, _NOT_FINITE).astype(np.float32).ravel()
