"""What calls return: frozen records, the same from every backend."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """What one forward pass returns, in the backend's own arrays.

    Attributes:
        logits: (B, T, V) float32; only the last `logits_to_keep` positions where that was asked.
        hidden_states: num_hidden_layers + 1 arrays (B, T, D) in the compute dtype, on request: the
            scaled embedding, the output of each layer but the last, and last the final norm's
            output (the same entries as in Transformers).
        as_numpy: turns one of the arrays into NumPy; bfloat16 becomes float32.
    """

    logits: Any
    hidden_states: tuple[Any, ...] | None = None
    as_numpy: Callable[[Any], np.ndarray] = field(default=np.asarray, repr=False)

    def to_numpy(self) -> Self:
        """The same record with NumPy arrays (bfloat16 and float16 as float32)."""
        states = self.hidden_states
        return dataclasses.replace(
            self,
            logits=self.as_numpy(self.logits),
            hidden_states=None if states is None else tuple(map(self.as_numpy, states)),
            as_numpy=np.asarray,
        )


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated continuation.

    Attributes:
        text: the new text, without special tokens.
        token_ids: the new ids only; the stop token is the last one where there was one.
        prompt_token_ids: what was fed, without padding.
        finish_reason: "stop" (an end-of-sequence id) or "length" (max_new_tokens).
        logprobs: natural-log probability of each new id under the model (before temperature and
            filters), on request.
        seed: what the random bits came from, also where none was given; None for greedy text.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class TextPiece:
    """One step of a stream.

    Attributes:
        text: text that became certain at this step; may be empty.
        token_id: the id of this step, or None for the piece that flushes the rest at the end.
        finish_reason: set on the last piece only.
    """

    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None
