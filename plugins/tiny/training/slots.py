"""Slots as labels of tokens, back from labels to spans, and the score of spans.

Labels are those of words: "B-city" for the first word of a city, "I-city" for its other words, "O"
for the rest. A word is a run of letters and digits, or one other character that is not a space. All
tokens of a word have its label, and the label of a word is read from its last token, the only one
that has seen the whole word: a Gemma reads from left to right.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from training.queries import Query, Span

OUTSIDE = "O"
_WORD = re.compile(r"\w+|[^\w\s]")

Offsets = Sequence[tuple[int, int]]
"""Of each token the index of its first character, and the index after its last one."""


def names_of(queries: Iterable[Query]) -> list[str]:
    """The labels: "O", then two for each slot, in alphabetical order of the slots."""
    slots = sorted({slot for query in queries for slot, _, _ in query.spans})
    return [OUTSIDE, *(f"{mark}-{slot}" for slot in slots for mark in "BI")]


def labels_of(text: str, spans: Sequence[Span], offsets: Offsets) -> list[str]:
    """The label of each token, from where it is in `text`."""
    words = dict(_words(text, spans))
    labels = []
    for start, end in offsets:
        end = start + len(text[start:end].rstrip())
        inside = [name for (i, j), name in words.items() if start < end and i < end <= j]
        labels.append(inside[0] if inside else OUTSIDE)
    return labels


def _words(text: str, spans: Sequence[Span]) -> Iterator[tuple[tuple[int, int], str]]:
    """Place and label of each word."""
    begun: set[Span] = set()
    for match in _WORD.finditer(text):
        i, j = match.span()
        span = next((span for span in spans if i < span[2] and span[1] < j), None)
        if span is None:
            yield (i, j), OUTSIDE
        else:
            yield (i, j), f"{'I' if span in begun else 'B'}-{span[0]}"
            begun.add(span)


def spans_of(text: str, labels: Sequence[str], offsets: Offsets) -> list[Span]:
    """The spans that the labels of the tokens make.

    A word with "B-", and one with "I-" after "O", begins a span; "I-" goes on with it, whatever the
    slot. Where its words name several slots, the last one counts: it has seen the most.
    """
    spans: list[Span] = []
    is_open = False
    for match in _WORD.finditer(text):
        i, j = match.span()
        covering = [n for n, (a, b) in zip(labels, offsets, strict=True) if a < j <= b]
        mark, _, slot = (covering[-1] if covering else OUTSIDE).partition("-")
        if mark == "I" and is_open:
            spans[-1] = (slot, spans[-1][1], j)
        elif mark != OUTSIDE:
            spans.append((slot, i, j))
        is_open = mark != OUTSIDE
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
