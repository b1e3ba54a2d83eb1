"""The corpus: six books in one file, split into training and held-out stories, cut into rows.

What the file is, and where it comes from, is in the SOURCE.txt beside it.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BYTES = 2_283_967
SHA256 = "7c9c60aadd38efc7376ee45dce391126b4935ddda50beb0ec399b40a3ed81e72"
HELD_OUT = 0.05

# Title of each book's first story. The books follow one another in this order.
BOOKS = {
    "Grimms' Fairy Tales": "THE GOLDEN BIRD",
    "The Blue Fairy Book": "THE BRONZE RING",
    "The Yellow Fairy Book": "THE CAT AND THE MOUSE IN PARTNERSHIP",
    "Aesop's Fables (Jones)": "THE FOX AND THE GRAPES",
    "The Fables of Aesop (Jacobs)": "The Cock and the Pearl",
    "Dorothy and the Wizard in Oz": "THE EARTHQUAKE",
}

_SENTENCE_START = re.compile(r"(?<=[.!?\"'])\s+(?=[\"'A-Z(])")


@dataclass(frozen=True)
class Story:
    """One story or chapter: its title line, and the paragraphs after it."""

    title: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.title}\n\n{self.body}" if self.title else self.body


def read(path: Path) -> str:
    """The corpus file, checked against the hash that this project was built with."""
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{path} has sha256 {found}; expected {SHA256}. It is another corpus.")
    return data.decode("utf-8")


def books(text: str) -> dict[str, str]:
    """{name: text} of each book, found by the title of its first story."""
    starts = [
        0 if i == 0 else text.index(f"\n\n\n{title}\n") for i, title in enumerate(BOOKS.values())
    ]
    if sorted(starts) != starts or not text.startswith(next(iter(BOOKS.values()))):
        raise SystemExit("The books are not in the expected order.")
    ends = [*starts[1:], len(text)]
    return {
        name: text[start:end].strip("\n")
        for name, start, end in zip(BOOKS, starts, ends, strict=True)
    }


def split(text: str) -> tuple[list[Story], list[Story]]:
    """Training and held-out stories: the last twentieth of each book is held out.

    The border is the paragraph end nearest before the last 5 %; where it falls inside a story, the
    story's head is for training and its tail, without the title, is held out.
    """
    training: list[Story] = []
    held_out: list[Story] = []
    for book in books(text).values():
        border = book.rindex("\n\n", 0, round(len(book) * (1 - HELD_OUT)))
        training += _stories(book[:border], has_title=True)
        held_out += _stories(book[border:], has_title=book[border:].startswith("\n\n\n"))
    return training, held_out


def _stories(text: str, has_title: bool) -> list[Story]:
    stories = []
    for i, part in enumerate(text.strip("\n").split("\n\n\n")):
        title, _, body = part.strip("\n").partition("\n\n")
        if i == 0 and not has_title:
            title, body = "", part.strip("\n")
        if body.strip():
            stories.append(Story(title.strip(), body.strip("\n")))
    return stories


Encode = Callable[[str], list[int]]


def broken(encode: Encode, text: str, rate: float, rng: np.random.Generator) -> list[int]:
    """Ids of `text` cut at random places first, so that the same words get other pieces.

    It is the effect of BPE dropout, with a generator that can be seeded. `rate` is the chance of a
    cut per character.
    """
    cuts = np.flatnonzero(rng.random(len(text)) < rate) if rate else []
    edges = [0, *map(int, cuts), len(text)]
    return [i for a, b in itertools.pairwise(edges) for i in encode(text[a:b])]


def training_rows(
    stories: list[Story],
    encode: Encode,
    decode: Callable[[list[int]], str],
    rng: np.random.Generator,
    *,
    length: int,
    bos: int,
    eos: int,
    cut_rate: float,
) -> Iterator[list[int]]:
    """One epoch: rows of at most `length + 1` ids, in random order of stories.

    A row is <bos> and what follows from the start of a story or of a sentence, so that a model
    asked to write from <bos> starts where a text starts. Half of the time a story comes without
    its title. <eos> ends the last row of a story.
    """
    for index in rng.permutation(len(stories)):
        story = stories[index]
        text = story.text if rng.random() < 0.5 else story.body
        starts = [0, *(match.end() for match in _SENTENCE_START.finditer(text))]
        start = 0
        while start < len(text):
            ids = broken(encode, text[start : start + 8 * length], cut_rate, rng)[:length]
            end = start + len(decode(ids))
            if end >= len(text):
                yield [bos, *ids, eos][: length + 1]
                break
            yield [bos, *ids]
            later = [s for s in starts if (start + end) // 2 < s <= end]
            start = later[-1] if later else end


def held_out_rows(
    stories: list[Story], encode: Encode, *, length: int, bos: int
) -> tuple[list[list[int]], int]:
    """Rows that hold every token of the held-out stories once, and the stories' UTF-8 bytes.

    Each story is encoded whole and cut every `length` ids; <bos> goes in front of each piece.
    """
    rows = []
    for story in stories:
        ids = encode(story.text)
        rows += [[bos, *ids[i : i + length]] for i in range(0, len(ids), length)]
    return rows, sum(len(story.text.encode("utf-8")) for story in stories)


def overlap(training: list[Story], held_out: list[Story], words: int = 8) -> float:
    """Share of the held-out runs of `words` words that also occur in the training stories.

    Some tales stand in two of the books, in two translations.
    """

    def runs(stories: list[Story]) -> list[tuple[str, ...]]:
        found = []
        for story in stories:
            tokens = re.findall(r"[a-z']+", story.text.lower())
            found += [tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)]
        return found

    seen = set(runs(training))
    asked = runs(held_out)
    return sum(run in seen for run in asked) / len(asked)
