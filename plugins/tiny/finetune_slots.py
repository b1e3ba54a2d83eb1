"""Fine-tune "tiny" into "tiny-slots", with Flax, and put it into gemma_hub_tiny/slots.

    python plugins/tiny/finetune_slots.py --queries .../classification/snips

The queries are not part of the repository; the model card says where they come from. This script
and `training/` are not part of the wheel. It needs optax besides the Flax backend.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx

from gemma_hub.source import resolved
from gemma_hub.tokenizers import GemmaTokenizer
from gemma_hub_flax import FlaxGemmaForTokenClassification
from training import finetuned, queries, slots
from training.finetuning import (
    Batch,
    Judge,
    Label,
    Settings,
    fine_tune,
    learning_rate,
    number_of_steps,
)
from training.queries import Query

CHECKPOINT = Path(__file__).resolve().parent / "gemma_hub_tiny" / "slots"
SETTINGS = Settings(epochs=16, patience=5, attention_dropout=0.1, classifier_dropout=0.2)


@nnx.jit
def train_step(
    module: Any, optimizer: nnx.Optimizer, key: jax.Array, ids: Any, mask: Any, labels: Any
) -> jax.Array:
    """One step; the loss before it."""

    def loss_of(module: Any) -> jax.Array:
        return module(ids, mask, labels=labels, use_cache=False, dropout_rng=key).loss

    loss, gradients = nnx.value_and_grad(loss_of)(module)
    optimizer.update(module, gradients)
    return loss


@nnx.jit
def logits_of(module: Any, ids: Any, mask: Any) -> jax.Array:
    return module(ids, mask, use_cache=False).logits


class FlaxLearner:
    """A token classifier under AdamW, which decays matrices and leaves norms and biases alone."""

    def __init__(
        self, base: str | Path, names: Sequence[str], settings: Settings, steps: int
    ) -> None:
        start: Any = FlaxGemmaForTokenClassification.from_pretrained(
            base, dtype="float32", num_labels=len(names), seed=settings.seed
        )
        config = dataclasses.replace(
            start.config,
            attention_dropout=settings.attention_dropout,
            classifier_dropout=settings.classifier_dropout,
            num_labels=None,
            id2label=dict(enumerate(names)),
        )
        self.module = FlaxGemmaForTokenClassification(config)
        nnx.update(self.module, nnx.state(start))
        rates = jnp.array([learning_rate(step, steps, settings) for step in range(steps)])
        transform = optax.chain(
            optax.clip_by_global_norm(settings.clip),
            optax.adamw(
                lambda step: rates[step],
                weight_decay=settings.weight_decay,
                mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
            ),
        )
        self.optimizer = nnx.Optimizer(self.module, transform, wrt=nnx.Param)
        self.key, self.step = jax.random.key(settings.seed), 0

    def update(self, batch: Batch) -> float:
        key = jax.random.fold_in(self.key, self.step)
        self.step += 1
        arguments = jnp.array(batch.ids), jnp.array(batch.mask), jnp.array(batch.labels)
        return float(train_step(self.module, self.optimizer, key, *arguments))

    def logits(self, batch: Batch) -> np.ndarray:
        return np.asarray(logits_of(self.module, jnp.array(batch.ids), jnp.array(batch.mask)))

    def weights(self) -> Any:
        return jax.tree.map(jnp.copy, nnx.state(self.module, nnx.Param))

    def restore(self, weights: Any) -> None:
        nnx.update(self.module, weights)


def label_with(names: Sequence[str]) -> Label:
    """The labels of a query's tokens as indices of `names`."""
    index = {name: i for i, name in enumerate(names)}
    return lambda query, offsets: [
        index[n] for n in slots.labels_of(query.text, query.spans, offsets)
    ]


def judge_with(names: Sequence[str], tokenizer: GemmaTokenizer) -> Judge:
    """The F1 of spans, from logits over `names`."""

    def judge(asked: Sequence[Query], logits: Sequence[np.ndarray]) -> dict[str, float]:
        found = []
        for query, rows in zip(asked, logits, strict=True):
            _, offsets = tokenizer.encode_with_offsets(query.text, add_special_tokens=False)
            labels = [names[i] for i in rows.argmax(-1)]
            found.append(slots.spans_of(query.text, labels, offsets))
        return {"score": slots.score([query.spans for query in asked], found).f1}

    return judge


def main(
    folder: Annotated[Path, typer.Option("--queries", help="Of SNIPS.")] = queries.FOLDER,
    base: Annotated[str, typer.Option(help="The checkpoint to start from.")] = "tiny",
    checkpoint: Annotated[Path, typer.Option(help="Where it goes.")] = CHECKPOINT,
    epochs: int = SETTINGS.epochs,
) -> None:
    """Fine-tune "tiny" into "tiny-slots", with Flax."""
    settings = dataclasses.replace(SETTINGS, epochs=epochs)
    train = queries.read(folder, "train")
    data = queries.split(train, queries.read(folder, "validate"), settings.seed)
    names = slots.names_of(train)
    tokenizer = GemmaTokenizer.from_pretrained(resolved(base))

    learner = FlaxLearner(resolved(base), names, settings, number_of_steps(data, settings))
    label, judge = label_with(names), judge_with(names, tokenizer)
    history = fine_tune(learner, data, tokenizer, label, judge, settings)
    state = nnx.state(learner.module, nnx.Param)
    nnx.update(learner.module, jax.tree.map(lambda p: p.astype(jnp.bfloat16), state))
    finetuned.export(
        lambda path: learner.module.save_pretrained(path, overwrite=True),
        finetuned.Slots(data, settings, history, resolved(base)),
        checkpoint,
    )
    typer.echo((checkpoint / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
