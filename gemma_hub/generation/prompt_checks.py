"""Checks of prompts, before any work."""

from collections.abc import Sequence

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError


def checked_prompt(
    name: str,
    prompt: Sequence[int],
    config: GemmaConfig,
    max_new_tokens: int,
    prefix: Sequence[int] = (),
) -> np.ndarray:
    """(T,) int64 ids of one prompt.

    Args:
        name: what messages call it, such as "Prompt 0".
        prompt: ids without padding, those of `prefix` included.
        config: the model's.
        max_new_tokens: that are to follow.
        prefix: what it must begin with.

    Raises:
        InputError: it is empty, does not begin with `prefix`, or holds something that is no id of
            the vocabulary.
        CapacityError: it and its new tokens need more positions than the model has.
    """
    ids = checked_ids(name, prompt, config)
    if tuple(ids[: len(prefix)].tolist()) != tuple(prefix):
        raise InputError(f"{name} does not begin with the ids of its prefix; join them.")
    # The last new token is never fed, so it needs no position.
    limit = config.max_position_embeddings
    needed = len(ids) + max_new_tokens - 1
    if needed > limit:
        room = limit - len(ids) + 1
        advice = f"Ask for at most {room} new tokens" if room > 0 else "Shorten the prompt"
        shared = f" ({len(prefix)} of them its prefix)" if prefix else ""
        raise CapacityError(
            f"{name} has {len(ids)} tokens{shared} and max_new_tokens is {max_new_tokens}: "
            f"that needs {needed} positions, and this model has {limit} (max_position_embeddings). "
            f"{advice}."
        )
    return ids


def checked_ids(name: str, given: Sequence[int], config: GemmaConfig) -> np.ndarray:
    """(T,) int64 ids, at least one, all of them in the vocabulary.

    Args:
        name: what they are, to begin a message with.
        given: the ids.
        config: the model's.

    Raises:
        InputError: they are not that.
    """
    if len(given) == 0:
        raise InputError(f"{name} has no tokens; give at least one, such as <bos>.")
    ids = np.asarray(given)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{name} is {ids.dtype} of shape {ids.shape}; expected a row of ids.")
    bad = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
    if len(bad):
        raise InputError(
            f"{name} has the id {ids[bad[0]]} at place {bad[0]}; expected 0 to "
            f"{config.vocab_size - 1}. Use the tokenizer of the same checkpoint."
        )
    return ids.astype(np.int64)
