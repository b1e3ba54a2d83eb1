"""What a comparison feeds: prompts, as texts or as ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.tokenizers import Tokenizer

DEFAULT_TEXTS = (
    "Once upon a time",
    "The king said to his three sons,",
    "def add(a, b):\n    return",
    "Caf\u00e9 \u2014 3.14 \u00d7 2 = 6.28! \U0001f98a",
    "A miller had one daughter, who could do whatever she put her mind to. She mended the wheel "
    "when it broke, she kept the mice from the flour, and on winter evenings she told stories "
    "that made the whole village forget the cold. One day a stranger knocked at the door and "
    "asked for shelter, and she answered that",
)
"""Short and varied, and one that is longer; made for this purpose."""

_PROMPT_LENGTHS = (4, 9, 1, 17, 64)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: what a person reads, and its ids."""

    text: str
    token_ids: tuple[int, ...]


def prompts(
    texts: Sequence[str | Sequence[int]] | None,
    config: GemmaConfig,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
) -> tuple[Prompt, ...]:
    """The prompts of a comparison.

    Args:
        texts: strings, or sequences of ids; None for a default that fits the checkpoint: texts
            where there is a tokenizer, and otherwise ids drawn at random from a fixed seed.
        config: the model's.
        tokenizer: the checkpoint's, or None where it has none.
        max_new_tokens: how many tokens will follow each prompt.

    Raises:
        InputError: there are none, or texts were given and there is no tokenizer.
    """
    if texts is None:
        return _default_prompts(config, tokenizer, max_new_tokens)
    if isinstance(texts, str) or not len(texts):
        raise InputError(f"texts is {texts!r}; expected a list of at least one text.")
    found = []
    for text in texts:
        if not isinstance(text, str):
            found.append(Prompt(f"ids {list(text)}", tuple(int(token) for token in text)))
        elif tokenizer is None:
            raise InputError(
                "This checkpoint has no tokenizer.model, so it cannot read texts. Give lists of "
                "token ids instead, or put the file into its folder."
            )
        else:
            found.append(Prompt(text, tuple(tokenizer.encode(text))))
    return tuple(found)


def _fitting(text: str, tokenizer: Tokenizer, room: int) -> Prompt:
    token_ids = tokenizer.encode(text)
    if len(token_ids) > room:
        token_ids = token_ids[:room]
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return Prompt(text, tuple(token_ids))


def _default_prompts(
    config: GemmaConfig, tokenizer: Tokenizer | None, max_new_tokens: int
) -> tuple[Prompt, ...]:
    room = max(1, config.max_position_embeddings - max_new_tokens)
    if tokenizer is not None:
        return tuple(_fitting(text, tokenizer, room) for text in DEFAULT_TEXTS)
    random = np.random.default_rng(0)
    found = []
    for length in _PROMPT_LENGTHS:
        drawn = random.integers(0, config.vocab_size, min(length, room)).tolist()
        found.append(Prompt(f"{len(drawn)} random ids", tuple(drawn)))
    return tuple(found)
