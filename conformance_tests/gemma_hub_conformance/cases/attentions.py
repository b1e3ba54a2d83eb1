"""L5.attentions: the probabilities with which each token attends to the others."""

from functools import partial

import numpy as np

from gemma_hub_conformance.cases.forward import LENGTH, padded
from gemma_hub_conformance.checkpoints import CHECKPOINTS, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.spec import CaseContext, CaseSpec


def cases() -> list[CaseSpec]:
    """Of shared and of own key/value heads, padded on both sides."""
    return [
        CaseSpec(
            f"L5.attentions.{name}",
            f"Every layer's attention probabilities of `{name}`; to padding they are 0.",
            partial(_attentions, checkpoint=CHECKPOINTS[name]),
            needs=frozenset({"attentions"}),
        )
        for name in ("gqa", "mha")
    ]


def _attentions(context: CaseContext, checkpoint: DesignedCheckpoint) -> None:
    batch = Batch.of(padded("both_sides"), LENGTH)
    found = context.forward(checkpoint, batch, output_attentions=True).attentions
    config = checkpoint.config
    if found is None or len(found) != config.num_hidden_layers:
        context.fail(
            f"got {found and len(found)} layers of attentions; expected {config.num_hidden_layers}"
        )
    shape = (len(batch.rows), config.num_attention_heads, LENGTH, LENGTH)
    for layer, probs in enumerate(found):
        context.require_shape(f"attentions[{layer}]", probs, shape)
        for b, each in enumerate(batch.rows):
            slots = list(each.slots)
            real = probs[b][:, slots]  # (N, n, S)
            unseen = np.delete(real, slots, axis=-1)
            context.require(
                not unseen.any(), f"attentions[{layer}]: a token of row {b} attends to padding"
            )
            truth, *witnesses = context.oracle.attentions(checkpoint, each)
            context.compare(
                f"attentions[{layer}] of row {b}",
                real[:, :, slots],
                truth[layer],
                tuple(witness[layer] for witness in witnesses),
            )
