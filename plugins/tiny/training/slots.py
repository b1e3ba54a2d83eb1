"""Slots as labels of tokens, and the score of spans.

A token has the label of the slot that it shares a character with, or "O". There is no mark for the
first token of a slot: in these queries no slot follows another of the same kind without a word
between them, so that runs of like labels give back every span.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from training.queries import Query, Span

OUTSIDE = "O"


def names_of(queries: Iterable[Query]) -> list[str]:
    """The labels: "O", then the slots in alphabetical order."""
    return [OUTSIDE, *sorted({slot for query in queries for slot, _, _ in query.spans})]


def labels_of(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The label of each token, from the characters that the tokens come from."""
    return [
        next((slot for slot, first, last in spans if start < last and first < end), OUTSIDE)
        for start, end in offsets
    ]


def spans_of(text: str, labels: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """The runs of tokens with the same slot, without spaces at their ends."""
    spans = []
    for label, run in groupby(zip(labels, offsets, strict=True), key=lambda pair: pair[0]):
        places = [place for _, place in run]
        start, end = places[0][0], places[-1][1]
        inner = text[start:end]
        if label != OUTSIDE and inner.strip():
            left = len(inner) - len(inner.lstrip())
            spans.append((label, start + left, start + len(inner.rstrip())))
    return spans


@dataclass(frozen=True)
class SpanScore:
    """How many spans there are, how many were found, and how many of those are right."""

    expected: int
    found: int
    right: int

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        return self.right / self.expected if self.expected else 0.0

    @property
    def f1(self) -> float:
        both = self.expected + self.found
        return 2 * self.right / both if both else 0.0


def score(expected: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]) -> SpanScore:
    """Spans count as right where slot, start and end are those expected; micro-averaged."""
    return next(iter(_scores(expected, found, by_slot=False).values()), SpanScore(0, 0, 0))


def scores_by_slot(
    expected: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]
) -> dict[str, SpanScore]:
    """{slot: its score}, in alphabetical order."""
    return _scores(expected, found, by_slot=True)


def _scores(
    expected: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]], by_slot: bool
) -> dict[str, SpanScore]:
    counts = {kind: Counter[str]() for kind in ("expected", "found", "right")}
    for there, said in zip(expected, found, strict=True):
        for kind, spans in (
            ("expected", set(there)),
            ("found", set(said)),
            ("right", set(there) & set(said)),
        ):
            counts[kind].update(slot if by_slot else "" for slot, _, _ in spans)
    slots = sorted(counts["expected"] | counts["found"])
    return {slot: SpanScore(**{kind: counts[kind][slot] for kind in counts}) for slot in slots}
