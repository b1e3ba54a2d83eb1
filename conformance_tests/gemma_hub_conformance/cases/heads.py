"""L5: the results of the tasks base, sequence_classification and token_classification."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.cases.forward import LENGTH, PADDINGS, padded
from gemma_hub_conformance.checkpoints import PAD_ID
from gemma_hub_conformance.heads import BASE, ONE_LABEL, SEQUENCE, TOKEN
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

CLASSIFIER = SEQUENCE["single_label_classification"]
NEEDS = {
    "base": frozenset({"task:base"}),
    "sequence": frozenset({"task:sequence_classification"}),
    "token": frozenset({"task:token_classification"}),
}


def cases() -> list[CaseSpec]:
    """The paddings of each head, and the token that stands for a row."""
    padded = [
        CaseSpec(
            f"L5.{task}.{what}.{padding}",
            f"{doc}: {padding.replace('_', ' ')}.",
            partial(run, padding=padding),
            NEEDS[task],
        )
        for task, what, doc, run in (
            ("base", "last_hidden_state", "The final norm's output of the task base", _base),
            ("sequence", "logits", "Logits of a sequence classifier", _sequence),
            ("token", "logits", "Logits of a token classifier", _token),
        )
        for padding in PADDINGS
    ]
    pooling = {
        "pad_id_inside": ("The pad id as a real token, inside a row and at its end.", _pad_inside),
        "mask_over_pad_ids": (
            "A mask of ones over pad ids at the end: the mask says.",
            _mask_rules,
        ),
        "without_mask": ("Without a mask: the rightmost id that is not the pad id.", _without_mask),
        "all_pad_row": ("Without a mask, a row of pad ids only: the first.", _all_pad_row),
        "fully_masked_row": ("A row of padding only is finite; the others are right.", _masked_row),
    }
    rest = [
        *(
            CaseSpec(f"L5.sequence.pooling.{name}", doc, run, NEEDS["sequence"])
            for name, (doc, run) in pooling.items()
        ),
        CaseSpec(
            "L5.sequence.one_label",
            "A sequence classifier of one label has logits (rows, 1).",
            _one_label,
            NEEDS["sequence"],
        ),
        CaseSpec(
            "L5.sequence.inputs_embeds",
            "Unscaled embedding rows in place of ids give the same logits.",
            _inputs_embeds,
            NEEDS["sequence"] | {"inputs_embeds"},
        ),
        CaseSpec(
            "L5.sequence.bfloat16", "Logits of a sequence classifier in bfloat16.",
            partial(_sequence, padding="left_padding"), NEEDS["sequence"], "bfloat16",
        ),
        CaseSpec(
            "L5.token.bfloat16", "Logits of a token classifier in bfloat16.",
            partial(_token, padding="right_padding"), NEEDS["token"], "bfloat16",
        ),
    ]  # fmt: skip
    return [*padded, *rest]


def _base(context: CaseContext, padding: str) -> None:
    batch = Batch.of(padded(padding), LENGTH)
    outputs = context.forward(BASE, batch)
    found, truth = outputs.last_hidden_state, context.oracle.truth(BASE, batch.rows, context.dtype)
    shape = (*batch.mask.shape, BASE.config.hidden_size)
    context.require_shape("the last hidden states", found, shape)
    context.compare("last_hidden_state", found[batch.mask], truth.logits, truth.witness_logits)
    for name in ("logits", "loss"):
        context.require(getattr(outputs, name) is None, f"the task base returned {name}")


def _token(context: CaseContext, padding: str) -> None:
    batch = Batch.of(padded(padding), LENGTH)
    context.judge_logits(context.forward(TOKEN, batch).logits, TOKEN, batch)


def _sequence(context: CaseContext, padding: str) -> None:
    _judge_pooled(context, padded(padding))


def _judge_pooled(context: CaseContext, rows: Sequence[Row]) -> None:
    batch = Batch.of(rows, LENGTH)
    context.judge_rows(context.forward(CLASSIFIER, batch).logits, CLASSIFIER, rows)


def _pad_inside(context: CaseContext) -> None:
    rows = []
    for left, places in ((0, (0, 7)), (9, (5, 13)), (2, (6, 18, 19))):
        ids = list(tokens(14 if left == 9 else 20, 110 + left))
        for place in places:
            ids[place] = PAD_ID
        rows.append(row(ids, left))
    _judge_pooled(context, rows)


def _mask_rules(context: CaseContext) -> None:
    rows = [
        row((*tokens(LENGTH - pads, 120 + pads), *[PAD_ID] * pads)) for pads in (1, 4, LENGTH - 1)
    ]
    _judge_pooled(context, rows)


def _unmasked(context: CaseContext, rows: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
    """Rows of ids without a mask, of which the tokens before `ends` decide."""
    inputs = ModelInputs.prepare(CLASSIFIER.config, np.array(rows), task=CLASSIFIER.task)
    logits = context.model(CLASSIFIER).forward(inputs).to_numpy().logits
    # All ids are seen, padding or not, so a row's truth is that of the ids up to its last token.
    context.judge_rows(
        logits, CLASSIFIER, [row(ids[:end]) for ids, end in zip(rows, ends, strict=True)]
    )


def _without_mask(context: CaseContext) -> None:
    left, right, both = tokens(17, 130), tokens(14, 131), (*tokens(6, 132), PAD_ID, 40, 41)
    rows = [
        [*[PAD_ID] * 6, *left],
        [*right, *[PAD_ID] * 9],
        [*[PAD_ID] * 3, *both, *[PAD_ID] * 11],
    ]
    _unmasked(context, rows, (23, 14, 12))


def _all_pad_row(context: CaseContext) -> None:
    rows = [[*tokens(20, 133), *[PAD_ID] * 3], [PAD_ID] * LENGTH, [*tokens(LENGTH, 134)]]
    _unmasked(context, rows, (20, 1, 23))


def _masked_row(context: CaseContext) -> None:
    rows = (row(tokens(23, 1)), Row((), ()), row(tokens(14, 4), left=9))
    logits = context.forward(CLASSIFIER, Batch.of(rows, LENGTH)).logits
    context.require(bool(np.isfinite(logits).all()), "a row of padding only has NaN logits")
    context.judge_rows(logits[[0, 2]], CLASSIFIER, (rows[0], rows[2]))


def _one_label(context: CaseContext) -> None:
    batch = Batch.of(padded("left_padding"), LENGTH)
    context.judge_rows(context.forward(ONE_LABEL, batch).logits, ONE_LABEL, batch.rows)


def _inputs_embeds(context: CaseContext) -> None:
    batch = Batch.of(padded("both_sides"), LENGTH)
    table = CLASSIFIER.weights(context.dtype).read("model.embed_tokens.weight").astype(np.float32)
    inputs = ModelInputs.prepare(
        CLASSIFIER.config,
        attention_mask=batch.mask,
        inputs_embeds=table[batch.input_ids],
        task=CLASSIFIER.task,
    )
    logits = context.model(CLASSIFIER).forward(inputs).to_numpy().logits
    context.judge_rows(logits, CLASSIFIER, batch.rows)
