"""L5: losses and gradients where two things meet, and logits past the range of exp."""

import dataclasses
from functools import partial

import numpy as np

from gemma_hub_conformance import losses
from gemma_hub_conformance.cases.combinations import multiplied
from gemma_hub_conformance.cases.contract import judge_export
from gemma_hub_conformance.cases.forward import LENGTH, left_padded, padded
from gemma_hub_conformance.cases.gradients import Problem, judge_gradients
from gemma_hub_conformance.cases.heads import CLASSIFIER, NEEDS
from gemma_hub_conformance.cases.laws import Rewritten
from gemma_hub_conformance.cases.losses import (
    DRAWS,
    NUM_ITEMS,
    causal_labels,
    judge_losses,
    sequence_labels,
)
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, LATER, DesignedCheckpoint
from gemma_hub_conformance.heads import GRADIENTS, SEQUENCE, TOKEN
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

BCE = "multi_label_classification"
LARGE = 2.0**7
"""Factor on a head: its logits are past 88, where exp in float32 is infinite."""


def _two_layers(checkpoint: DesignedCheckpoint, **changes: object) -> DesignedCheckpoint:
    config = dataclasses.replace(
        checkpoint.config,
        num_hidden_layers=2,
        **changes,  # type: ignore[arg-type]
    )
    return DesignedCheckpoint(f"{checkpoint.name}_two_layers", "fewer layers", config, "gqa")


SOFTCAP = _two_layers(LATER["softcap"])
WINDOW = _two_layers(LATER["sliding_window"], layer_types=("sliding_attention", "full_attention"))
LINEAR_ROPE = _two_layers(CHECKPOINTS["linear_rope"])
DROPOUT = dataclasses.replace(
    GRADIENTS["gqa"],
    name="gqa_dropout",
    config=dataclasses.replace(GRADIENTS["gqa"].config, attention_dropout=0.4),
)


def _large(checkpoint: DesignedCheckpoint, matrix: str) -> Rewritten:
    return Rewritten(
        f"{checkpoint.name}+large",
        f"`{checkpoint.name}` with logits past 88",
        checkpoint.config,
        checkpoint.weights_of or checkpoint.name,
        task=checkpoint.task,
        change=partial(multiplied, factors={matrix: LARGE}),
    )


LARGE_LOGITS = _large(CHECKPOINTS["untied"], "lm_head.weight")
LARGE_SCORES = _large(SEQUENCE[BCE], "score.weight")


def with_a_masked_row() -> tuple[Row, ...]:
    """One row of padding only between two others."""
    return row(tokens(23, 1)), Row((), ()), row(tokens(14, 4), left=9)


def cases() -> list[CaseSpec]:
    """Labels and models that the cases of losses and gradients have not."""
    gradients = {
        "num_items": ("num_items_in_batch divides them", partial(_gradients, items=NUM_ITEMS)),
        "pad_id_label": ("labels that are the pad id", partial(_gradients, pads=0.5)),
        "first_label": ("a label in a row's first slot", partial(_gradients, first=True)),
        "fully_masked_row": (
            "a row of padding only",
            partial(_gradients, problem=Problem(GRADIENTS["gqa"], with_a_masked_row)),
        ),
        "dropout": (
            "a config with attention dropout",
            partial(_gradients, problem=Problem(DROPOUT)),
        ),
        "linear_rope": ("`linear_rope`", partial(_gradients, problem=Problem(LINEAR_ROPE))),
        "softcap": ("caps", partial(_gradients, problem=Problem(SOFTCAP))),
        "sliding_window": ("a window", partial(_gradients, problem=Problem(WINDOW))),
    }
    features = {name: frozenset({name}) for name in LATER}
    return [
        CaseSpec(
            "L5.causal.loss.first_label", "Causal loss: a label in a row's first slot counts "
            "for nothing.", _first_label,
        ),
        CaseSpec(
            "L5.causal.loss.large_logits", "Causal loss: logits past the range of exp.",
            _large_logits,
        ),
        CaseSpec(
            "L5.sequence.loss.large_logits", "Binary cross entropy: logits past the range of exp.",
            _large_scores, NEEDS["sequence"],
        ),
        *(
            CaseSpec(
                f"L5.gradients.causal.{name}", f"Gradients of the causal loss: {doc}.",
                run, frozenset({"gradients"}) | features.get(name, frozenset()),
            )
            for name, (doc, run) in gradients.items()
        ),
        CaseSpec(
            "L5.gradients.other_labels", "A second call with other labels has their gradients.",
            _other_labels, frozenset({"gradients"}),
        ),
        *(
            CaseSpec(
                f"L5.export.{kind}", f"The parameters of a {kind} classifier come back bit-equal.",
                partial(judge_export, checkpoint=checkpoint), NEEDS[kind] | {"export"},
            )
            for kind, checkpoint in (("sequence", CLASSIFIER), ("token", TOKEN))
        ),
    ]  # fmt: skip


# -- losses --------------------------------------------------------------------------------------


def _judge_causal(
    context: CaseContext, checkpoint: DesignedCheckpoint, batch: Batch, draws: list[np.ndarray]
) -> None:
    found = [context.forward(checkpoint, batch, labels=labels).loss for labels in draws]
    formulas = [partial(losses.causal, labels=labels, num_items=None) for labels in draws]
    judge_losses(context, found, checkpoint, batch, formulas)


def _first_label(context: CaseContext) -> None:
    batch = Batch.of(padded("no_padding"), LENGTH)
    draws = [causal_labels(batch, seed) for seed in range(DRAWS)]
    for labels in draws:
        labels[:, 0] = batch.input_ids[:, 0]
    _judge_causal(context, GQA, batch, draws)


def _large_logits(context: CaseContext) -> None:
    batch = Batch.of(left_padded(), LENGTH)
    draws = [causal_labels(batch, seed) for seed in range(DRAWS)]
    _judge_causal(context, LARGE_LOGITS, batch, draws)


def _large_scores(context: CaseContext) -> None:
    batch = Batch.of(left_padded(), LENGTH)
    draws = [sequence_labels(BCE, seed) for seed in range(DRAWS)]
    found = [context.forward(LARGE_SCORES, batch, labels=labels).loss for labels in draws]
    formulas = [partial(losses.multi_label, labels=labels) for labels in draws]
    judge_losses(context, found, LARGE_SCORES, batch, formulas)


# -- gradients and export ------------------------------------------------------------------------


def _gradients(
    context: CaseContext,
    problem: Problem | None = None,
    items: int | None = None,
    pads: float = 0.0,
    first: bool = False,
) -> None:
    problem = Problem(GRADIENTS["gqa"]) if problem is None else problem
    batch = problem.batch
    labels = causal_labels(batch, 1, ignored=0.2, pads=pads)
    if first:
        labels[:, 0] = 20
    judge_gradients(context, problem, labels, items)


def _other_labels(context: CaseContext) -> None:
    problem = Problem(GRADIENTS["gqa"])
    for seed in (1, 2):
        judge_gradients(context, problem, problem.labels(seed))
