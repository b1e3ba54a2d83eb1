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
        logits: float32, by task: causal_lm (B, T, V), only the last `logits_to_keep` positions
            where that was asked; sequence_classification (B, num_labels); token_classification
            (B, T, num_labels); base None.
        hidden_states: num_hidden_layers + 1 arrays (B, T, D) in the compute dtype, on request: the
            scaled embedding, the output of each layer but the last, and last the final norm's
            output (the same entries as in Transformers).
        as_numpy: turns one of the arrays into NumPy; bfloat16 becomes float32.
        loss: one number in float32 where labels were given, else None.
        attentions: one array (B, N, T, S) for each layer, on request: the probabilities with which
            each token attends to each other.
        last_hidden_state: (B, T, D) in the compute dtype, the final norm's output: the result of
            the task base; None for others.
    """

    logits: Any = None
    hidden_states: tuple[Any, ...] | None = None
    as_numpy: Callable[[Any], np.ndarray] = field(default=np.asarray, repr=False)
    loss: Any = None
    attentions: tuple[Any, ...] | None = None
    last_hidden_state: Any = None

    def to_numpy(self) -> Self:
        """The same record with NumPy arrays (bfloat16 and float16 as float32)."""

        def array(value: Any) -> np.ndarray | None:
            return None if value is None else self.as_numpy(value)

        def arrays(values: tuple[Any, ...] | None) -> tuple[np.ndarray, ...] | None:
            return None if values is None else tuple(map(self.as_numpy, values))

        return dataclasses.replace(
            self,
            logits=array(self.logits),
            hidden_states=arrays(self.hidden_states),
            as_numpy=np.asarray,
            loss=array(self.loss),
            attentions=arrays(self.attentions),
            last_hidden_state=array(self.last_hidden_state),
        )


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """How well drafts did for one row.

    Attributes:
        proposed: tokens that were guessed.
        accepted: those of them that were right, and so came without a call of the model each.
    """

    proposed: int
    accepted: int


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
        score: of a beam search: the sum of the log-probabilities after the rules, divided by
            length ** length_penalty; None otherwise.
        drafts: how many tokens were drafted; None without a draft.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    seed: int | None = None
    score: float | None = None
    drafts: DraftCounts | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How probable one text is.

    Attributes:
        token_ids: its tokens, without the <bos> that was put before them.
        logprobs: natural-log probability of each of them, given those before it.
        total: their sum, the text's own; 0 for an empty text.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float


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
