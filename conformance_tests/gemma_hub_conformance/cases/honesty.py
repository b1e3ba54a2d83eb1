"""L2.honesty: a model that nobody could have made a backend for.

The sizes of the designed checkpoints are in this package for all to read. Those of this one are
drawn from the seed of the run, so a backend that knows the others, or answers from a recording,
meets a model that it has never seen.
"""

import dataclasses

import numpy as np

from gemma_hub_conformance.cases.forward import LENGTH
from gemma_hub_conformance.checkpoints import GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_conformance.seeds import entropy
from gemma_hub_conformance.spec import CaseContext, CaseSpec

_DRAW = 90_001  # no other draw of the suite has this key


def cases() -> list[CaseSpec]:
    """One model, another for each seed."""
    return [
        CaseSpec(
            "L2.honesty.drawn_sizes",
            "Logits of a model whose every size is drawn from the run's seed.",
            _drawn_sizes,
        )
    ]


def drawn() -> DesignedCheckpoint:
    """The model of this run: heads, widths, depth, vocabulary, norm and positions."""
    rng = np.random.default_rng(entropy(_DRAW))

    def between(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    kv_heads = between(1, 4)
    config = dataclasses.replace(
        GQA.config,
        vocab_size=between(70, 210),
        hidden_size=between(33, 97),
        intermediate_size=between(50, 150),
        num_hidden_layers=between(1, 3),
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * between(1, 3),
        head_dim=2 * between(6, 17),
        rms_norm_eps=float(rng.uniform(1e-6, 1e-5)),
        rope_theta=float(rng.uniform(1e4, 1e5)),
    )
    return DesignedCheckpoint("drawn", "sizes that nobody knows before the run", config)


def _drawn_sizes(context: CaseContext) -> None:
    checkpoint = drawn()
    size = checkpoint.config.vocab_size
    rows = (
        row(tokens(LENGTH, 301, size)),
        row(tokens(14, 302, size), left=9),
        row(tokens(22, 303, size), left=1),
    )
    batch = Batch.of(rows, LENGTH)
    context.judge_logits(context.forward(checkpoint, batch).logits, checkpoint, batch)
