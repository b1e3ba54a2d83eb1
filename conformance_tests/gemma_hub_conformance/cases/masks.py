"""L2.masks: what a token may depend on, and what it must depend on."""

import dataclasses

import numpy as np

from gemma_hub.error_model import noise_band, token_errors
from gemma_hub_conformance.cases.forward import LENGTH, padded
from gemma_hub_conformance.checkpoints import GQA, PAD_ID
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

CHANGED = 11  # index of the token that the perturbation cases change
VISIBLE = 100.0  # a change must be this many times the noise to count as one


def cases() -> list[CaseSpec]:
    """Future and past, ids that look like padding, holes and rows of nothing but padding."""
    return [
        CaseSpec("L2.masks.future", "Changing a token leaves the logits before it alone.", _future),
        CaseSpec("L2.masks.past", "Changing a token changes every later logit rightly.", _past),
        CaseSpec(
            "L2.masks.pad_id_as_token",
            "The pad id with mask 1 is a token like any other.",
            _pad_id_as_token,
        ),
        CaseSpec(
            "L2.masks.padding_content",
            "Which ids stand at padding makes no difference.",
            _padding_content,
        ),
        CaseSpec("L2.masks.hole", "Padding in the middle of a row.", _hole),
        CaseSpec(
            "L2.masks.fully_masked_row",
            "A row of padding only is finite and leaves the other rows right.",
            _fully_masked_row,
        ),
    ]


def _perturbed() -> tuple[Batch, Batch]:
    rows = padded("no_padding")
    changed = []
    for each in rows:
        ids = list(each.ids)
        ids[CHANGED] = 12 + (ids[CHANGED] + 50) % 119
        changed.append(row(ids))
    return Batch.of(rows, LENGTH), Batch.of(changed, LENGTH)


def _future(context: CaseContext) -> None:
    before, after = _perturbed()
    first = context.forward(GQA, before).logits[:, :CHANGED]
    second = context.forward(GQA, after).logits[:, :CHANGED]
    truth = context.oracle.truth(GQA, [_head(each) for each in before.rows], context.dtype)
    # The change that was found is put on the truth, where it must vanish in the noise.
    moved = truth.logits + (second - first).reshape(truth.logits.shape).astype(np.float64)
    context.compare("logits before the changed token", moved, truth.logits, truth.witness_logits)


def _head(each: Row) -> Row:
    return row(each.ids[:CHANGED])


def _past(context: CaseContext) -> None:
    before, after = _perturbed()
    found = [context.forward(GQA, batch).logits for batch in (before, after)]
    context.judge_logits(found[1], GQA, after)
    truth = context.oracle.truth(GQA, before.rows, context.dtype)
    band = noise_band(truth.logits, truth.witness_logits)
    moved = token_errors(found[1], found[0]).reshape(before.mask.shape)
    still = np.argwhere(moved[:, CHANGED:] < VISIBLE * band.rms)
    context.require(
        not len(still),
        f"changing token {CHANGED} leaves the logits of row, token "
        f"{[(int(b), int(t) + CHANGED) for b, t in still[:5]]} as they were",
    )


def _pad_id_as_token(context: CaseContext) -> None:
    rows = []
    for left, places in ((0, (0, 7)), (9, (0, 13)), (2, (5, 6, 20))):
        ids = list(tokens(LENGTH - left, 50 + left))
        for place in places:
            ids[place] = PAD_ID
        rows.append(row(ids, left))
    batch = Batch.of(rows, LENGTH)
    context.judge_logits(context.forward(GQA, batch).logits, GQA, batch)


def _padding_content(context: CaseContext) -> None:
    for padding in ("left_padding", "right_padding"):
        batch = Batch.of(padded(padding), LENGTH)
        noise = np.array(tokens(batch.mask.size, 60)).reshape(batch.mask.shape)
        ids = np.where(batch.mask, batch.input_ids, noise)
        batch = dataclasses.replace(batch, input_ids=ids)
        context.judge_logits(context.forward(GQA, batch).logits, GQA, batch)


def _hole(context: CaseContext) -> None:
    slots = [
        [slot for slot in range(LENGTH) if slot not in hidden]
        for hidden in ({9}, {0, 1, 8, 9, 10}, {5, 14, 22})
    ]
    rows = [Row(tokens(len(each), 70 + len(each)), tuple(each)) for each in slots]
    batch = Batch.of(rows, LENGTH)
    context.judge_logits(context.forward(GQA, batch).logits, GQA, batch)


def _fully_masked_row(context: CaseContext) -> None:
    rows = (row(tokens(23, 1)), Row((), ()), row(tokens(14, 4), left=9))
    batch = Batch.of(rows, LENGTH)
    outputs = context.forward(GQA, batch, output_hidden_states=True)
    arrays = (outputs.logits, *(outputs.hidden_states or ()))
    context.require(
        all(bool(np.isfinite(array).all()) for array in arrays),
        "a row of padding only, or a padding slot, has NaN or infinite values",
    )
    kept = Batch.of((rows[0], rows[2]), LENGTH)
    context.judge_logits(outputs.logits[[0, 2]], GQA, kept)
