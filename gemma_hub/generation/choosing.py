"""The next token of each of several rows, which may be at different steps, and what it ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.generation.random import uniform
from gemma_hub.generation.rules import Row, apply_rules
from gemma_hub.generation.sampling import check_logits, choose, log_probabilities
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.outputs import DraftCounts, FinishReason

Ends = Callable[[int, int], bool]
"""(row, id of its new token) -> whether the row ends with it; called once for each, in order."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """One new token of one row.

    Attributes:
        row: index of the row in the request: of its prompt, where each has one continuation.
        token_id: the id.
        finish_reason: set on the row's last token only.
        logprob: natural-log probability before temperature and filters, where asked for.
        drafts: of the whole row, set on its last token only, where tokens were drafted.
    """

    row: int
    token_id: int
    finish_reason: FinishReason | None
    logprob: float | None
    drafts: DraftCounts | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The next tokens of n rows.

    Attributes:
        token_ids: (n,) int64.
        logprobs: (n,) natural-log probabilities before temperature and filters, where asked for.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray | None

    def logprob(self, place: int) -> float | None:
        """That of one row."""
        return None if self.logprobs is None else float(self.logprobs[place])


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses tokens by the rules, the filters and the random bits of one request.

    Attributes:
        settings: of the request.
        stops: ids that end a row.
    """

    settings: GenerationSettings
    stops: tuple[int, ...]

    @classmethod
    def of(cls, settings: GenerationSettings, config: GemmaConfig) -> "Chooser":
        """With the stop ids of `settings`, or of `config` if it names none."""
        given = settings.eos_token_ids
        return cls(settings, config.eos_token_ids if given is None else given)

    def choose(self, logits: np.ndarray, rows: Sequence[Row]) -> Choice:
        """The token of each row that follows those in `row.new`, which it does not change.

        Args:
            logits: (n, V) of each row's last token.
            rows: the n rows. What is chosen for one depends on no other.

        Raises:
            GemmaHubError: no token can be chosen from the logits of a row.
            InputError: a rule leaves a row no token, or a function returns what it must not.
        """
        numbers = np.array([row.index for row in rows])
        steps = np.array([len(row.new) for row in rows])
        check_logits(logits, numbers, steps)  # so that a rule is not blamed for the model
        ruled = apply_rules(logits, rows, self.settings, self.stops)
        seed = self.settings.seed
        draws = None if seed is None else uniform(seed, numbers, steps)
        token_ids = choose(ruled, self.settings, draws, rows=numbers, steps=steps)
        wanted = self.settings.logprobs
        return Choice(token_ids, log_probabilities(logits, token_ids) if wanted else None)

    def take(
        self, row: Row, token_id: int, logprob: float | None, ends: Ends | None = None
    ) -> NewToken:
        """Add a chosen token to `row.new`, and see whether the row ends with it."""
        row.new.append(token_id)
        stops = token_id in self.stops
        if ends is not None:
            stops |= ends(row.index, token_id)
        is_last = len(row.new) == self.settings.max_new_tokens
        reason: FinishReason | None = "stop" if stops else "length" if is_last else None
        return NewToken(row.index, token_id, reason, logprob)
