"""L2.positions: position_ids are obeyed, far from 0, with gaps, and where they start again."""

from functools import partial

from gemma_hub_conformance.cases.forward import LENGTH
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

OFFSETS = (0, 250, 257, 4001, 8190)  # bfloat16 holds every integer up to 256 and few above


def cases() -> list[CaseSpec]:
    """The offsets, a gap, documents packed into one row, linear scaling far out."""
    offsets = [
        CaseSpec(
            f"L2.positions.offset_{offset}",
            f"Positions from {offset} up, on a padded batch.",
            partial(_from_offset, checkpoint=GQA, offset=offset),
        )
        for offset in OFFSETS
    ]
    return [
        *offsets,
        CaseSpec(
            "L2.positions.linear_rope_offset_4001",
            "Positions from 4001 up, divided by the factor of linear RoPE scaling.",
            partial(_from_offset, checkpoint=CHECKPOINTS["linear_rope"], offset=4001),
        ),
        CaseSpec("L2.positions.gap", "A gap of 300 positions inside a row.", _gap),
        CaseSpec(
            "L2.positions.packed",
            "Two documents in one row: the positions start again at 0.",
            _packed,
        ),
    ]


def _from_offset(context: CaseContext, checkpoint: DesignedCheckpoint, offset: int) -> None:
    lefts = (0, 9, 3)
    rows = [
        row(tokens(LENGTH - left, 20 + left), left, range(offset, offset + LENGTH - left))
        for left in lefts
    ]
    _judge(context, checkpoint, Batch.of(rows, LENGTH))


def _gap(context: CaseContext) -> None:
    gaps = (5, 11, 17)
    rows = [
        row(tokens(LENGTH, 30 + gap), 0, [*range(gap), *range(gap + 300, LENGTH + 300)])
        for gap in gaps
    ]
    _judge(context, GQA, Batch.of(rows, LENGTH))


def _packed(context: CaseContext) -> None:
    starts = (9, 14, 20)
    rows = [
        row(tokens(LENGTH, 40 + start), 0, [*range(start), *range(LENGTH - start)])
        for start in starts
    ]
    _judge(context, GQA, Batch.of(rows, LENGTH))


def _judge(context: CaseContext, checkpoint: DesignedCheckpoint, batch: Batch) -> None:
    context.judge_logits(context.forward(checkpoint, batch).logits, checkpoint, batch)
