"""L2.liveness: every number in the config reaches the computation, or is meant not to."""

import dataclasses
from functools import partial

from gemma_hub.error_model import noise_band, token_errors
from gemma_hub_conformance.cases.forward import LENGTH, PADDINGS
from gemma_hub_conformance.checkpoints import GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.spec import CaseContext, CaseSpec

# One layer only: a config is compiled anew, and one layer has every operation.
_ONE_LAYER = dataclasses.replace(GQA.config, num_hidden_layers=1)

ALIVE: dict[str, object] = {
    "rms_norm_eps": 2e-5,
    "rms_norm_offset": 0.75,
    "rope_theta": 9_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 1.5},
    "query_pre_attn_scalar": 20.0,
}
"""Fields that change the numbers and no shape, with a value that differs from the main one's."""

DEAD: dict[str, object] = {
    "initializer_range": 0.5,
    "attention_dropout": 0.4,
    "max_position_embeddings": 29,
}
"""Fields that change no number in inference."""


def cases() -> list[CaseSpec]:
    """One case for each field."""
    alive = [
        CaseSpec(
            f"L2.liveness.{name}",
            f"Another `{name}` moves the logits as it moves the reference's.",
            partial(_moves, name=name, value=value),
        )
        for name, value in ALIVE.items()
    ]
    dead = [
        CaseSpec(
            f"L2.liveness.{name}",
            f"Another `{name}` moves nothing.",
            partial(_stays, name=name, value=value),
        )
        for name, value in DEAD.items()
    ]
    return [*alive, *dead]


def _changed(name: str, value: object) -> DesignedCheckpoint:
    config = dataclasses.replace(_ONE_LAYER, **{name: value})  # type: ignore[arg-type]
    return DesignedCheckpoint(f"one_layer+{name}", f"another {name}", config, "gqa")


def _moves(context: CaseContext, name: str, value: object) -> None:
    checkpoint = _changed(name, value)
    batch = Batch.of(PADDINGS["left_padding"], LENGTH)
    plain = DesignedCheckpoint("one_layer", "the main config", _ONE_LAYER, "gqa")
    truth = context.oracle.truth(checkpoint, batch.rows, context.dtype)
    before = context.oracle.truth(plain, batch.rows, context.dtype)
    band = noise_band(truth.logits, truth.witness_logits)
    moved = float(token_errors(before.logits, truth.logits).max())
    if moved < 100 * band.rms:
        raise RuntimeError(f"The value for {name} is too close to the main one to show anything.")
    context.judge_logits(context.forward(checkpoint, batch).logits, checkpoint, batch)


def _stays(context: CaseContext, name: str, value: object) -> None:
    checkpoint = _changed(name, value)
    batch = Batch.of(PADDINGS["left_padding"], LENGTH)
    context.judge_logits(context.forward(checkpoint, batch).logits, checkpoint, batch)
