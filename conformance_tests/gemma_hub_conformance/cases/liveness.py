"""L2.liveness: every field of the config reaches the computation, or is meant not to."""

import dataclasses
from collections.abc import Mapping
from functools import partial

from gemma_hub.error_model import noise_band, token_errors
from gemma_hub_conformance.cases.forward import LENGTH, left_padded
from gemma_hub_conformance.checkpoints import GQA, TINY_ROW_ID, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

ONE_LAYER = DesignedCheckpoint(
    "one_layer",
    "the main one with one layer: a config is compiled anew, and one layer has every operation",
    dataclasses.replace(GQA.config, num_hidden_layers=1),
    "gqa",
)

ALIVE: dict[str, object] = {
    "rms_norm_eps": 2e-5,
    "rms_norm_offset": 0.75,
    "rope_theta": 9_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 1.5},
    "query_pre_attn_scalar": 20.0,
}
"""Fields that change the numbers and no shape, with a value that differs from the main one's."""

SHAPES: dict[str, int] = {
    "vocab_size": 257,  # one more than a byte has values
    "hidden_size": 65,
    "intermediate_size": 129,
    "num_hidden_layers": 11,  # as texts, 10 comes before 2
    "num_attention_heads": 10,
    "num_key_value_heads": 3,
    "head_dim": 34,
}
"""Fields that change the shapes of parameters; no value is a multiple of a kernel's blocks."""

LATER: dict[str, tuple[dict[str, object], str]] = {
    "attn_logit_softcapping": ({"attn_logit_softcapping": 1.5}, "softcap"),
    "final_logit_softcapping": ({"final_logit_softcapping": 2.0}, "softcap"),
    "sliding_window": (
        {"sliding_window": 7, "layer_types": ("sliding_attention",)}, "sliding_window",
    ),
}  # fmt: skip
"""Fields of later generations: what to change, and the feature that it needs."""

DEAD: dict[str, object] = {
    "initializer_range": 0.5,
    "attention_dropout": 0.4,
    "max_position_embeddings": 29,
}
"""Fields that change no number in inference."""

# The mask says what is padding, and no id begins or ends a text: it is one that occurs.
SPECIAL: dict[str, object] = dict.fromkeys(
    ("pad_token_id", "bos_token_id", "eos_token_id"), TINY_ROW_ID
)
"""Fields that change none either, all at once."""

ELSEWHERE: dict[str, str] = {
    "hidden_activation": "It has one value, the tanh form of GELU.",
    "attention_bias": "L2.forward.bias has it on.",
    "tie_word_embeddings": "L2.forward.untied has it off.",
    "use_qk_norm": "No backend of first-generation Gemma has it; it is refused.",
    "layer_types": "L2.liveness.sliding_window and L2.forward.sliding_window set it.",
    "dtype": "It says how a file is stored; the compute type is an option of the build.",
    "num_labels": "L5.sequence and L5.token have one, five and seven labels.",
    "id2label": "The names of the labels are no numbers.",
    "problem_type": "L5.sequence.loss has every value.",
    "classifier_dropout": "L5.token has 0.6, which would show.",
}
"""Fields without a case here, and why."""


def cases() -> list[CaseSpec]:
    """One case for each field."""
    moves = "Another `{}` moves the logits as it moves the reference's."
    alive = [
        CaseSpec(
            f"L2.liveness.{name}",
            moves.format(name),
            partial(_moves, name=name, changes={name: value}),
        )
        for name, value in ALIVE.items()
    ]
    shapes = [
        CaseSpec(
            f"L2.liveness.{name}",
            f"Another `{name}`, {value}, is a model of another shape.",
            partial(_reshaped, name=name, value=value),
        )
        for name, value in SHAPES.items()
    ]
    later = [
        CaseSpec(
            f"L2.liveness.{name}",
            moves.format(name),
            partial(_moves, name=name, changes=changes),
            needs=frozenset({feature}),
        )
        for name, (changes, feature) in LATER.items()
    ]
    dead = [
        CaseSpec(
            f"L2.liveness.{name}",
            f"Another `{name}` moves nothing.",
            partial(_stays, name=name, changes={name: value}),
        )
        for name, value in DEAD.items()
    ]
    special = CaseSpec(
        "L2.liveness.special_ids",
        "Other ids of padding, beginning and end move nothing.",
        partial(_stays, name="special_ids", changes=SPECIAL),
    )
    return [*alive, *shapes, *later, *dead, special]


def _changed(name: str, changes: Mapping[str, object]) -> DesignedCheckpoint:
    config = dataclasses.replace(ONE_LAYER.config, **changes)  # type: ignore[arg-type]
    return DesignedCheckpoint(f"one_layer+{name}", f"another {name}", config, "gqa")


def _moves(context: CaseContext, name: str, changes: Mapping[str, object]) -> None:
    checkpoint = _changed(name, changes)
    batch = Batch.of(left_padded(), LENGTH)
    truth = context.oracle.truth(checkpoint, batch.rows, context.dtype)
    before = context.oracle.truth(ONE_LAYER, batch.rows, context.dtype)
    band = noise_band(truth.logits, truth.witness_logits)
    moved = float(token_errors(before.logits, truth.logits).max())
    if moved < 100 * band.rms:
        raise RuntimeError(f"The value for {name} is too close to the main one to show anything.")
    context.judge_logits(context.forward(checkpoint, batch).logits, checkpoint, batch)


def _reshaped(context: CaseContext, name: str, value: int) -> None:
    checkpoint = _changed(name, {name: value})
    size = checkpoint.config.vocab_size
    rows = (
        row((*tokens(LENGTH - 1, 1, size), size - 1)),
        row(tokens(14, 4, size), left=9),
        row(tokens(22, 5, size), left=1),
    )
    batch = Batch.of(rows, LENGTH)
    context.judge_logits(context.forward(checkpoint, batch).logits, checkpoint, batch)


def _stays(context: CaseContext, name: str, changes: Mapping[str, object]) -> None:
    checkpoint = _changed(name, changes)
    batch = Batch.of(left_padded(), LENGTH)
    truth = context.oracle.truth(ONE_LAYER, batch.rows, context.dtype)
    logits = context.forward(checkpoint, batch).logits
    context.require_shape("the logits", logits, (*batch.mask.shape, truth.logits.shape[-1]))
    context.compare("logits", logits[batch.mask], truth.logits, truth.witness_logits)
