"""L3: in a narrower type the error is the rounding noise of that type and no more."""

from functools import partial

from gemma_hub_conformance.cases.cache import CAPACITY, prompts
from gemma_hub_conformance.cases.forward import LENGTH, padded
from gemma_hub_conformance.checkpoints import CHECKPOINTS, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.spec import CaseContext, CaseSpec


def cases() -> list[CaseSpec]:
    """Forward and cache in bfloat16; forward in float16."""
    forward = [
        CaseSpec(
            f"L3.{dtype}.forward.{name}.{padding}",
            f"Logits of `{name}` in {dtype}: {padding.replace('_', ' ')}.",
            partial(_forward, checkpoint=CHECKPOINTS[name], padding=padding),
            dtype=dtype,
        )
        for dtype, name in (("bfloat16", "gqa"), ("bfloat16", "mha"), ("float16", "gqa"))
        for padding in ("left_padding", "right_padding")
    ]
    cache = CaseSpec(
        "L3.bfloat16.cache.prefill_decode",
        "Prefill and one token at a time in bfloat16.",
        _cache,
        needs=frozenset({"cache"}),
        dtype="bfloat16",
    )
    return [*forward, cache]


def _forward(context: CaseContext, checkpoint: DesignedCheckpoint, padding: str) -> None:
    batch = Batch.of(padded(padding), LENGTH)
    context.judge_logits(context.forward(checkpoint, batch).logits, checkpoint, batch)


def _cache(context: CaseContext) -> None:
    checkpoint = CHECKPOINTS["gqa"]
    batch = prompts("left_padding")
    logits = context.extend(checkpoint, batch, [7, *[1] * 16], CAPACITY)
    context.judge_logits(logits, checkpoint, batch)
