"""L2.lengths: inputs at and just above the sizes in which kernels cut their work.

A kernel that works in blocks of 16, 32, 64 or 128 treats the last, shorter block apart, and that is
where it goes wrong. 64 and 65 tokens show that for blocks of 16 and 32 too, and 128 and 129 for all
of them; most other cases have 23. A model of one layer has every operation.
"""

from functools import partial

from gemma_hub_conformance.cases.liveness import ONE_LAYER
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

BLOCKS = (64, 128)
CAPACITY = 133  # no multiple of anything that a kernel cuts in
CHUNKS = {
    "one_by_one": ([14, *[1] * 117], "A prompt of 14 tokens and 117 more, one at a time."),
    # The sizes of the other, so that a compiled backend has them already.
    "in_chunks": ([14, 14, 1, 14, 14, 14, 14, 14, 1, 1, 14, 14, 1, 1], "Chunks across blocks."),
}
"""Ways to feed a cache with 131 slots: their sizes, and what they show."""


def cases() -> list[CaseSpec]:
    """Whole sequences, and a cache whose slots fill up past every block."""
    whole = [
        CaseSpec(
            f"L2.lengths.around_{block}",
            f"Sequences of {block} and {block + 1} tokens, the second row padded on the left.",
            partial(_whole, block=block),
        )
        for block in BLOCKS
    ]
    cached = [
        CaseSpec(
            f"L2.lengths.cache_{how}",
            doc,
            partial(_cached, chunks=chunks),
            needs=frozenset({"cache"}),
        )
        for how, (chunks, doc) in CHUNKS.items()
    ]
    return [*whole, *cached]


def _batch(length: int, left: int) -> Batch:
    rows = [row(tokens(length, 200 + length)), row(tokens(length - left, 400 + length), left)]
    return Batch.of(rows, length)


def _whole(context: CaseContext, block: int) -> None:
    for length in (block, block + 1):
        batch = _batch(length, length // 3)
        context.judge_logits(context.forward(ONE_LAYER, batch).logits, ONE_LAYER, batch)


def _cached(context: CaseContext, chunks: list[int]) -> None:
    batch = _batch(sum(chunks), 5)
    logits = context.extend(ONE_LAYER, batch, chunks, CAPACITY)
    context.judge_logits(logits, ONE_LAYER, batch)
