"""The prompts of a call as rows of ids, from texts, ids and masks."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gemma_hub.errors import InputError
from gemma_hub.generation.prefix import Prefix
from gemma_hub.tokenizers import Tokenizer


def prompt_ids(
    tokenizer: Callable[[], Tokenizer],
    prompt: Any,
    input_ids: Any,
    attention_mask: Any,
    prefix: Prefix | None,
) -> list[list[int]]:
    """The ids of each prompt, those of `prefix` in front.

    Args:
        tokenizer: gives the tokenizer, or raises if there is none; called for texts only.
        prompt: a text or several. <bos> is put before each that follows no prefix.
        input_ids: rows of ids instead.
        attention_mask: of `input_ids`, 0 at what is left out.
        prefix: what the prompts follow. Without any prompt it is the only one.

    Raises:
        InputError: the arguments are not that.
    """
    check_prefix(prefix)
    first = [] if prefix is None else list(prefix.token_ids)
    if prompt is None and input_ids is None and prefix is not None and attention_mask is None:
        return [first]
    if (prompt is None) == (input_ids is None):
        given = "neither" if prompt is None else "both"
        raise InputError(f"Got {given} of a prompt and input_ids; give exactly one.")
    if prompt is None:
        return [first + row for row in rows_of_ids(input_ids, attention_mask)]
    if attention_mask is not None:
        raise InputError("attention_mask goes with input_ids; a text has no padding.")
    if not isinstance(prompt, Iterable):
        raise InputError(f"The prompt is {type(prompt).__name__}; expected a text or several.")
    encoder = tokenizer()
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"Prompt {row} is {type(text).__name__}; expected a text. Ids go into "
                "input_ids=[[...], ...]."
            )
    with_bos = prefix is None
    return [first + encoder.encode(text, add_special_tokens=with_bos) for text in texts]


def each_prompt_ids(
    tokenizer: Callable[[], Tokenizer], prompts: Iterable[Any], prefix: Prefix | None
) -> Iterator[list[int]]:
    """The ids of each of many prompts, texts or rows of ids, as they are read.

    Arguments and errors are those of `prompt_ids`.
    """
    first = [] if prefix is None else list(prefix.token_ids)
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            yield first + tokenizer().encode(prompt, add_special_tokens=prefix is None)
        else:
            yield first + row_of_ids("prompts", number, prompt).tolist()


def check_prefix(prefix: object) -> None:
    """Refuse what is neither a prefix nor None.

    Raises:
        InputError: it is something else.
    """
    if prefix is not None and not isinstance(prefix, Prefix):
        raise InputError(
            f"prefix is {type(prefix).__name__}; expected what the model's prefix method returns."
        )


def rows_of_ids(input_ids: Any, attention_mask: Any) -> list[list[int]]:
    """The real tokens of each row, as plain integers.

    Raises:
        InputError: they are not rows of integers, or the mask does not fit.
    """
    rows = [
        row_of_ids("input_ids", i, row) for i, row in enumerate(_iterated("input_ids", input_ids))
    ]
    if attention_mask is None:
        return [row.tolist() for row in rows]
    masks = [
        row_of_ids("attention_mask", i, row)
        for i, row in enumerate(_iterated("attention_mask", attention_mask))
    ]
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise InputError(
            f"attention_mask has rows of {[len(mask) for mask in masks]} tokens and input_ids of "
            f"{[len(row) for row in rows]}; expected the same."
        )
    for i, mask in enumerate(masks):
        if not np.isin(mask, (0, 1)).all():
            raise InputError(f"attention_mask[{i}] holds values other than 0 and 1.")
    return [row[mask.astype(np.bool_)].tolist() for row, mask in zip(rows, masks, strict=True)]


def row_of_ids(name: str, index: int, value: Any) -> np.ndarray:
    """(T,) integers; for the name attention_mask also truth values.

    Raises:
        InputError: `value` is not that; the message calls it name[index].
    """
    try:
        row = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}[{index}] cannot become an array ({error}).") from error
    whole = row.size == 0 or np.issubdtype(row.dtype, np.integer)
    if row.ndim != 1 or not (whole or (name == "attention_mask" and row.dtype == np.bool_)):
        raise InputError(
            f"{name}[{index}] is {row.dtype} of shape {row.shape}; expected a row of integers, as "
            f"in {name}=[[2, 5, 9], [2, 7]]."
        )
    return row


def _iterated(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise InputError(f"{name} is {type(value).__name__}; expected rows of integers.")
    return list(value)
