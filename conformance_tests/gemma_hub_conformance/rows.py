"""Rows of tokens and the slots they take in a batch: padding on any side, holes, positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub_conformance.checkpoints import PAD_ID, TINY_ROW_ID
from gemma_hub_conformance.seeds import entropy


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence in a batch.

    Attributes:
        ids: its real tokens.
        slots: the slot of each of them, ascending; every other slot is padding.
        positions: position of each token; None for 0, 1, 2, ...
    """

    ids: tuple[int, ...]
    slots: tuple[int, ...]
    positions: tuple[int, ...] | None = None


def row(ids: Sequence[int], left: int = 0, positions: Sequence[int] | None = None) -> Row:
    """`ids` without a hole, after `left` slots of padding."""
    slots = tuple(range(left, left + len(ids)))
    return Row(tuple(ids), slots, None if positions is None else tuple(positions))


def tokens(count: int, seed: int, vocab_size: int = 131) -> tuple[int, ...]:
    """Random ids, the same for the same arguments, one of them the row that shows epsilon.

    Args:
        count: how many.
        seed: which draw. Made while a case runs they depend on the run's seed too.
        vocab_size: ids are from 12 up to it.
    """
    rng = np.random.default_rng(entropy(seed, vocab_size))
    ids = rng.integers(12, vocab_size, count)
    if count > 2:
        ids[count // 3] = TINY_ROW_ID
    return tuple(int(i) for i in ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows laid out in (B, T) arrays.

    Attributes:
        rows: the sequences.
        input_ids: (B, T) int64, the pad id at padding.
        mask: (B, T) bool.
        position_ids: (B, T) int64, or None if no row has positions of its own.
    """

    rows: tuple[Row, ...]
    input_ids: np.ndarray
    mask: np.ndarray
    position_ids: np.ndarray | None

    @classmethod
    def of(cls, rows: Sequence[Row], length: int) -> "Batch":
        """`rows` in `length` slots."""
        ids = np.full((len(rows), length), PAD_ID, np.int64)
        mask = np.zeros(ids.shape, np.bool_)
        positions = np.zeros(ids.shape, np.int64)
        for b, each in enumerate(rows):
            slots = list(each.slots)
            ids[b, slots] = each.ids
            mask[b, slots] = True
            positions[b, slots] = each.positions or range(len(each.ids))
        explicit = any(each.positions is not None for each in rows)
        return cls(tuple(rows), ids, mask, positions if explicit else None)
