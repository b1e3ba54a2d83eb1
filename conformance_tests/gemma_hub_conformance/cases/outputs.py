"""L2: hidden states, logits_to_keep and inputs_embeds."""

from functools import partial

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.cases.forward import LENGTH, padded
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.spec import CaseContext, CaseSpec


def cases() -> list[CaseSpec]:
    """What a caller can ask for besides logits."""
    states = [
        CaseSpec(
            f"L2.hidden_states.{name}",
            "Every entry: the scaled embedding, the layers' outputs, the final norm's output.",
            partial(_hidden_states, checkpoint=CHECKPOINTS[name]),
        )
        for name in ("gqa", "mha")
    ]
    keeps = [
        CaseSpec(
            f"L2.logits_to_keep.{count}",
            f"Only the last {count} slots' logits, and they are the same.",
            partial(_logits_to_keep, count=count),
        )
        for count in (1, 5)
    ]
    embeds = CaseSpec(
        "L2.inputs_embeds.unscaled",
        "Unscaled embedding rows in place of ids give the same logits.",
        _inputs_embeds,
        needs=frozenset({"inputs_embeds"}),
    )
    return [*states, *keeps, embeds]


def _hidden_states(context: CaseContext, checkpoint: DesignedCheckpoint) -> None:
    batch = Batch.of(padded("both_sides"), LENGTH)
    states = context.forward(checkpoint, batch, output_hidden_states=True).hidden_states
    config = checkpoint.config
    if states is None or len(states) != config.num_hidden_layers + 1:
        count = "no" if states is None else len(states)
        context.fail(f"got {count} hidden states; expected {config.num_hidden_layers + 1}")
    truth = context.oracle.truth(checkpoint, batch.rows, context.dtype)
    shape = (*batch.mask.shape, config.hidden_size)
    for index, state in enumerate(states):
        context.require(
            state.shape == shape,
            f"hidden_states[{index}] has shape {state.shape}; expected {shape}",
        )
    found = [state[batch.mask] for state in states]
    context.compare_layers(found, truth.states, truth.witness_states)


def _logits_to_keep(context: CaseContext, count: int) -> None:
    batch = Batch.of(padded("left_padding"), LENGTH)
    logits = context.forward(GQA, batch, logits_to_keep=count).logits
    expected = (len(batch.rows), count, GQA.config.vocab_size)
    context.require(
        logits.shape == expected, f"the logits have shape {logits.shape}; expected {expected}"
    )
    truth = context.oracle.truth(GQA, batch.rows, context.dtype)
    ends = np.cumsum([len(each.ids) for each in batch.rows])
    kept = np.concatenate([np.arange(end - count, end) for end in ends])
    witnesses = tuple(each[kept] for each in truth.witness_logits)
    context.compare("logits", logits.reshape(len(kept), -1), truth.logits[kept], witnesses)


def _inputs_embeds(context: CaseContext) -> None:
    batch = Batch.of(padded("left_padding"), LENGTH)
    table = GQA.weights(context.dtype).read("model.embed_tokens.weight").astype(np.float32)
    inputs = ModelInputs.prepare(
        GQA.config, attention_mask=batch.mask, inputs_embeds=table[batch.input_ids]
    )
    outputs = context.model(GQA).forward(inputs).to_numpy()
    context.judge_logits(outputs.logits, GQA, batch)
