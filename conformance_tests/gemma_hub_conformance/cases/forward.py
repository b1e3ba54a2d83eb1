"""L2.forward: logits of every designed checkpoint, padded on every side."""

from collections.abc import Sequence
from functools import partial

from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, LATER, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

LENGTH = 23
"""Slots of every batch of three rows: one shape, so that a compiled backend compiles once."""

PADDINGS = ("no_padding", "left_padding", "right_padding", "both_sides")


def padded(padding: str) -> tuple[Row, ...]:
    """Three rows for `LENGTH` slots, padded as the name in `PADDINGS` says.

    The tokens are those of the run's seed, so this is called by a running case.
    """
    if padding == "no_padding":
        return row(tokens(23, 1)), row(tokens(23, 2)), row(tokens(23, 3))
    if padding == "left_padding":
        return row(tokens(23, 1)), row(tokens(14, 4), left=9), row(tokens(22, 5), left=1)
    if padding == "right_padding":
        return row(tokens(23, 1)), row(tokens(17, 6)), row(tokens(14, 4))
    return row(tokens(14, 4), left=4), row(tokens(17, 6), left=1), row(tokens(1, 7), left=11)


def left_padded() -> tuple[Row, ...]:
    """The rows that most cases take."""
    return padded("left_padding")


def cases() -> list[CaseSpec]:
    """Four paddings of each checkpoint, and the shapes that are not three rows of 23."""
    return [
        *(
            CaseSpec(
                f"L2.forward.{checkpoint.name}.{padding}",
                f"Logits of `{checkpoint.name}`: {padding.replace('_', ' ')}.",
                partial(_padded, checkpoint=checkpoint, padding=padding),
            )
            for checkpoint in CHECKPOINTS.values()
            for padding in PADDINGS
        ),
        CaseSpec(
            "L2.forward.single_row", "A batch of one row.",
            partial(_single_row, tokens_in_it=LENGTH),
        ),
        CaseSpec(
            "L2.forward.one_token", "A batch of one row of one token.",
            partial(_single_row, tokens_in_it=1),
        ),
        *(
            CaseSpec(
                f"L2.forward.{name}",
                f"Logits of a model with the feature `{name}`, on a padded batch.",
                partial(_padded, checkpoint=checkpoint, padding="left_padding"),
                needs=frozenset({name}),
            )
            for name, checkpoint in LATER.items()
        ),
        CaseSpec(
            "L2.padding.left_sweep",
            "0 to 17 slots of padding on the left: every count gives the unpadded row's logits.",
            _left_sweep,
        ),
    ]  # fmt: skip


def _padded(context: CaseContext, checkpoint: DesignedCheckpoint, padding: str) -> None:
    judge_sequences(context, checkpoint, padded(padding))


def _single_row(context: CaseContext, tokens_in_it: int) -> None:
    ids = tokens(tokens_in_it, 1 if tokens_in_it > 1 else 7)
    judge_sequences(context, GQA, (row(ids),), length=tokens_in_it)


def judge_sequences(
    context: CaseContext,
    checkpoint: DesignedCheckpoint,
    rows: Sequence[Row],
    length: int = LENGTH,
) -> None:
    """Fail unless the logits of `rows`, in a batch of `length` slots, are right."""
    batch = Batch.of(rows, length)
    context.judge_logits(context.forward(checkpoint, batch).logits, checkpoint, batch)


def _left_sweep(context: CaseContext) -> None:
    ids = tokens(5, 8)
    for first in range(0, 18, 3):
        judge_sequences(context, GQA, tuple(row(ids, left=first + i) for i in range(3)))
