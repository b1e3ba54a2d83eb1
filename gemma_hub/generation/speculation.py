"""Speculation: several tokens of a row from one call of the model, where a draft guessed them.

The model reads the proposals of a drafter in one call. Then a token is chosen at each place as it
always is, and the row goes on as long as that is the token which was proposed. What is chosen
depends on the tokens before it alone, so the tokens are those of the loop without drafts, sampled
ones too: a wrong proposal costs time and changes nothing.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.generation.choosing import Chooser, Ends, NewToken
from gemma_hub.generation.drafting import LONGEST_WAIT, Drafter
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.ragged import RaggedContext
from gemma_hub.generation.rules import Row
from gemma_hub.outputs import DraftCounts


@dataclass(slots=True)
class _Draft:
    """A row and what is proposed for it.

    Attributes:
        row: with the tokens that are chosen.
        limit: tokens to propose next, at most.
        token_ids: the proposals after the row's last token.
        right: how many of them have been chosen since.
        runs: whether the row has not ended.
        misses: calls of which no proposal was right, since one was.
        wait: calls to let pass before the next proposals.
        proposed: of all calls, up to now.
        accepted: likewise.
    """

    row: Row
    limit: int
    token_ids: list[int] = field(default_factory=list)
    right: int = 0
    runs: bool = True
    misses: int = 0
    wait: int = 0
    proposed: int = 0
    accepted: int = 0

    def follow(self, token_id: int) -> bool:
        """Note the token that was chosen; whether the one after it can be, from the same call."""
        if self.token_ids[self.right : self.right + 1] != [token_id]:
            return False
        self.right += 1
        self.accepted += 1
        return self.runs

    def judge(self, most: int) -> None:
        """Learn from the proposals of a call: after wrong ones few and seldom, for they cost time.

        Args:
            most: tokens to propose at most, ever.
        """
        if not self.token_ids:
            self.wait = max(self.wait - 1, 0)
        elif self.right:
            self.misses, self.limit = 0, min(most, 2 * self.right + 1)
        else:
            self.misses, self.limit = self.misses + 1, 1
            self.wait = min(2**self.misses // 2 - 1, LONGEST_WAIT)

    def count(self, max_new_tokens: int) -> int:
        """Tokens to propose next."""
        room = max_new_tokens - len(self.row.new) - 1  # the token after the last one comes anyway
        return min(self.limit, room) if self.runs and not self.wait else 0

    def replace(self, token_ids: list[int]) -> None:
        """Go on to other proposals."""
        self.token_ids, self.right = token_ids, 0
        self.proposed += len(token_ids)


def speculate(
    model: Model,
    config: GemmaConfig,
    rows: Sequence[Row],
    chooser: Chooser,
    drafter: Drafter,
    ends: Ends | None = None,
    prefix: Prefix | None = None,
) -> Iterator[NewToken]:
    """New tokens as they are chosen: those of a row in their order, up to draft_tokens + 1 a call.

    Args:
        model: one whose rows can be edited.
        config: the model's.
        rows: at least one, without new tokens.
        chooser: of the request; it and `ends` are called once for each token that comes out.
        drafter: a new one, for these rows.
        ends: ends rows at more than the stop ids.
        prefix: what all rows begin with, which `model` has read already.
    """
    most, limit = chooser.settings.draft_tokens, chooser.settings.max_new_tokens
    prompts = [row.prompt for row in rows]
    context, last = RaggedContext.read(model, config, prompts, limit, most + 1, prefix)
    logits = last[:, None]
    drafts = [_Draft(row, most) for row in rows]
    while True:
        yield from _verified(drafts, logits, chooser, ends)
        running = [place for place, draft in enumerate(drafts) if draft.runs]
        if not running:
            return
        context.forget(np.array([len(draft.token_ids) - draft.right for draft in drafts]))
        if 2 * len(running) <= len(drafts):
            context.select(running)
            drafts = [drafts[place] for place in running]
        for draft in drafts:
            draft.judge(most)
        counts = [draft.count(limit) for draft in drafts]
        proposals = drafter.propose([draft.row for draft in drafts], counts)
        for draft, proposal in zip(drafts, proposals, strict=True):
            draft.replace(proposal)
        logits = context.extend([[d.row.new[-1], *d.token_ids] if d.runs else [] for d in drafts])


def _verified(
    drafts: Sequence[_Draft], logits: np.ndarray, chooser: Chooser, ends: Ends | None
) -> Iterator[NewToken]:
    """The tokens that each row gains from one call: its right proposals and one more.

    Args:
        drafts: of all rows.
        logits: (B, T, V); the last ones of a row are those after its last token and its proposals.
        chooser: of the request.
        ends: as in `speculate`.
    """
    places = [place for place, draft in enumerate(drafts) if draft.runs]
    while places:
        # Together for all rows at a place, because a call of the chooser has a price of its own.
        slots = [drafts[place].right - len(drafts[place].token_ids) - 1 for place in places]
        choice = chooser.choose(logits[places, slots], [drafts[place].row for place in places])
        going: list[int] = []
        for index, place in enumerate(places):
            draft = drafts[place]
            token_id = int(choice.token_ids[index])
            token = chooser.take(draft.row, token_id, choice.logprob(index), ends)
            draft.runs = token.finish_reason is None
            if draft.follow(token_id):
                going.append(place)
            if not draft.runs:
                counts = DraftCounts(draft.proposed, draft.accepted)
                token = dataclasses.replace(token, drafts=counts)
            yield token
        places = going
