"""Prompts, read by a model with little padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.generation.context import Context, can_edit, left_padded, open_context
from gemma_hub.generation.prefix import Prefix

CALL_COST = 128
"""What a call of the model costs, in padding tokens.

Measured with PyTorch on a CPU, where 64 to 128 were best; a GPU, which waits for its memory below
some 200 tokens, would take a little more.
"""


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """What a model has read.

    Attributes:
        contexts: at least one.
        places: for each prompt the index of its context and of its row there.
        logits: (n, V) after each prompt.
    """

    contexts: list[Context]
    places: list[tuple[int, int]]
    logits: np.ndarray

    @property
    def is_one_context(self) -> bool:
        """Whether the rows of the only context are the prompts, in their order."""
        return self.places == [(0, row) for row in range(len(self.places))]


def read_prompts(
    model: Model,
    config: GemmaConfig,
    prompts: Sequence[np.ndarray],
    room: int,
    prefix: Prefix | None = None,
) -> ReadPrompts:
    """Read prompts: equal ones once, and those of like length together.

    A model whose rows cannot be edited reads them all together, so that they are in one context.

    Args:
        model: any backend's.
        config: the model's.
        prompts: (T,) int64 ids each, that begin with those of `prefix`.
        room: tokens that each row may come to have, if the result is one context.
        prefix: what the model has read already.
    """
    edits = can_edit(model)
    keys = [ids.tobytes() if edits else place for place, ids in enumerate(prompts)]
    firsts: dict[object, int] = {}  # where each distinct prompt comes first
    for place, key in enumerate(keys):
        firsts.setdefault(key, place)
    distinct = list(firsts)
    known = 0 if prefix is None else prefix.num_read
    unread = [prompts[place][known:] for place in firsts.values()]
    groups = like_lengths([len(ids) for ids in unread]) if edits else [list(range(len(unread)))]
    is_final = len(groups) == 1 and len(distinct) == len(prompts)
    contexts: list[Context] = []
    found: dict[object, tuple[tuple[int, int], np.ndarray]] = {}
    for group in groups:
        ids, mask = left_padded([unread[each] for each in group], config.pad_token_id or 0)
        needed = known + ids.shape[1]
        size = max(room, needed) if is_final else needed
        context = _opened(model, config, len(group), size, prefix)
        logits = context.extend(ids, mask)[:, -1]
        for row, each in enumerate(group):
            found[distinct[each]] = ((len(contexts), row), logits[row])
        contexts.append(context)
    return ReadPrompts(
        contexts,
        places=[found[key][0] for key in keys],
        logits=np.stack([found[key][1] for key in keys]),
    )


def _opened(
    model: Model, config: GemmaConfig, rows: int, size: int, prefix: Prefix | None
) -> Context:
    """A context that has read `prefix` in every row."""
    if prefix is None or prefix.context is None:
        return open_context(model, config, rows, size)
    return prefix.context.gather([(0, 0)] * rows, size)


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Groups of places such that the tokens, the padding and the calls cost least.

    A group costs its longest length for each member, and `CALL_COST`.

    Returns:
        The groups, short ones first; the places of each in ascending order.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    least = np.zeros(len(order) + 1)  # cost of the first so many
    starts = np.zeros(len(order) + 1, np.int64)  # of the last group among them
    for end in range(1, len(order) + 1):
        padded = (end - np.arange(end)) * lengths[order[end - 1]]
        costs = least[:end] + padded
        starts[end] = np.argmin(costs)
        least[end] = costs[starts[end]] + CALL_COST
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = int(starts[end])
        groups.append(sorted(order[start:end]))
        end = start
    return groups[::-1]
