"""The queries of the SNIPS benchmark: texts to a voice assistant, each with its intent and slots.

What the files are, and where they come from, is in the SOURCE.txt beside them.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "data" / "classification" / "snips"
INTENTS = (
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
)
SHA256 = {
    "train_AddToPlaylist.json": (
        "553197a443cab26ab826dfdd43bd183faaae097c0f656f2bbd80cc116da28c3f"
    ),
    "train_BookRestaurant.json": (
        "b07de5634d4ecba87428bfbbeec6b14359ba727c92ccb3522238aa5fc6a2ba1a"
    ),
    "train_GetWeather.json": ("2b15bd68a5af583dd65b5e20871b9462b8c7ef458016e8115a428c6f7c2b4b97"),
    "train_PlayMusic.json": ("7841351e7bf9f3fb87fc41ce291a02636c51d2a9a4c19c11491fa4cba7a40c3f"),
    "train_RateBook.json": ("ebc159ffdebbd89a2a1f13ab48b5af4d59f4a647ccf2fb3d962fc06e1114e84d"),
    "train_SearchCreativeWork.json": (
        "1997aedffa7227fe572e7616dc8ec836f8f8f2447391069ebb59c6491a946425"
    ),
    "train_SearchScreeningEvent.json": (
        "7dd079699f1141675a1f4f71c5a4aee7065609198e9470613e566768aae0873d"
    ),
    "validate_AddToPlaylist.json": (
        "14cc9ee49ae477b1452632a6e835498cf4c32da397b16967c82abb3e50403e83"
    ),
    "validate_BookRestaurant.json": (
        "4f7258ccc768b777b2eb8916532db9aa50dbd058ddf1ffb0dc59218963e7442a"
    ),
    "validate_GetWeather.json": (
        "60c095e193655d6ca92be220fed3926ca25e18cd70c85664145efe25d80993af"
    ),
    "validate_PlayMusic.json": ("922212775e26259d5bffeaf79b6048d070ca017d229df00b2cc9800f71c75d20"),
    "validate_RateBook.json": ("c1f8b4114da0bb5e8afd78a8062766e18b2eabb0e717539598db01b09d04619b"),
    "validate_SearchCreativeWork.json": (
        "8a5e830eddb185d3e4a9d27ded140a145d04766bdce0e58834676ede32d13e77"
    ),
    "validate_SearchScreeningEvent.json": (
        "81e1445713e03c7c3e615353c5f3fee05f369fe9834100b9b9735900a96b9498"
    ),
}

Span = tuple[str, int, int]
"""Slot, index of its first character, index after its last one."""


@dataclass(frozen=True)
class Query:
    """One query: its intent, and its text in parts, each with its slot or None."""

    intent: str
    parts: tuple[tuple[str, str | None], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)

    @property
    def spans(self) -> list[Span]:
        """The slots, without the spaces that some annotations have at their ends."""
        spans, start = [], 0
        for text, slot in self.parts:
            end = start + len(text)
            if slot is not None and text.strip():
                left = len(text) - len(text.lstrip())
                spans.append((slot, start + left, start + len(text.rstrip())))
            start = end
        return spans


def read(folder: Path, part: str) -> list[Query]:
    """The queries of the "train" or the "validate" files, intent by intent.

    Each file is checked against the hash that this project was built with.
    """
    queries = []
    for intent in INTENTS:
        name = f"{part}_{intent}.json"
        content = (folder / name).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256[name]:
            raise SystemExit(f"{folder / name} has sha256 {found}; expected {SHA256[name]}.")
        for row in json.loads(content.decode("utf-8"))[intent]:
            parts = tuple((piece["text"], piece.get("entity")) for piece in row["data"])
            queries.append(Query(intent, parts))
    return queries


@dataclass(frozen=True)
class Data:
    """What is learned from, what says when to stop, and what the result is judged by."""

    training: list[Query]
    stopping: list[Query]
    held_out: list[Query]


def split(train: Sequence[Query], validate: Sequence[Query], seed: int) -> Data:
    """A tenth of the training queries of each intent says when to stop.

    Training queries that are also among the validation queries are left out.
    """
    rng = np.random.default_rng(seed)
    known = {query.text for query in validate}
    training, stopping = [], []
    for intent in INTENTS:
        queries = [q for q in train if q.intent == intent and q.text not in known]
        order = rng.permutation(len(queries))
        border = len(queries) // 10
        stopping += [queries[i] for i in order[:border]]
        training += [queries[i] for i in order[border:]]
    return Data(training, stopping, list(validate))


def values_of(queries: Iterable[Query]) -> dict[str, list[str]]:
    """{slot: every text that fills it in `queries`, as often as it does}."""
    values = defaultdict(list)
    for query in queries:
        for text, slot in query.parts:
            if slot is not None:
                values[slot].append(text)
    return dict(values)


def substituted(
    query: Query, values: Mapping[str, Sequence[str]], rate: float, rng: np.random.Generator
) -> Query:
    """`query` with each slot filled anew, with probability `rate`, by another query's text."""
    parts = []
    for text, slot in query.parts:
        if slot is not None and rng.random() < rate:
            text = values[slot][rng.integers(len(values[slot]))]
        parts.append((text, slot))
    return Query(query.intent, tuple(parts))
