"""L2, L5: what the other cases show one at a time, together, and numbers and sizes past theirs.

A port that is right about each feature alone may be wrong where two meet: a cache and a window, a
loss and a call with other labels before it, hidden states and the logits beside them. And it may be
right only as long as scores, sizes and batches are as small as those of the designed checkpoints.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.cases.cache import CAPACITY, ONE_BY_ONE, PROMPT, prompts
from gemma_hub_conformance.cases.forward import LENGTH, judge_sequences, left_padded, padded
from gemma_hub_conformance.cases.laws import HUGE, Arrays, Rewritten
from gemma_hub_conformance.cases.liveness import ONE_LAYER
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, LATER, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec, prepare

CACHED = {
    name: DesignedCheckpoint(
        f"{name}_one_layer",
        f"one layer of `{name}`",
        dataclasses.replace(CHECKPOINTS[name].config, num_hidden_layers=1),
        name,
    )
    for name in ("bias", "linear_rope", "small_limit")
}
LONG = 545
"""Tokens: more than any block of a kernel, and no multiple of one."""

NARROW = DesignedCheckpoint(
    "two_heads",
    "two heads, so that many tokens cost little",
    dataclasses.replace(ONE_LAYER.config, num_attention_heads=2, num_key_value_heads=1),
)

WIDE = DesignedCheckpoint(
    "released_widths",
    "heads of 256 features and a width past 1024, as released models have",
    dataclasses.replace(
        GQA.config,
        hidden_size=1056,
        intermediate_size=1104,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=256,
    ),
)
FRESH = DesignedCheckpoint(
    "gqa_again",
    "the main one as a model of its own, whose first cache is a small one",
    GQA.config,
    GQA.name,
)
MANY_IDS = DesignedCheckpoint(
    "large_vocabulary",
    "more ids than 16 bits hold",
    dataclasses.replace(ONE_LAYER.config, vocab_size=66_001, hidden_size=24),
)


def multiplied(arrays: Arrays, config: GemmaConfig, factors: dict[str, float]) -> Arrays:
    """Each array times the factor of the ending that its name has."""
    return {
        name: array
        * array.dtype.type(next((f for end, f in factors.items() if name.endswith(end)), 1.0))
        for name, array in arrays.items()
    }


def _rewritten(
    name: str, original: DesignedCheckpoint, factors: dict[str, float], **changes: float
) -> Rewritten:
    return Rewritten(
        f"{original.name}+{name}",
        f"`{original.name}` with {name.replace('_', ' ')}",
        dataclasses.replace(original.config, **changes),  # type: ignore[arg-type]
        original.weights_of or original.name,
        change=partial(multiplied, factors=factors),
    )


STREAM = _rewritten(
    "stream_scaled",
    CHECKPOINTS["untied"],
    dict.fromkeys(("embed_tokens.weight", "o_proj.weight", "down_proj.weight"), HUGE),
    rms_norm_eps=CHECKPOINTS["untied"].config.rms_norm_eps * HUGE**2,
)
HEAD = _rewritten("head_scaled", CHECKPOINTS["untied"], {"lm_head.weight": HUGE})
SCORES = _rewritten("large_scores", ONE_LAYER, {"q_proj.weight": 2.0**5})
GATES = _rewritten("large_gates", ONE_LAYER, {"gate_proj.weight": 2.0**4})


def cases() -> list[CaseSpec]:
    """Calls one after the other, caches of every kind of model, and ranges and sizes."""
    calls: dict[str, tuple[str, Callable[[CaseContext], None]]] = {
        "shapes": ("Calls of other shapes on one model, larger and smaller.", _shapes),
        "same_ids": ("The same ids under other masks and positions.", _same_ids),
        "beside_states": (
            "Logits beside hidden states, without padding.",
            partial(_beside, output_hidden_states=True),
        ),
        "beside_attentions": (
            "Logits beside attentions, without padding.",
            partial(_beside, output_attentions=True),
        ),
    }
    needs = {"beside_attentions": frozenset({"attentions"})}
    cached = {name: (checkpoint, frozenset({"cache"})) for name, checkpoint in CACHED.items()} | {
        name: (checkpoint, frozenset({"cache", name})) for name, checkpoint in LATER.items()
    }
    sizes = {"released_widths": WIDE, "large_vocabulary": MANY_IDS}
    ranges = {"large_scores": SCORES, "large_gates": GATES}
    return [
        *(
            CaseSpec(f"L2.calls.{name}", doc, run, needs.get(name, frozenset()))
            for name, (doc, run) in calls.items()
        ),
        CaseSpec(
            "L2.logits_to_keep.right_padding",
            "The last slots' logits where some of them are padding.",
            _keeps_slots,
        ),
        *(
            CaseSpec(
                f"L2.cache.{name}.left_padding",
                f"A prompt and then one token at a time on `{name}`: left padding.",
                partial(_cached, checkpoint=checkpoint),
                each,
            )
            for name, (checkpoint, each) in cached.items()
        ),
        CaseSpec(
            "L2.cache.inputs_embeds", "Embeddings in place of ids, prompt and steps.",
            _embeds, frozenset({"cache", "inputs_embeds"}),
        ),
        CaseSpec(
            "L2.cache.sizes", "A small cache, a larger one and another number of rows.",
            _cache_sizes, frozenset({"cache"}),
        ),
        CaseSpec("L2.lengths.rows_17", "A batch of 17 rows, and then one of two.", _many_rows),
        CaseSpec("L2.lengths.long", f"A sequence of {LONG} tokens.", _long),
        *(
            CaseSpec(
                f"L2.lengths.{name}", f"Logits of a model with {each.purpose}.",
                partial(_few_tokens, checkpoint=each),
            )
            for name, each in sizes.items()
        ),
        *(
            CaseSpec(
                f"L2.ranges.{name}", f"Logits with {name.replace('_', ' ')}.",
                partial(_judged, checkpoint=each),
            )
            for name, each in ranges.items()
        ),
        CaseSpec(
            "L2.laws.stream_scaled",
            "The residual stream times 2^20, and epsilon to match: nothing changes.",
            partial(_law, checkpoint=STREAM, factor=1.0),
        ),
        CaseSpec(
            "L2.laws.head_scaled", "A head times 2^20: the logits are, too.",
            partial(_law, checkpoint=HEAD, factor=HUGE),
        ),
    ]  # fmt: skip


# -- calls ---------------------------------------------------------------------------------------


def _shapes(context: CaseContext) -> None:
    for rows, length in ((3, LENGTH), (2, 9), (5, 17), (1, 1), (3, LENGTH)):
        lefts = (0, *[min(2, length - 1)] * (rows - 1))
        each = [row(tokens(length - left, 500 + length + left), left) for left in lefts]
        judge_sequences(context, ONE_LAYER, each, length)


def _same_ids(context: CaseContext) -> None:
    ids = [tokens(LENGTH, 510 + number) for number in range(3)]
    plain = Batch.of([row(each) for each in ids], LENGTH)
    hidden = plain.mask.copy()
    hidden[:, [0, 1, 7]] = False
    rows = tuple(
        Row(tuple(each[t] for t in np.flatnonzero(mask)), tuple(np.flatnonzero(mask)))
        for each, mask in zip(ids, hidden, strict=True)
    )
    masked = Batch(rows, plain.input_ids, hidden, None)
    gap = [*range(9), *range(309, 300 + LENGTH)]
    moved = Batch.of([row(each, 0, gap) for each in ids], LENGTH)
    for batch in (plain, masked, moved, plain):
        context.judge_logits(context.forward(ONE_LAYER, batch).logits, ONE_LAYER, batch)


def _beside(context: CaseContext, **wanted: bool) -> None:
    batch = Batch.of(padded("no_padding"), LENGTH)
    context.judge_logits(context.forward(GQA, batch, **wanted).logits, GQA, batch)


def _keeps_slots(context: CaseContext) -> None:
    rows = (row(tokens(23, 1)), row(tokens(21, 520)), row(tokens(20, 521), left=1))
    batch, keep = Batch.of(rows, LENGTH), 5
    logits = context.forward(GQA, batch, logits_to_keep=keep).logits
    context.require_shape("the logits", logits, (len(rows), keep, GQA.config.vocab_size))
    truth = context.oracle.truth(GQA, rows, context.dtype)
    seen = np.zeros_like(batch.mask)
    seen[:, -keep:] = batch.mask[:, -keep:]
    kept = seen[batch.mask]
    witnesses = tuple(each[kept] for each in truth.witness_logits)
    context.compare("logits", logits[batch.mask[:, -keep:]], truth.logits[kept], witnesses)


# -- cache ---------------------------------------------------------------------------------------


def _cached(context: CaseContext, checkpoint: DesignedCheckpoint) -> None:
    batch = prompts("left_padding")
    logits = context.extend(checkpoint, batch, ONE_BY_ONE, CAPACITY)
    context.judge_logits(logits, checkpoint, batch)


def _embeds(context: CaseContext) -> None:
    batch = prompts("left_padding")
    table = GQA.weights(context.dtype).read("model.embed_tokens.weight").astype(np.float32)
    model = context.cached_model(GQA)
    cache = model.init_cache(len(batch.rows), CAPACITY)
    parts, start = [], 0
    for size in (PROMPT, *[1] * (LENGTH - PROMPT)):
        part = slice(start, start + size)
        inputs = ModelInputs.prepare(
            GQA.config,
            attention_mask=batch.mask[:, part],
            inputs_embeds=table[batch.input_ids[:, part]],
            next_position=cache.next_position,
        )
        outputs, cache = model.extend(inputs, cache)
        parts.append(outputs.to_numpy().logits)
        start += size
    context.judge_logits(np.concatenate(parts, axis=1), GQA, batch)


def _cache_sizes(context: CaseContext) -> None:
    # The larger one has the shapes of other cases, so that a compiled backend has it already.
    small, large = (2, 5, 9, 4), (3, LENGTH, CAPACITY, PROMPT)
    for count, length, capacity, prompt in (small, large, small):
        each = [row(tokens(length - b, 530 + length + b), b) for b in range(count)]
        batch = Batch.of(each, length)
        logits = context.extend(FRESH, batch, [prompt, *[1] * (length - prompt)], capacity)
        context.judge_logits(logits, FRESH, batch)


# -- sizes and ranges ----------------------------------------------------------------------------


def _many_rows(context: CaseContext) -> None:
    rows = [row(tokens(7 - b % 3, 540 + b), left=b % 3) for b in range(17)]
    for part in (rows, rows[:2]):
        judge_sequences(context, ONE_LAYER, part, 7)


def _long(context: CaseContext) -> None:
    judge_sequences(context, NARROW, [row(tokens(LONG, 560))], LONG)


def _few_tokens(context: CaseContext, checkpoint: DesignedCheckpoint) -> None:
    size = checkpoint.config.vocab_size
    rows = [row((*tokens(8, 570, size), size - 1)), row((*tokens(6, 571, size), size - 2), 2)]
    judge_sequences(context, checkpoint, rows, 9)


def _judged(context: CaseContext, checkpoint: DesignedCheckpoint) -> None:
    judge_sequences(context, checkpoint, left_padded(), LENGTH)


def _law(context: CaseContext, checkpoint: DesignedCheckpoint, factor: float) -> None:
    original, batch = CHECKPOINTS["untied"], Batch.of(left_padded(), LENGTH)
    outputs = context.model(checkpoint).forward(prepare(checkpoint, batch)).to_numpy()
    context.judge_logits(outputs.logits / np.float32(factor), original, batch)
