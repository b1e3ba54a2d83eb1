"""Which part of a layer, or of what is around the layers, is wrong? Found by weight surgery."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gemma_hub_conformance.diagnosis.probes import (
    BRANCHES,
    Prober,
    changed,
    emptied,
    hollow,
    prefix,
)
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.rows import Batch, Row, row

ATTENTION, FEED_FORWARD = BRANCHES
_SMALL = np.float32(2.0**-30)  # a power of two: nothing is rounded
_POSITION = 7  # of a single token; not 0, where rotating changes nothing

Changes = dict[str, Callable[[np.ndarray], np.ndarray]]


def find_place_in_layer(prober: Prober, seen: Seen, layer: int) -> str:
    """The part of `layer` that is wrong, the layers before it being right.

    Returns:
        "residual stream", "norms", "attention and feed-forward together", or a part of one branch:
        "attention: scores".
    """
    model = replace(seen, checkpoint=prefix(seen.checkpoint, layer + 1))

    def without(*branches: str) -> Seen:
        return replace(model, checkpoint=emptied(model.checkpoint, (layer,), branches))

    attention_wrong = prober.fails(without(FEED_FORWARD))
    feed_forward_wrong = prober.fails(without(ATTENTION))
    if attention_wrong and feed_forward_wrong:
        return "residual stream" if prober.fails(without(ATTENTION, FEED_FORWARD)) else "norms"
    if attention_wrong:
        return f"attention: {_in_attention(prober, without(FEED_FORWARD), layer)}"
    if feed_forward_wrong:
        return f"feed-forward: {_in_feed_forward(prober, without(ATTENTION), layer)}"
    return "attention and feed-forward together"


def find_place_outside(prober: Prober, seen: Seen) -> str:
    """What is wrong if the layers add nothing: embedding, residual stream, final norm or head."""
    empty = replace(seen, checkpoint=hollow(seen.checkpoint))
    states = None if seen.chunks is not None else prober.wrong_states(empty)
    if states is not None:
        names = ("embedding", "residual stream", "final norm")
        return next((name for name, wrong in zip(names, states, strict=True) if wrong), "head")
    if not prober.fails(_with(empty, "plain_norm", {"model.norm.weight": np.zeros_like})):
        return "final norm"
    return "embedding, final norm or head"


def _in_attention(prober: Prober, seen: Seen, layer: int) -> str:
    """The part of attention that is wrong, where nothing else of the layer is left."""
    at = f"model.layers.{layer}"
    if not prober.fails(_with(seen, "plain", {f"{at}.input_layernorm.weight": np.zeros_like})):
        return "norm"
    queries = [f"{at}.self_attn.q_proj.{kind}" for kind in ("weight", "bias")]
    flat = _with(seen, "flat_scores", dict.fromkeys(queries, np.zeros_like))
    scores_only = not prober.fails(flat)
    if seen.chunks is not None:
        return "keys or positions in the cache" if scores_only else "values or mask of the cache"
    if scores_only:
        still = replace(seen, batch=_at_position_zero(seen.batch))
        return "scores" if prober.fails(still) else "rotary positions"
    if prober.fails(replace(seen, batch=_single_tokens(seen.batch))):
        return "values or output"
    return "mask or softmax"


def _in_feed_forward(prober: Prober, seen: Seen, layer: int) -> str:
    """The part of the feed-forward branch that is wrong, if nothing else of the layer is left."""
    at = f"model.layers.{layer}"
    norm = f"{at}.post_attention_layernorm.weight"
    if not prober.fails(_with(seen, "plain", {norm: np.zeros_like})):
        return "norm"
    # Near 0 every form of GELU is x / 2, and what was made small before it is made large after it.
    small: Changes = {
        f"{at}.mlp.gate_proj.weight": lambda x: x * _SMALL,
        f"{at}.mlp.down_proj.weight": lambda x: x / _SMALL,
    }
    return "projections" if prober.fails(_with(seen, "small_gates", small)) else "activation"


def _with(seen: Seen, label: str, changes: Changes) -> Seen:
    return replace(seen, checkpoint=changed(seen.checkpoint, label, changes))


def _at_position_zero(batch: Batch) -> Batch:
    """The same tokens, every one at position 0."""
    rows = [Row(each.ids, each.slots, (0,) * len(each.ids)) for each in batch.rows]
    return Batch.of(rows, batch.mask.shape[1])


def _single_tokens(batch: Batch) -> Batch:
    """The first token of each row by itself, where a softmax of one score is 1."""
    rows = [row(each.ids[:1], positions=[_POSITION]) for each in batch.rows if each.ids]
    return Batch.of(rows, 1)
