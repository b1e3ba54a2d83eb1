"""Fine-tuning, whatever the framework: batches, the rate, the loop with early stopping."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gemma_hub.tokenizers import GemmaTokenizer
from training.queries import Data, Query, substituted, values_of

IGNORED = -100  # the label at <bos> and at padding


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what comes out, besides the data and the checkpoint."""

    epochs: int
    patience: int  # epochs without a better score before it stops
    rows: int = 32
    seed: int = 2024
    peak_rate: float = 5e-4
    warm_up: int = 60  # steps
    weight_decay: float = 0.05
    clip: float = 1.0
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    substitution: float = 0.5  # chance that a slot is filled by another query's text


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        ids: (B, T) int64.
        mask: (B, T) bool, true at real tokens.
        labels: (B,) int64 of sequences, or (B, T) int64 of tokens with `IGNORED` where there is
            none.
    """

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


class Learner(Protocol):
    """A model that learns."""

    def update(self, batch: Batch) -> float:
        """Take one step; the loss before it."""

    def logits(self, batch: Batch) -> np.ndarray:
        """(B, labels) or (B, T, labels), without dropout."""

    def weights(self) -> Any:
        """A copy of the parameters that later steps do not change."""

    def restore(self, weights: Any) -> None:
        """Take such a copy back."""


Label = Callable[[Query, list[tuple[int, int]]], int | list[int]]
"""The label of a query, or those of its tokens, whose characters are given (none for <bos>)."""
Judge = Callable[[Sequence[Query], Sequence[np.ndarray]], dict[str, float]]
"""Figures of queries from the logits of each; "score" is the one that decides, higher is better."""


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear up, then linear down to zero."""
    if step < settings.warm_up:
        return settings.peak_rate * (step + 1) / settings.warm_up
    return settings.peak_rate * max(0.0, (steps - step) / max(1, steps - settings.warm_up))


def number_of_steps(data: Data, settings: Settings) -> int:
    return settings.epochs * (len(data.training) // settings.rows)


def make_batch(queries: Sequence[Query], tokenizer: GemmaTokenizer, label: Label) -> Batch:
    """The queries as one batch; T is a multiple of 16, so that few shapes occur."""
    encoded = [tokenizer.encode_with_offsets(query.text) for query in queries]
    labels = [label(q, offsets[1:]) for q, (_, offsets) in zip(queries, encoded, strict=True)]
    length = 16 * -(-max(len(ids) for ids, _ in encoded) // 16)
    ids = np.zeros((len(queries), length), np.int64)
    mask = np.zeros(ids.shape, np.bool_)
    targets = np.full(ids.shape, IGNORED, np.int64)
    for row, (numbers, _) in enumerate(encoded):
        ids[row, : len(numbers)] = numbers
        mask[row, : len(numbers)] = True
        if isinstance(of_tokens := labels[row], list):
            targets[row, 1 : len(numbers)] = of_tokens
    is_sequence = isinstance(labels[0], int)
    return Batch(ids, mask, np.array(labels, np.int64) if is_sequence else targets)


def training_batches(
    queries: Sequence[Query], tokenizer: GemmaTokenizer, label: Label, settings: Settings
) -> Iterator[Batch]:
    """Endless batches; epoch after epoch, the same for a seed.

    Queries of like length come together, within eight batches; what does not fill a batch waits
    for another epoch.
    """
    values = values_of(queries)
    rows, epoch = settings.rows, 0
    while True:
        rng = np.random.default_rng([settings.seed, epoch])
        order = rng.permutation(len(queries))[: len(queries) // rows * rows]
        fresh = [substituted(queries[i], values, settings.substitution, rng) for i in order]
        pools = [
            sorted(fresh[i : i + 8 * rows], key=lambda q: len(q.text))
            for i in range(0, len(fresh), 8 * rows)
        ]
        batches = [pool[i : i + rows] for pool in pools for i in range(0, len(pool), rows)]
        for i in rng.permutation(len(batches)):
            yield make_batch(batches[i], tokenizer, label)
        epoch += 1


def predicted(
    learner: Learner, queries: Sequence[Query], tokenizer: GemmaTokenizer, label: Label, rows: int
) -> list[np.ndarray]:
    """The logits of each query, (labels,), or (T, labels) of its tokens without <bos>."""
    results: list[np.ndarray] = []
    for i in range(0, len(queries), rows):
        batch = make_batch(queries[i : i + rows], tokenizer, label)
        logits = learner.logits(batch)
        is_sequence = logits.ndim == 2
        results += [
            row if is_sequence else row[1 : mask.sum()]
            for row, mask in zip(logits, batch.mask, strict=True)
        ]
    return results


@dataclass(frozen=True)
class History:
    """What came of it.

    Attributes:
        curve: for each epoch its number, the mean loss of its steps, and the judge's figures after
            it.
        best: the entry of `curve` whose weights the learner has now.
        seconds: the time it took.
    """

    curve: list[dict[str, float]]
    best: dict[str, float]
    seconds: float


def fine_tune(
    learner: Learner,
    data: Data,
    tokenizer: GemmaTokenizer,
    label: Label,
    judge: Judge,
    settings: Settings,
) -> History:
    """Train; at the end the learner has the weights of the epoch with the best score.

    The score is that of `data.stopping`. Where two epochs have the same, the earlier one counts.
    """
    started = time.monotonic()
    batches = training_batches(data.training, tokenizer, label, settings)
    curve: list[dict[str, float]] = []
    best: dict[str, float] = {}
    weights = learner.weights()
    steps = number_of_steps(data, settings) // settings.epochs
    with _progress() as progress:
        task = progress.add_task("", total=settings.epochs * steps, note="")
        for epoch in range(1, settings.epochs + 1):
            losses = []
            for _ in range(steps):
                losses.append(learner.update(next(batches)))
                progress.advance(task)
            logits = predicted(learner, data.stopping, tokenizer, label, settings.rows)
            figures = {"loss": float(np.mean(losses)), **judge(data.stopping, logits)}
            curve.append({"epoch": epoch} | {k: round(v, 4) for k, v in figures.items()})
            if not best or curve[-1]["score"] > best["score"]:
                best, weights = curve[-1], learner.weights()
            progress.update(task, note=f"loss {figures['loss']:.3f}  score {figures['score']:.4f}")
            if epoch - best["epoch"] >= settings.patience:
                break
    learner.restore(weights)
    return History(curve, best, time.monotonic() - started)


def _progress() -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
