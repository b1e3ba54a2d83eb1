"""What the model classes return; the fields are Transformers'. Twin: gemma_hub_flax/outputs.py.

Axes: B batch, T tokens, S key slots, D width, N query heads, V vocabulary, L labels.
"""

from typing import NamedTuple

from torch import Tensor

from gemma_hub_torch.cache import KeyValueCache


class BaseModelOutput(NamedTuple):
    """What the decoder without a head returns.

    Attributes:
        last_hidden_state: (B, T, D), after the final norm.
        past_key_values: the cache with this call's tokens in it, where one was asked for.
        hidden_states: on request num_layers + 1 arrays (B, T, D): the scaled embedding, the output
            of each layer but the last, and the final norm's output.
        attentions: on request one (B, N, T, S) array a layer, S the tokens so far.
    """

    last_hidden_state: Tensor
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class HeadOutput(NamedTuple):
    """What a model with a head returns.

    Attributes:
        loss: float32 scalar, where labels were given.
        logits: float32; (B, T, V) of words, (B, L) of a sequence, (B, T, L) of tokens.
        past_key_values, hidden_states, attentions: as in `BaseModelOutput`.
    """

    loss: Tensor | None
    logits: Tensor
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
