"""L5: the losses. Each case compares several, of several labels, as one vector."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gemma_hub.labels import IGNORED
from gemma_hub_conformance import losses
from gemma_hub_conformance.cases.forward import LENGTH, PADDINGS, left_padded, padded
from gemma_hub_conformance.cases.heads import NEEDS
from gemma_hub_conformance.checkpoints import GQA, PAD_ID, DesignedCheckpoint
from gemma_hub_conformance.heads import INFERRED, NUM_LABELS, ONE_LABEL, SEQUENCE, TOKEN
from gemma_hub_conformance.oracle import witness_roundings
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.seeds import entropy
from gemma_hub_conformance.spec import CaseContext, CaseSpec, prepare

DRAWS = 8  # losses in one case: one alone would say little about its own noise
NUM_ITEMS = 97  # a compiled backend may compile anew for another number

Run = Callable[[CaseContext], None]
Loss = Callable[[np.ndarray, losses.Rounding], float]


def cases() -> list[CaseSpec]:
    """The causal loss, the loss over tokens, and the three of sequence classification."""
    causal: dict[str, tuple[str, Run]] = {
        **{padding: (padding.replace("_", " "), partial(_causal, draw=partial(padded, padding)))
           for padding in PADDINGS},
        "ignored_labels": ("-100 at random places of a row", partial(_causal, ignored=0.4)),
        "unequal_rows": ("the mean is over tokens, not over rows", partial(_causal, draw=_unequal)),
        "num_items": ("the sum divided by num_items_in_batch", partial(_causal, items=NUM_ITEMS)),
        "pad_id_label": ("a label that is the pad id counts", partial(_causal, pads=0.5)),
        "row_without_labels": ("a padded row without a label adds nothing", _row_without_labels),
        "label_after_the_end": ("the label after a row's last token counts", _after_the_end),
        "label_after_left_padding": ("a row's first token is predicted by padding", _after_padding),
        "of_its_logits": ("it is the loss of the logits beside it", _of_its_logits),
    }  # fmt: skip
    by_token: dict[str, tuple[str, Run]] = {
        "left_padding": ("left padding, every label of a real token", _token),
        "ignored_labels": ("-100 at random places of a row", partial(_token, ignored=0.4)),
        "num_items": ("the sum divided by num_items_in_batch", partial(_token, items=NUM_ITEMS)),
    }
    sequence: dict[str, tuple[str, Run]] = {
        "single_label": ("cross entropy", partial(_sequence, kind="single_label_classification")),
        "multi_label": (
            "binary cross entropy",
            partial(_sequence, kind="multi_label_classification"),
        ),
        "regression": ("squared error", partial(_sequence, kind="regression")),
        "regression_one_label": ("squared error of one number, as inferred", _one_label),
        "inferred": ("inferred from the labels of each call anew", _inferred),
    }
    tasks = (
        ("causal", "Causal loss", causal, frozenset[str]()),
        ("token", "Loss of a token classifier", by_token, NEEDS["token"]),
        ("sequence", "Loss of a sequence classifier", sequence, NEEDS["sequence"]),
    )
    named = [
        CaseSpec(f"L5.{task}.loss.{name}", f"{what}: {doc}.", run, needs)
        for task, what, kinds, needs in tasks
        for name, (doc, run) in kinds.items()
    ]
    narrow = CaseSpec(
        "L5.causal.loss.bfloat16",
        "The causal loss of a bfloat16 model is computed from its logits in float32.",
        _of_its_logits,
        dtype="bfloat16",
    )
    return [*named, narrow]


def _unequal() -> tuple[Row, ...]:
    return row(tokens(23, 1)), row(tokens(2, 140), left=21), row(tokens(5, 141))


def causal_labels(batch: Batch, seed: int, ignored: float = 0.0, pads: float = 0.0) -> np.ndarray:
    """(B, T) labels: -100 at padding, and at each row's first token, which nothing predicts.

    Args:
        batch: the tokens; their ids are the labels for seed 0, else random ids.
        seed: which draw.
        ignored: share of labels that become -100.
        pads: share of labels that become the pad id.
    """
    rng = np.random.default_rng(entropy(seed, 5))
    labels = batch.input_ids if seed == 0 else rng.integers(12, 131, batch.mask.shape)
    labels = np.where(rng.random(labels.shape) < pads, PAD_ID, labels)
    labels = np.where(rng.random(labels.shape) < ignored, IGNORED, labels)
    predicted = batch.mask.copy()
    predicted[:, 1:] &= batch.mask[:, :-1]
    predicted[:, 0] = False
    return np.where(predicted, labels, IGNORED)


def token_labels(batch: Batch, seed: int, ignored: float = 0.0) -> np.ndarray:
    """(B, T) random labels of a token classifier, -100 at padding."""
    rng = np.random.default_rng(entropy(seed, 6))
    labels = rng.integers(0, TOKEN.config.num_labels, batch.mask.shape)
    return np.where(batch.mask & (rng.random(labels.shape) >= ignored), labels, IGNORED)


def sequence_labels(
    kind: str, seed: int, rows: int = 3, num_labels: int = NUM_LABELS
) -> np.ndarray:
    """Random labels of a sequence classifier; those of several labels are not 0 or 1 only."""
    rng = np.random.default_rng(entropy(seed, 7))
    if kind == "single_label_classification":
        return rng.integers(0, num_labels, rows)
    if kind == "multi_label_classification":
        return rng.choice([0.0, 1.0, 0.25], (rows, num_labels)).astype(np.float32)
    return rng.normal(0, 2, (rows, num_labels)).astype(np.float32)


def judge_losses(
    context: CaseContext,
    found: Sequence[object],
    checkpoint: DesignedCheckpoint,
    batch: Batch,
    formulas: Sequence[Loss],
) -> None:
    """Fail unless each loss that was found is what its formula makes of the true logits."""
    truth = context.oracle.truth(checkpoint, batch.rows, context.dtype)
    logits = [truth.logits, *truth.witness_logits]
    if checkpoint.task != "sequence_classification":
        logits = [_laid_out(each, batch) for each in logits]
    context.compare("losses", np.array([found]), *_true_losses(logits, formulas))


def _true_losses(
    logits: Sequence[np.ndarray], formulas: Sequence[Loss]
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Each formula of the reference's logits, and of each witness's; (1, formulas) each."""
    reference, *witnesses = (
        np.array([[formula(each, single) for formula in formulas]])
        for each, single in zip(logits, (losses.exact, *witness_roundings()), strict=True)
    )
    return reference, tuple(witnesses)


def _laid_out(logits: np.ndarray, batch: Batch) -> np.ndarray:
    """(n, C) of the real tokens to (B, T, C), NaN at padding, which no loss may use."""
    full = np.full((*batch.mask.shape, logits.shape[-1]), np.nan)
    full[batch.mask] = logits
    return full


def _forward_losses(
    context: CaseContext,
    checkpoint: DesignedCheckpoint,
    batch: Batch,
    draws: Sequence[np.ndarray],
    **wanted: object,
) -> list[np.ndarray]:
    found = []
    for labels in draws:
        loss = context.forward(checkpoint, batch, labels=labels, **wanted).loss
        context.require_shape("the loss", loss, ())
        found.append(loss)
    return found


def _causal(
    context: CaseContext,
    draw: Callable[[], tuple[Row, ...]] = left_padded,
    ignored: float = 0.0,
    pads: float = 0.0,
    items: int | None = None,
) -> None:
    batch = Batch.of(draw(), LENGTH)
    draws = [causal_labels(batch, seed, ignored, pads) for seed in range(DRAWS)]
    _judge_causal(context, batch, draws, items)


def _judge_causal(
    context: CaseContext, batch: Batch, draws: Sequence[np.ndarray], items: int | None = None
) -> None:
    found = _forward_losses(context, GQA, batch, draws, num_items_in_batch=items)
    formulas = [partial(losses.causal, labels=labels, num_items=items) for labels in draws]
    judge_losses(context, found, GQA, batch, formulas)


def _row_without_labels(context: CaseContext) -> None:
    rows = (row(tokens(23, 1)), Row((), ()), row(tokens(14, 4), left=9))
    batch, kept = Batch.of(rows, LENGTH), Batch.of((rows[0], rows[2]), LENGTH)
    draws = [causal_labels(batch, seed) for seed in range(DRAWS)]
    found = _forward_losses(context, GQA, batch, draws)
    formulas = [partial(losses.causal, labels=each[[0, 2]], num_items=None) for each in draws]
    judge_losses(context, found, GQA, kept, formulas)


def _after_the_end(context: CaseContext) -> None:
    batch = Batch.of(padded("right_padding"), LENGTH)
    draws = []
    for seed in range(DRAWS):
        labels = causal_labels(batch, seed)
        for b, each in enumerate(batch.rows[1:], 1):
            labels[b, len(each.ids)] = 20 + 7 * seed + b
        draws.append(labels)
    _judge_causal(context, batch, draws)


def _after_padding(context: CaseContext) -> None:
    """The padding's logits depend on the batch, so the reference runs all of it."""
    batch = Batch.of(padded("left_padding"), LENGTH)
    inputs = prepare(GQA, batch)
    logits = [model.run(inputs).logits for model in context.oracle.models(GQA, context.dtype)]
    draws = []
    for seed in range(DRAWS):
        labels = np.full(batch.mask.shape, IGNORED)
        for b, each in enumerate(batch.rows):
            if each.slots[0] > 0:
                labels[b, each.slots[0]] = 20 + 7 * seed + b
        draws.append(labels)
    found = _forward_losses(context, GQA, batch, draws)
    context.compare(
        "losses",
        np.array([found]),
        *_true_losses(
            logits, [partial(losses.causal, labels=labels, num_items=None) for labels in draws]
        ),
    )


def _of_its_logits(context: CaseContext) -> None:
    batch = Batch.of(padded("both_sides"), LENGTH)
    found, computed = [], []
    for seed in range(DRAWS):
        labels = causal_labels(batch, seed, ignored=0.2)
        outputs = context.forward(GQA, batch, labels=labels)
        logits = outputs.logits.astype(np.float64)
        found.append(outputs.loss)
        computed.append(
            [
                losses.causal(logits, single, labels, None)
                for single in (losses.exact, *witness_roundings())
            ]
        )
    reference, *witnesses = np.array(computed).T[:, None]
    context.compare("losses", np.array([found]), reference, tuple(witnesses))


def _token(context: CaseContext, ignored: float = 0.0, items: int | None = None) -> None:
    batch = Batch.of(padded("left_padding"), LENGTH)
    draws = [token_labels(batch, seed, ignored) for seed in range(DRAWS)]
    found = _forward_losses(context, TOKEN, batch, draws, num_items_in_batch=items)
    formulas = [partial(losses.token, labels=labels, num_items=items) for labels in draws]
    judge_losses(context, found, TOKEN, batch, formulas)


FORMULAS = {
    "single_label_classification": losses.single_label,
    "multi_label_classification": losses.multi_label,
    "regression": losses.regression,
}


def _sequence(context: CaseContext, kind: str) -> None:
    draws = [(kind, sequence_labels(kind, seed)) for seed in range(DRAWS)]
    _judge_sequence(context, SEQUENCE[kind], draws)


def _one_label(context: CaseContext) -> None:
    draws = []
    for seed in range(DRAWS):
        labels = sequence_labels("regression", seed, num_labels=1)
        draws.append(("regression", labels if seed % 2 else labels[:, 0]))
    _judge_sequence(context, ONE_LABEL, draws)


def _inferred(context: CaseContext) -> None:
    kinds = ("single_label_classification", "multi_label_classification") * (DRAWS // 2)
    draws = [(kind, sequence_labels(kind, seed)) for seed, kind in enumerate(kinds)]
    _judge_sequence(context, INFERRED, draws)


def _judge_sequence(
    context: CaseContext, checkpoint: DesignedCheckpoint, draws: Sequence[tuple[str, np.ndarray]]
) -> None:
    batch = Batch.of(padded("left_padding"), LENGTH)
    found = _forward_losses(context, checkpoint, batch, [labels for _, labels in draws])
    formulas = [partial(FORMULAS[kind], labels=labels) for kind, labels in draws]
    judge_losses(context, found, checkpoint, batch, formulas)
