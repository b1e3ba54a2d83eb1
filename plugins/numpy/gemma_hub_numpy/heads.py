"""The heads: what the final norm's output becomes, by task."""

from collections.abc import Iterator

import numpy as np

from gemma_hub.errors import InputError
from gemma_hub.inputs import ModelInputs
from gemma_hub_numpy.arithmetic import Array
from gemma_hub_numpy.layers import Layers

_VOCABULARY_BLOCK = 8_192  # rows of the head at a time: a large vocabulary in float64 is gigabytes


class Heads(Layers):
    """From the final norm's output to logits."""

    def logits(self, x: Array, inputs: ModelInputs) -> Array | None:
        """(B, T, D), normed, to the task's logits; None for the task "base"."""
        if self.task == "base":
            return None
        if self.task == "causal_lm":
            return self.head(x[:, -inputs.logits_to_keep :])
        if self.task == "token_classification":
            return self.score_head(x)
        return self.pool(self.score_head(x), pooled_positions_of(inputs))

    def head(self, x: Array) -> Array:
        """(B, T, D), normed, to (B, T, V) logits."""
        blocks = [self.store(self.contract("btd,vd->btv", x, rows)) for rows in self.head_rows()]
        return self.soft_cap(np.concatenate(blocks, axis=-1), self.config.final_logit_softcapping)

    def head_rows(self) -> Iterator[Array]:
        """The (V, D) matrix of the head, a block of rows at a time."""
        name = self.head_name()
        for first in range(0, self.config.vocab_size, _VOCABULARY_BLOCK):
            yield self.rows(name, slice(first, first + _VOCABULARY_BLOCK))

    def head_name(self) -> str:
        """Name of the head's matrix; a tied head is the embedding."""
        tied = self.config.tie_word_embeddings
        return "model.embed_tokens.weight" if tied else "lm_head.weight"

    def score_head(self, x: Array) -> Array:
        """(B, T, D), normed, to (B, T, C) logits; a token classifier has a bias."""
        return self.linear(x, "score")

    def pool(self, x: Array, pooled_positions: Array) -> Array:
        """(B, T, C) to (B, C): of each row the token that stands for it."""
        return np.asarray(x[np.arange(len(x)), pooled_positions])


def pooled_positions_of(inputs: ModelInputs) -> Array:
    """The pooled positions, or an InputError if the inputs were prepared for another task."""
    if inputs.pooled_positions is None:
        raise InputError(
            "The inputs have no pooled_positions: they were prepared for another task. Give "
            "task='sequence_classification' to ModelInputs.prepare."
        )
    return inputs.pooled_positions
