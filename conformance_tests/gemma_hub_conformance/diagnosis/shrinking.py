"""The shortest failing input: rows, padding and tokens are taken away as long as it still fails."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.rows import Batch, Row

MAX_RUNS = 120
"""A compiled backend compiles each shape anew, so there is an end to it."""

MAX_SECONDS = 4.0
"""Likewise."""


def shrink(
    prober: Prober,
    seen: Seen,
    max_runs: int = MAX_RUNS,
    fails: Callable[[Seen], bool] | None = None,
) -> Seen:
    """`seen`, which fails, with as little as possible that still fails.

    No row, no run of padding and no single token can be left out of what is returned, unless
    `max_runs` or `MAX_SECONDS` came first.

    Args:
        prober: runs the subject, and counts.
        seen: an input that fails.
        max_runs: models to run at most.
        fails: tells whether an input fails; `prober.fails`, which looks at the logits, if None.
    """
    fails = fails or prober.fails
    late = time.monotonic() + MAX_SECONDS
    end = prober.runs + max_runs
    found = True
    while found:
        found = False
        for smaller in _smaller(seen):
            if prober.runs >= end or time.monotonic() > late:
                return seen
            if fails(smaller):
                seen, found = smaller, True
                break
    return seen


def _smaller(seen: Seen) -> Iterator[Seen]:
    """Inputs with less in them, those with the least first."""
    batch = seen.batch
    rows = [each for each in batch.rows if each.ids]
    if len(batch.rows) > 1:
        for each in sorted(rows, key=lambda r: len(r.ids)):
            yield _without_padding(seen, (each,))
        for each in rows:
            yield replace(seen, batch=Batch.of((each,), batch.mask.shape[1]))
        for number in range(len(batch.rows)):
            left = (*batch.rows[:number], *batch.rows[number + 1 :])
            if any(each.ids for each in left):
                yield replace(seen, batch=Batch.of(left, batch.mask.shape[1]))
    if batch.position_ids is not None:
        plain = [Row(each.ids, each.slots) for each in batch.rows]
        yield replace(seen, batch=Batch.of(plain, batch.mask.shape[1]))
    yield from _fewer_slots(seen)


def _fewer_slots(seen: Seen) -> Iterator[Seen]:
    """Half of the slots left out, then a quarter, down to single ones; the last ones first."""
    length = seen.batch.mask.shape[1]
    size = length // 2
    while size:
        for end in range(length, 0, -size):
            kept = [slot for slot in range(length) if not end - size <= slot < end]
            smaller = _with_slots(seen, kept)
            if smaller is not None:
                yield smaller
        size //= 2


def _with_slots(seen: Seen, kept: list[int]) -> Seen | None:
    """Only these slots of every row and every call; None if no token is left."""
    places = {slot: new for new, slot in enumerate(kept)}
    rows = []
    for each in seen.batch.rows:
        index = [i for i, slot in enumerate(each.slots) if slot in places]
        rows.append(
            Row(
                tuple(each.ids[i] for i in index),
                tuple(places[each.slots[i]] for i in index),
                None if each.positions is None else tuple(each.positions[i] for i in index),
            )
        )
    if not any(each.ids for each in rows):
        return None
    batch = Batch.of(rows, len(kept))
    if seen.chunks is None:
        return replace(seen, batch=batch)
    chunks, start = [], 0
    for size in seen.chunks:
        chunks.append(sum(start <= slot < start + size for slot in kept))
        start += size
    return replace(seen, batch=batch, chunks=tuple(size for size in chunks if size))


def _without_padding(seen: Seen, rows: tuple[Row, ...]) -> Seen:
    """One row and none of its padding."""
    (only,) = rows
    alone = replace(seen, batch=Batch.of(rows, seen.batch.mask.shape[1]))
    smaller = _with_slots(alone, list(only.slots))
    return alone if smaller is None else smaller
