"""verify: whether a loaded model computes what its checkpoint's probe says."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.error_model import OUTPUT_ROUNDING, NoiseBand, judge
from gemma_hub.errors import InputError
from gemma_hub.probe.making import results
from gemma_hub.probe.record import Probe

UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Largest relative error of one rounding, by type."""

USUAL_NOISE = 16.0
"""Relative error of a Gemma's results in units of one rounding, where no witness measured it.

Witnesses of a trained 4-million-parameter model have 0.6 to 2.6, of random ones with large weights
6 to 17 (docs/how-to/verify.md)."""


FINER = 4.0
"""What noise that is scaled down to a finer type is multiplied by.

A narrow type keeps some results in float32, so its noise per rounding is less: that of the trained
model is 0.6 units in bfloat16 and 2.6 in float32."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of recomputing a probe.

    Attributes:
        passed: the model differs from the probe by rounding only.
        ratio: its error / the rounding noise, over all values; about 1 if it is right.
        worst_ratio: that of the worst value.
        dtype: the precision that it ran in.
        noise: where the noise is from: "measured" in this precision, "scaled" from another one,
            or "usual" where no witness ran.
        made_by: what made the probe, with versions.
        reason: one line that says why, also when it passed.
    """

    passed: bool
    ratio: float
    worst_ratio: float
    dtype: str
    noise: str
    made_by: dict[str, str]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it; null for a ratio that is not finite."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("ratio", "worst_ratio"):
            if not np.isfinite(record[name]):
                record[name] = None
        return record


def verify(model: Model, config: GemmaConfig, task: str, dtype: str, probe: Probe) -> Verification:
    """Compute a probe's values again and compare, in units of rounding noise.

    Args:
        model: the model, built on any backend.
        config: its config.
        task: what it was built for.
        dtype: the type that it was built in.
        probe: of the same checkpoint.

    Raises:
        InputError: the model was built for another task than the probe is of.
    """
    if task != probe.task:
        raise InputError(
            f"The probe is of the task {probe.task!r} and the model was loaded for {task!r}. "
            f"Load it with task={probe.task!r} to verify it."
        )
    found = results(model, config, task, probe.token_ids)[:, probe.columns]
    band, noise = _band(probe, dtype)
    judgement = judge(found, probe.values, band)
    return Verification(
        passed=judgement.passed,
        ratio=judgement.ratio,
        worst_ratio=judgement.worst_ratio,
        dtype=dtype,
        noise=noise,
        made_by=dict(probe.made_by),
        reason=judgement.reason,
    )


def _band(probe: Probe, dtype: str) -> tuple[NoiseBand, str]:
    """The noise to expect, and the word for where it is from."""
    # The probe's own values are no better than the precision that made them.
    coarser = max(dtype, probe.dtype, key=UNIT_ROUNDOFF.__getitem__)
    unit = UNIT_ROUNDOFF[coarser]
    norms = np.sqrt(np.square(probe.values).sum(axis=-1))
    norms = np.where(norms > 0, norms, 1.0)
    if probe.noise is None:
        word = "usual"
        tokens = np.full(len(norms), USUAL_NOISE * unit)
        elements = np.zeros_like(probe.values)
    else:
        word = "measured" if coarser == probe.noise.dtype else "scaled"
        measured = UNIT_ROUNDOFF[probe.noise.dtype]
        scale = unit / measured * (FINER if unit < measured else 1.0)
        tokens, elements = probe.noise.tokens * scale, probe.noise.elements * scale
    tokens = np.maximum(tokens, OUTPUT_ROUNDING)
    least = tokens * norms / np.sqrt(probe.columns.size)
    band = NoiseBand(
        rms=float(np.sqrt(np.mean(np.square(tokens)))),
        token_rms=tokens,
        element_rms=np.maximum(elements, least[:, None]),
        witness_ratios=(),
    )
    return band, word
