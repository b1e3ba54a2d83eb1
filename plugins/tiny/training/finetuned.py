"""From a fine-tuned model to the checkpoint folder with its figures and its card."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, ClassVar

from gemma_hub import Gemma, GemmaTokenizer
from training import queries, slots
from training.finetuning import History, Settings
from training.queries import INTENTS, Data, Query, Span
from training.slots import SpanScore

TOKENIZER = "tokenizer.model"
FIGURES = "training.json"
_BATCH = 32
_EXAMPLES = (
    "play some jazz",
    "What will the weather be like in Paris tomorrow?",
    "give this book four out of 5 stars",
    "book a table for two at a sushi bar in Boston",
    "add this song to my summer playlist",
)


@dataclass(frozen=True)
class Tuned:
    """What was trained, on what, how and from where; the model itself is in the folder.

    Attributes:
        data, settings, history: of the training.
        base: folder of the checkpoint that it started from.
    """

    data: Data
    settings: Settings
    history: History
    base: Path

    card: ClassVar[str]
    """File of the card's template."""
    point: ClassVar[str]
    """Its line for one epoch."""

    def results(self, folder: Path) -> dict[str, Any]:
        """Figures of the checkpoint in `folder` on the held-out queries."""
        raise NotImplementedError

    def examples(self, folder: Path) -> list[dict[str, Any]]:
        raise NotImplementedError

    def words(self, held_out: dict[str, Any]) -> dict[str, Any]:
        """What only this card's template has a place for."""
        raise NotImplementedError


class Intents(Tuned):
    """A classifier of whole queries."""

    card = "intents.md"
    point = "| {epoch} | {loss:.3f} | {lack:.4f} | {accuracy:.4f} |"

    def results(self, folder: Path) -> dict[str, Any]:
        asked = self.data.held_out
        return intent_figures(asked, classified(folder, "torch", asked))

    def examples(self, folder: Path) -> list[dict[str, Any]]:
        model = Gemma.load(
            folder, backend="torch", task="sequence_classification", dtype="float32", device="cpu"
        )
        return [
            {"text": text, "label": c.label, "probability": round(c.probability or 0.0, 3)}
            for text, c in zip(_EXAMPLES, model.classify(_EXAMPLES), strict=True)
        ]

    def words(self, held_out: dict[str, Any]) -> dict[str, Any]:
        return {
            "accuracy": f"{100 * held_out['accuracy']:.2f}",
            "right": held_out["right"],
            "classes": "\n".join(
                f"| {name} | {row['queries']} | {row['precision']:.3f} | {row['recall']:.3f} |"
                for name, row in held_out["intents"].items()
            ),
            "examples": "\n".join(
                f"| {e['text']} | {e['label']} | {e['probability']:.3f} |"
                for e in held_out["examples"]
            ),
        }


class Slots(Tuned):
    """A classifier of tokens."""

    card = "slots.md"
    point = "| {epoch} | {loss:.3f} | {score:.4f} |"

    def results(self, folder: Path) -> dict[str, Any]:
        asked = self.data.held_out
        best = {"best_possible_f1": best_possible(asked, folder)}
        return slot_figures(asked, tagged(folder, "flax", asked)) | best

    def examples(self, folder: Path) -> list[dict[str, Any]]:
        asked = [Query("", ((text, None),)) for text in _EXAMPLES]
        found = tagged(folder, "flax", asked)
        return [
            {"text": text, "slots": [[slot, text[i:j]] for slot, i, j in spans]}
            for text, spans in zip(_EXAMPLES, found, strict=True)
        ]

    def words(self, held_out: dict[str, Any]) -> dict[str, Any]:
        def row(name: str, s: dict[str, Any]) -> str:
            ratios = " | ".join(f"{s[key]:.3f}" for key in ("precision", "recall", "f1"))
            return f"| {name} | {s['expected']} | {s['found']} | {s['right']} | {ratios} |"

        return {
            "f1": f"{held_out['all']['f1']:.4f}",
            "spans": f"{held_out['all']['expected']:,}",
            "best_possible": f"{held_out['best_possible_f1']:.4f}",
            "num_labels": len(slots.names_of(self.data.training + self.data.stopping)),
            "classes": "\n".join(
                row(name, s)
                for name, s in [("**all**", held_out["all"]), *held_out["slots"].items()]
            ),
            "examples": "\n".join(
                f"| {e['text']} | {', '.join(f'{slot}: {text}' for slot, text in e['slots'])} |"
                for e in held_out["examples"]
            ),
        }


# -- what a checkpoint says in float32; tests compute it again -------------------------------------


def classified(folder: str | Path, backend: str, asked: list[Query]) -> list[str]:
    """The intent that the checkpoint gives each query."""
    model = Gemma.load(folder, backend=backend, task="sequence_classification", dtype="float32")
    results = model.classify([query.text for query in asked], batch_size=_BATCH)
    return [str(result.label) for result in results]


def tagged(folder: str | Path, backend: str, asked: list[Query]) -> list[list[Span]]:
    """The spans that the checkpoint gives each query."""
    model = Gemma.load(folder, backend=backend, task="token_classification", dtype="float32")
    results = model.tag([query.text for query in asked], batch_size=_BATCH)
    return [
        slots.spans_of(q.text, [tag.label for tag in row], [(tag.start, tag.end) for tag in row])
        for q, row in zip(asked, results, strict=True)
    ]


def intent_figures(asked: list[Query], found: list[str]) -> dict[str, Any]:
    """Accuracy, and precision and recall of each intent."""
    pairs = [(query.intent, label) for query, label in zip(asked, found, strict=True)]
    right = sum(expected == label for expected, label in pairs)
    rows = {}
    for name in INTENTS:
        there = sum(expected == name for expected, _ in pairs)
        said = sum(label == name for _, label in pairs)
        both = pairs.count((name, name))
        precision = round(both / said, 6) if said else 0.0
        rows[name] = {"queries": there, "precision": precision, "recall": round(both / there, 6)}
    wrong = [
        {"text": query.text, "intent": query.intent, "found": label}
        for query, label in zip(asked, found, strict=True)
        if label != query.intent
    ]
    return {
        "right": right,
        "accuracy": round(right / len(asked), 6),
        "intents": rows,
        "wrong": wrong,
    }


def slot_figures(asked: list[Query], found: list[list[Span]]) -> dict[str, Any]:
    """Span scores, micro-averaged and of each slot."""
    expected = [query.spans for query in asked]
    by_slot = slots.scores_by_slot(expected, found)
    return {
        "all": _row(slots.score(expected, found)),
        "slots": {name: _row(score) for name, score in by_slot.items()},
    }


def _row(score: SpanScore) -> dict[str, Any]:
    ratios = {name: round(getattr(score, name), 6) for name in ("precision", "recall", "f1")}
    return dataclasses.asdict(score) | ratios


def best_possible(asked: list[Query], folder: Path) -> float:
    """F1 of the spans that come back from the right label of every token."""
    tokenizer = GemmaTokenizer.from_pretrained(folder)
    found = []
    for query in asked:
        _, offsets = tokenizer.encode_with_offsets(query.text, add_special_tokens=False)
        labels = slots.labels_of(query.text, query.spans, offsets)
        found.append(slots.spans_of(query.text, labels, offsets))
    return round(slots.score([query.spans for query in asked], found).f1, 6)


# -- the folder ------------------------------------------------------------------------------------


def export(save: Callable[[Path], None], tuned: Tuned, checkpoint: Path) -> None:
    """Write model (by `save`), vocabulary, figures and card; then put them into `checkpoint`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        save(folder)
        shutil.copyfile(tuned.base / TOKENIZER, folder / TOKENIZER)
        figures = _figures(tuned, folder)
        text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
        (folder / FIGURES).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_card(tuned, folder, figures), encoding="utf-8")
        checkpoint.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # file by file, so that whoever has one mapped keeps it
            partial = checkpoint / f".{path.name}.partial"
            shutil.copyfile(path, partial)
            partial.replace(checkpoint / path.name)


def _figures(tuned: Tuned, folder: Path) -> dict[str, Any]:
    held_out = tuned.results(folder) | {"examples": tuned.examples(folder)}
    return {
        "base_sha256": _sha256(tuned.base / "model.safetensors"),
        "data_sha256": queries.SHA256,
        "settings": dataclasses.asdict(tuned.settings),
        "queries": {
            part.name: len(getattr(tuned.data, part.name)) for part in dataclasses.fields(Data)
        },
        "seconds": round(tuned.history.seconds),
        "best_epoch": tuned.history.best["epoch"],
        "curve": tuned.history.curve,
        "held_out": held_out,
    }


def _card(tuned: Tuned, folder: Path, figures: dict[str, Any]) -> str:
    settings = tuned.settings
    template = Path(__file__).with_name(tuned.card).read_text(encoding="utf-8")
    return Template(template).substitute(
        base_sha256=figures["base_sha256"],
        training=f"{figures['queries']['training']:,}",
        stopping=figures["queries"]["stopping"],
        held_out=figures["queries"]["held_out"],
        data="\n".join(f"| {name} | `{digest}` |" for name, digest in queries.SHA256.items()),
        **{key: str(value) for key, value in dataclasses.asdict(settings).items()},
        minutes=max(1, round(figures["seconds"] / 60)),
        best_epoch=figures["best_epoch"],
        curve="\n".join(
            tuned.point.format(**point | {"lack": -point["score"]}) for point in figures["curve"]
        ),
        files="\n".join(map(_file_line, sorted(folder.iterdir()))),
        **tuned.words(figures["held_out"]),
    )


def _file_line(path: Path) -> str:
    return f"| {path.name} | {path.stat().st_size:,} | `{_sha256(path)}` |"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
