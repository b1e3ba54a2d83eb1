"""A beginning that a model has read once, for many prompts to go on from."""

from collections.abc import Sequence

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

    def __init__(self, model: Model, config: GemmaConfig, token_ids: Sequence[int]) -> None:
        """Read the tokens.

        Args:
            model: any backend's.
            config: the model's.
            token_ids: ids of the vocabulary, at least one.

        Raises:
            InputError: there are none, or something else.
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
        if len(ids) > 1 and can_edit(model):
            read = ids[None, :-1]
            self.context = open_context(model, config, 1, read.shape[1])
            self.context.extend(read, np.ones(read.shape, np.bool_))

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
