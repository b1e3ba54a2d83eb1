"""Fine-tune "tiny" into "tiny-intents", with torch, and put it into gemma_hub_tiny/intents.

    python plugins/tiny/finetune_intents.py --queries .../classification/snips

The queries are not part of the repository; the model card says where they come from. This script
and `training/` are not part of the wheel.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from gemma_hub.source import resolved
from gemma_hub.tokenizers import GemmaTokenizer
from gemma_hub_torch import GemmaForSequenceClassification
from training import finetuned, queries
from training.finetuning import (
    Batch,
    Settings,
    fine_tune,
    learning_rate,
    number_of_steps,
)
from training.queries import INTENTS, Query

CHECKPOINT = Path(__file__).resolve().parent / "gemma_hub_tiny" / "intents"
SETTINGS = Settings(epochs=10, patience=4, attention_dropout=0.2)


class TorchLearner:
    """A sequence classifier under AdamW, which decays matrices and leaves norms alone."""

    def __init__(self, base: str | Path, settings: Settings, steps: int) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.steps, self.step = settings, steps, 0
        start: Any = GemmaForSequenceClassification.from_pretrained(
            base, dtype="float32", num_labels=len(INTENTS), seed=settings.seed
        )
        config = dataclasses.replace(
            start.config,
            attention_dropout=settings.attention_dropout,
            num_labels=None,
            id2label=dict(enumerate(INTENTS)),
            problem_type="single_label_classification",
        )
        self.module = GemmaForSequenceClassification(config)
        self.module.load_state_dict(start.state_dict())
        parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            weight_decay=settings.weight_decay,
        )

    def update(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.settings)
        self.module.train()
        loss = self._call(batch, labels=torch.from_numpy(batch.labels)).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        self.module.eval()
        return self._call(batch).logits.numpy()

    def _call(self, batch: Batch, **arguments: Any) -> Any:
        ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
        return self.module(ids, mask, use_cache=False, **arguments)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.clone() for name, p in self.module.state_dict().items()}

    def restore(self, weights: dict[str, torch.Tensor]) -> None:
        self.module.load_state_dict(weights)


def label(query: Query, _: list[tuple[int, int]]) -> int:
    return INTENTS.index(query.intent)


def judge(asked: Sequence[Query], logits: Sequence[np.ndarray]) -> dict[str, float]:
    """The accuracy, which soon is near 1, and the loss, which then still tells epochs apart."""
    intents = torch.tensor([INTENTS.index(query.intent) for query in asked])
    scores = torch.tensor(np.stack(logits))
    loss = torch.nn.functional.cross_entropy(scores, intents).item()
    right = (scores.argmax(-1) == intents).float().mean().item()
    return {"score": -loss, "accuracy": right}


def main(
    folder: Annotated[Path, typer.Option("--queries", help="Of SNIPS.")] = queries.FOLDER,
    base: Annotated[str, typer.Option(help="The checkpoint to start from.")] = "tiny",
    checkpoint: Annotated[Path, typer.Option(help="Where it goes.")] = CHECKPOINT,
    epochs: int = SETTINGS.epochs,
    threads: int = 1,
) -> None:
    """Fine-tune "tiny" into "tiny-intents", with torch."""
    torch.set_num_threads(threads)
    settings = dataclasses.replace(SETTINGS, epochs=epochs)
    data = queries.split(
        queries.read(folder, "train"), queries.read(folder, "validate"), settings.seed
    )
    tokenizer = GemmaTokenizer.from_pretrained(resolved(base))
    learner = TorchLearner(resolved(base), settings, number_of_steps(data, settings))
    history = fine_tune(learner, data, tokenizer, label, judge, settings)
    module = learner.module.to(torch.bfloat16)
    finetuned.export(
        lambda path: module.save_pretrained(path, overwrite=True),
        finetuned.Intents(data, settings, history, resolved(base)),
        checkpoint,
    )
    typer.echo((checkpoint / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
