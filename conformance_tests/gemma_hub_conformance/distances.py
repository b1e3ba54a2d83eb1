"""How far backends are from one another, in units of rounding noise.

The verdict does not depend on this: each backend is judged by the float64 reference, and two that
are right may be further from each other than from it. The distances show which of several backends
stands apart, and how much of a difference between two is rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from gemma_hub.error_model import judge, noise_band
from gemma_hub_conformance.cases.cache import CAPACITY, ONE_BY_ONE, prompts
from gemma_hub_conformance.cases.forward import LENGTH, padded
from gemma_hub_conformance.checkpoints import CHECKPOINTS, DesignedCheckpoint
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import Distance
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.seeds import seeded
from gemma_hub_conformance.spec import CaseContext, Subject
from gemma_hub_conformance.time_limit import TimedOut, time_limit

REFERENCE = "the truth"
"""The float64 reference takes part under this name, which no backend can have."""

# One for each way of sharing heads, and the two that add parameters.
COMPARED = ("gqa", "mqa", "mha", "untied", "bias")
WAYS = ("forward", "cache")
_DTYPE = "float32"


def measure_distances(
    subjects: Sequence[Subject],
    oracle: Oracle,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[Distance, ...]:
    """The distance of every pair of `subjects`, and of each from the reference, on every input.

    A subject that does not claim what an input needs, or fails on it, has no distance there, and
    the reason in its place. Two backends that are right differ by about the square root of 2.

    Args:
        subjects: backends with different names.
        oracle: the reference and its witnesses.
        seed: of the run, as for `gemma_hub_conformance.engine.run_conformance`.
        progress: told before each checkpoint what is done.

    Raises:
        InputError: the seed is none.
    """
    distances: list[Distance] = []
    with seeded(seed):
        for name in COMPARED:
            for way in WAYS:
                if progress:
                    progress(f"comparing backends: {name}, {way}")
                distances += _on_input(CHECKPOINTS[name], way, subjects, oracle)
    return tuple(distances)


@dataclass(frozen=True, slots=True)
class _Result:
    """What one member gave: (n, V) logits of the real tokens, or None and the reason."""

    name: str
    logits: np.ndarray | None
    reason: str = ""


def _on_input(
    checkpoint: DesignedCheckpoint, way: str, subjects: Sequence[Subject], oracle: Oracle
) -> Iterator[Distance]:
    forward = way == "forward"
    batch = Batch.of(padded("left_padding"), LENGTH) if forward else prompts("left_padding")
    truth = oracle.truth(checkpoint, batch.rows, _DTYPE)
    band = noise_band(truth.logits, truth.witness_logits)
    results = [_Result(REFERENCE, truth.logits)]
    results += [_result(each, checkpoint, batch, way, oracle) for each in subjects]
    for first, second in combinations(results, 2):
        ratio = None
        if first.logits is not None and second.logits is not None:
            # What the error would be if the whole difference were one.
            with np.errstate(invalid="ignore"):  # infinity less infinity, which is judged so
                apart = second.logits - first.logits
            ratio = judge(truth.logits + apart, truth.logits, band).ratio
        reasons = [f"{each.name}: {each.reason}" for each in (first, second) if each.reason]
        yield Distance(first.name, second.name, checkpoint.name, way, ratio, "; ".join(reasons))


def _result(
    subject: Subject, checkpoint: DesignedCheckpoint, batch: Batch, way: str, oracle: Oracle
) -> _Result:
    if subject.harm:
        return _Result(subject.name, None, f"not run: {subject.harm}")
    if _DTYPE not in subject.dtypes:
        return _Result(subject.name, None, f"does not claim the dtype {_DTYPE!r}")
    if way == "cache" and way not in subject.claims:
        return _Result(subject.name, None, f"does not claim {way!r}")
    try:
        with time_limit(subject.time_limit):
            logits = _logits(CaseContext(subject, oracle, _DTYPE), checkpoint, batch, way)
    except TimedOut as stop:
        subject.harm = f"{checkpoint.name}, {way} {stop}"
        return _Result(subject.name, None, str(stop))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a backend may raise anything; it is a reason
        return _Result(subject.name, None, f"{type(error).__name__}: {error}")
    expected = (*batch.mask.shape, checkpoint.config.vocab_size)
    if logits.shape != expected:
        reason = f"the logits have shape {logits.shape}; expected {expected}"
        return _Result(subject.name, None, reason)
    return _Result(subject.name, logits[batch.mask])


def _logits(
    context: CaseContext, checkpoint: DesignedCheckpoint, batch: Batch, way: str
) -> np.ndarray:
    """(B, T, V) float64, if the backend is right."""
    if way == "cache":
        logits = context.extend(checkpoint, batch, ONE_BY_ONE, CAPACITY)
    else:
        logits = context.forward(checkpoint, batch).logits
    return np.asarray(logits, dtype=np.float64)
