"""A beginning that a model has read once, for many prompts to go on from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError
from gemma_hub.generation.context import Context, can_edit, open_context
from gemma_hub.generation.prompt_checks import checked_ids


class Prefix:
    """The first tokens of prompts. `CausalLM.prefix` makes one.

    It holds what the model computed from them: make it again once the weights have changed. That
    memory is free when the object is gone.

    Attributes:
        token_ids: the ids, as given.
        context: one row that has read all of them but the last, so that a prompt which adds
            nothing has a token to feed too. None where there is nothing to keep: a single token,
            or a backend whose rows cannot be repeated and which therefore reads them each time.
    """

    def __init__(
        self,
        model: Model,
        config: GemmaConfig,
        token_ids: Sequence[int],
        known: "Prefix | None" = None,
    ) -> None:
        """Read the tokens.

        Args:
            model: any backend's.
            config: the model's.
            token_ids: ids of the vocabulary, at least one.
            known: what they have in common with its beginning is not read again.

        Raises:
            InputError: there are none, or something else, or `known` is another model's.
            CapacityError: there are more than the model has positions.
        """
        ids = checked_ids("The prefix", token_ids, config)
        if len(ids) > config.max_position_embeddings:
            raise CapacityError(
                f"The prefix has {len(ids)} tokens and this model has "
                f"{config.max_position_embeddings} positions (max_position_embeddings). Shorten it."
            )
        self.token_ids: tuple[int, ...] = tuple(ids.tolist())
        self.context: Context | None = None
        self._model = model
        if known is not None:
            known.check_model(model)
        if len(ids) > 1 and can_edit(model):
            self.context, shared = _begun(model, config, ids[:-1], known)
            unread = ids[None, shared:-1]
            if unread.size:
                self.context.extend(unread, np.ones(unread.shape, np.bool_))

    @property
    def num_read(self) -> int:
        """Tokens that `context` has read."""
        return 0 if self.context is None else len(self.token_ids) - 1

    def check_model(self, model: Model) -> None:
        """Refuse any other model than the one that read the tokens.

        Raises:
            InputError: `model` is another one, even if it has equal weights.
        """
        if model is not self._model:
            raise InputError(
                "The prefix was read by another model. Make it with the prefix method of the model "
                "that continues it."
            )


@dataclass(slots=True)
class ChatMemory:
    """What the model has read of a conversation, for its next turn to go on from.

    `CausalLM.chat` and `stream_chat` fill it. One is for one conversation at a time: another reads
    what the two do not have in common.

    Attributes:
        prefix: the latest turn's prompt; None before the first.
    """

    prefix: Prefix | None = None


def _begun(
    model: Model, config: GemmaConfig, ids: np.ndarray, known: Prefix | None
) -> tuple[Context, int]:
    """A context with room for the (T,) `ids`, and how many of them it has read already."""
    read = np.asarray(() if known is None else known.token_ids[: known.num_read], np.int64)
    both = min(len(read), len(ids))
    shared = int(np.cumprod(read[:both] == ids[:both]).sum())
    if known is None or known.context is None or not shared:
        return open_context(model, config, 1, len(ids)), 0
    # With room for all that was read: only then can a part of it be taken back.
    context = known.context.gather([(0, 0)], max(len(read), len(ids)))
    context.forget(np.array([len(read) - shared]))
    return context, shared
