"""The training loop: seeded, resumable, with the held-out loss as it goes."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_hub.config import GemmaConfig
from gemma_hub_torch.model import GemmaForCausalLM
from training import corpus, vocabulary

STATE_FILE = "state.pt"
IGNORED = -100  # the target at padding


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what comes out, besides the corpus and the config."""

    steps: int
    rows: int = 16
    length: int = 256  # tokens per row that are predicted
    seed: int = 2024
    peak_rate: float = 2e-3
    last_rate: float = 2e-5
    warm_up: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.1
    cut_rate: float = 0.01
    evaluate_every: int = 100


@dataclass
class Data:
    """The split corpus and its vocabulary."""

    training: list[corpus.Story]
    held_out: list[corpus.Story]
    vocabulary: bytes

    def __post_init__(self) -> None:
        self.processor = vocabulary.load(self.vocabulary)
        self.special = vocabulary.CONTROL

    def held_out_rows(self, length: int) -> tuple[list[list[int]], int]:
        return corpus.held_out_rows(
            self.held_out, self.processor.encode, length=length, bos=self.special["<bos>"]
        )

    def batches(self, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (ids, targets), each (rows, length); epoch after epoch, the same for a seed."""
        for epoch in itertools.count():
            rng = np.random.default_rng([settings.seed, epoch])
            rows = list(
                corpus.training_rows(
                    self.training,
                    self.processor.encode,
                    self.processor.decode,
                    rng,
                    length=settings.length,
                    bos=self.special["<bos>"],
                    eos=self.special["<eos>"],
                    cut_rate=settings.cut_rate,
                )
            )
            order = rng.permutation(len(rows))
            for i in range(0, len(rows) - settings.rows + 1, settings.rows):
                yield pad([rows[j] for j in order[i : i + settings.rows]], settings.length)


def pad(rows: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Rows of at most length + 1 ids as (ids, targets), each (B, length); padding on the right."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row) - 1] = torch.tensor(row[:-1])
        targets[b, : len(row) - 1] = torch.tensor(row[1:])
    return ids, targets


def logits_of(module: nn.Module, ids: Tensor) -> Tensor:
    # Padding is on the right, where no real token sees it, so all may count as real.
    logits: Tensor = module(ids, use_cache=False).logits
    return logits


@torch.no_grad()
def total_loss(module: nn.Module, rows: list[list[int]], autocast: bool = False) -> float:
    """Sum of -ln p over every id of `rows` but the first of each, in nats."""
    module.eval()
    total = 0.0
    for i in range(0, len(rows), 8):
        part = rows[i : i + 8]
        ids, targets = pad(part, max(map(len, part)) - 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = logits_of(module, ids)
        total += F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
    module.train()
    return total


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine."""
    if step < settings.warm_up:
        return settings.peak_rate * (step + 1) / settings.warm_up
    done = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return settings.last_rate + (settings.peak_rate - settings.last_rate) * cosine


def add_dropout(module: GemmaForCausalLM, rate: float) -> None:
    """Dropout on the embedding and on what each branch adds; Gemma itself has none there."""

    def drop(owner: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, rate, owner.training)

    module.model.embed_tokens.register_forward_hook(drop)
    for layer in module.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def optimizer_for(module: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.98))


@dataclass
class Run:
    """A training run that can be stopped and taken up again."""

    config: GemmaConfig
    settings: Settings
    data: Data
    folder: Path
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.settings.seed)
        self.module = GemmaForCausalLM(self.config)
        add_dropout(self.module, self.settings.dropout)
        self.optimizer = optimizer_for(self.module, self.settings)
        rows, self.held_out_bytes = self.data.held_out_rows(self.settings.length)
        self.held_out_rows = rows

    # -- state ---------------------------------------------------------------------------------

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "vocabulary": self.data.vocabulary,
        }
        partial = self.folder / f"{STATE_FILE}.partial"
        torch.save(state, partial)
        partial.replace(self.folder / STATE_FILE)
        (self.folder / "curve.json").write_text(json.dumps(self.curve, indent=1) + "\n")

    @classmethod
    def load(cls, config: GemmaConfig, data: Data, folder: Path) -> Self:
        """The run whose state is in `folder`."""
        state = torch.load(folder / STATE_FILE, weights_only=True)
        if state["vocabulary"] != data.vocabulary:
            raise SystemExit(f"The run in {folder} had another vocabulary; start a new one.")
        run = cls(config, Settings(**state["settings"]), data, folder)
        run.module.load_state_dict(state["module"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.seconds = state["step"], state["seconds"]
        run.curve = state["curve"]
        torch.set_rng_state(state["random"])
        return run

    # -- work ----------------------------------------------------------------------------------

    def train(self, minutes: float, compiled: bool) -> None:
        """Go on to the last step, or until `minutes` have passed."""
        started = time.monotonic()
        before = self.seconds
        module = torch.compile(self.module) if compiled else self.module
        batches = itertools.islice(self.data.batches(self.settings), self.step, None)
        losses: list[float] = []
        with _progress() as progress:
            task = progress.add_task("", total=self.settings.steps, completed=self.step, note="")
            while self.step < self.settings.steps:
                losses.append(self._update(module, next(batches)))
                self.step += 1
                self.seconds = before + time.monotonic() - started
                stop = self.seconds - before > 60 * minutes
                last = stop or self.step == self.settings.steps
                if last or self.step % self.settings.evaluate_every == 0:
                    self._evaluate(float(np.mean(losses)))
                    losses.clear()
                    self.save()
                progress.update(task, completed=self.step, note=self._note())
                if stop:
                    progress.console.print(f"Stopped after {minutes} minutes; go on with --resume.")
                    return

    def _update(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
        ids, targets = batch
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(module, ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        self.optimizer.step()
        return loss.item()

    def _evaluate(self, training_loss: float) -> None:
        count = sum(len(row) - 1 for row in self.held_out_rows)
        loss = total_loss(self.module, self.held_out_rows, autocast=True) / count
        self.curve.append(
            {"step": self.step, "training": round(training_loss, 4), "held_out": round(loss, 4)}
        )

    def _note(self) -> str:
        if not self.curve:
            return ""
        latest = self.curve[-1]
        return f"training {latest['training']:.3f}  held out {latest['held_out']:.3f}"


def _progress() -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
