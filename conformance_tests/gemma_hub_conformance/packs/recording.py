"""What is right for one model and one batch: the reference's results, and how far rounding goes.

Every row is computed alone and without padding, and then put into its slots: so the numbers of a
pack come from a run that has no padding to get wrong. At padding they are 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.error_model import OUTPUT_ROUNDING, NoiseBand, noise_band
from gemma_hub.inputs import ModelInputs
from gemma_hub.labels import IGNORED
from gemma_hub.probe.verifying import UNIT_ROUNDOFF
from gemma_hub_conformance import losses
from gemma_hub_conformance.cases.losses import causal_labels
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.oracle import witness_roundings
from gemma_hub_conformance.packs.catalogue import GRADIENT, LOGITS, TensorSpec, tensors
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_numpy.model import Reference

Arrays = dict[str, np.ndarray]

LENGTH = 12
"""Slots of the batch."""

DRAWS = 8
"""Sets of labels: the noise of one loss alone could not be measured."""

_OFFSET = 8190
_FAR_ROW = 3
"""The row with positions from there on. It has no labels: its noise would drown the others' part in
losses and gradients."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Everything about one batch.

    Attributes:
        batch: the tokens; positions are stated for every row.
        labels: (DRAWS, B, T) int64, -100 where nothing is predicted.
        specs: what was recorded, in order of computation.
        arrays: {name: float64 array}, 0 at padding.
        bands: {name: its noise}, over `TensorSpec.as_vectors`.
    """

    batch: Batch
    labels: np.ndarray
    specs: tuple[TensorSpec, ...]
    arrays: Arrays
    bands: dict[str, NoiseBand]


def pack_batch() -> Batch:
    """Four rows: without padding, padded left, padded right, and far along on both sides."""
    ids = [tokens(count, 170 + b) for b, count in enumerate((LENGTH, 7, 8, 7))]
    rows = [
        row(ids[0], positions=range(LENGTH)),
        row(ids[1], left=LENGTH - 7, positions=range(7)),
        row(ids[2], positions=range(8)),
        row(ids[3], left=2, positions=range(_OFFSET, _OFFSET + 7)),
    ]
    return Batch.of(rows, LENGTH)


def record(checkpoint: DesignedCheckpoint, models: Sequence[Reference], dtype: str) -> Recording:
    """Run `models`, the reference first and then its witnesses in `dtype`, on a pack's batch."""
    batch = pack_batch()
    labels = np.stack([causal_labels(batch, seed, ignored=0.2) for seed in range(1, DRAWS + 1)])
    specs = tensors(checkpoint.config, len(batch.rows), LENGTH, DRAWS)
    labels[:, _FAR_ROW] = IGNORED
    found = [_run_rows(checkpoint, model, batch, labels[0], specs) for model in models]
    for arrays, single in zip(found, (losses.exact, *witness_roundings()), strict=True):
        arrays["losses"] = np.array(
            [losses.causal(arrays[LOGITS], single, each, None) for each in labels]
        )
    bands = {}
    for spec in specs:
        truth, *witnesses = (spec.as_vectors(arrays[spec.name], batch.mask) for arrays in found)
        in_float32 = spec.name in (LOGITS, "losses")
        bands[spec.name] = _band(truth, witnesses, "float32" if in_float32 else dtype)
    return Recording(batch, labels, specs, found[0], bands)


def _band(truth: np.ndarray, witnesses: Sequence[np.ndarray], dtype: str) -> NoiseBand:
    """The noise of (n, V) vectors that are rounded to `dtype` at the end.

    `noise_band` always allows for one rounding to float32. In a narrower type one rounding to that
    is allowed for in the same way: a probability of 0.9999 becomes 1 in bfloat16 nearly always and
    0.996 now and then, and eight witnesses may not show the second.
    """
    band = noise_band(truth, witnesses)
    once = OUTPUT_ROUNDING * UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF["float32"]
    vectors = np.maximum(band.token_rms, once)
    norms = np.sqrt(np.square(truth).sum(axis=-1))
    least = vectors * np.where(norms > 0, norms, 1.0) / np.sqrt(truth.shape[-1])
    return NoiseBand(
        rms=float(np.sqrt(np.mean(np.square(vectors)))),
        token_rms=vectors,
        element_rms=np.maximum(band.element_rms, least[:, None]),
        witness_ratios=band.witness_ratios,
    )


def _run_rows(
    checkpoint: DesignedCheckpoint,
    model: Reference,
    batch: Batch,
    labels: np.ndarray,
    specs: Sequence[TensorSpec],
) -> Arrays:
    """One model's arrays but for the losses, row by row."""
    arrays = {spec.name: np.zeros(spec.shape) for spec in specs}
    divisor = int(np.count_nonzero(labels != IGNORED))
    for b, each in enumerate(batch.rows):
        slots = list(each.slots)
        inputs = ModelInputs.prepare(
            checkpoint.config,
            [each.ids],
            None,
            None if each.positions is None else [each.positions],
            labels=labels[b, slots][None],
            num_items_in_batch=divisor,
        )
        tape, gradients = run(model, inputs)
        for spec in specs:
            if spec.name.startswith(GRADIENT):
                arrays[spec.name] += gradients[spec.name.removeprefix(GRADIENT)]
            elif spec.vectors == "head":
                heads = range(spec.shape[1])
                arrays[spec.name][np.ix_([b], heads, slots, slots)] = tape[spec.tape]
            elif spec.tape:
                value = tape[spec.tape][0]
                arrays[spec.name][b, slots] = value.reshape(len(slots), *spec.shape[2:])
    return arrays


def run(model: Reference, inputs: ModelInputs) -> tuple[Arrays, Arrays]:
    """The tape of a call, under the reference's own names, and the gradients of its loss."""
    with model.taping() as tape:
        gradients = model.loss_and_gradients(inputs)[1]
    return tape, gradients
