"""ModelInputs: a call's arguments, checked and completed once, before any backend sees them."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError
from gemma_hub.labels import IGNORED, checked_labels, counted_labels
from gemma_hub.parameters import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One batch, in NumPy, with nothing left to decide.

    Attributes:
        input_ids: (B, T) int32, or None when `inputs_embeds` is given.
        inputs_embeds: (B, T, D) unscaled embeddings, or None when `input_ids` is given.
        attention_mask: (B, T) bool, true at real tokens.
        position_ids: (B, T) int32; 0 at padding.
        output_hidden_states: whether the caller wants every layer's output.
        output_attentions: whether the caller wants every layer's attention probabilities.
        logits_to_keep: number of last positions to compute logits for; 0 for all.
        labels: what the loss compares with, or None for no loss. By task: causal_lm and
            token_classification (B, T) int32, -100 where a token does not count;
            sequence_classification (B,) int32 for one choice, (B, num_labels) float for several,
            and for a regression (B,) float where num_labels is 1, else (B, num_labels).
        num_items_in_batch: what a sum over tokens is divided by; None for the mean of the tokens
            that count.
        pooled_positions: (B,) int32, the token whose features stand for its row; None unless the
            task is sequence_classification.
    """

    input_ids: np.ndarray | None
    inputs_embeds: np.ndarray | None = None
    attention_mask: np.ndarray
    position_ids: np.ndarray
    output_hidden_states: bool = False
    output_attentions: bool = False
    logits_to_keep: int = 0
    labels: np.ndarray | None = None
    num_items_in_batch: int | None = None
    pooled_positions: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        batch, length = self.attention_mask.shape
        return batch, length

    @classmethod
    def prepare(
        cls,
        config: GemmaConfig,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        *,
        task: str = "causal_lm",
        labels: Any = None,
        num_items_in_batch: int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int = 0,
        next_position: np.ndarray | None = None,
    ) -> Self:
        """Checked inputs from nested lists, NumPy arrays or any framework's arrays.

        Args:
            config: the model's; gives the limits.
            input_ids: (B, T) integers from 0 to vocab_size - 1.
            attention_mask: (B, T), 1 at real tokens and 0 at padding; all real if None.
            position_ids: (B, T); if None each row counts its own real tokens, so that padding on
                either side leaves them unchanged.
            inputs_embeds: (B, T, D) unscaled embeddings instead of `input_ids`.
            task: what the model was built for, a key of `gemma_hub.config.ARCHITECTURES`.
            labels: in the forms of the attribute; a regression's may be integers, and with
                num_labels of 1 also (B, 1).
            num_items_in_batch: number of labels that count in a batch of which this is a part.
            output_hidden_states: keep every layer's output.
            output_attentions: keep every layer's attention probabilities.
            logits_to_keep: compute logits for this many last positions only; 0 for all. Only a
                causal LM has it, and only without labels.
            next_position: (B,) position of each row's next token, from a cache; zeros if None.

        Raises:
            InputError: naming the value, its place and what was expected.
            CapacityError: a position is past `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise InputError(f"Got {given} of input_ids and inputs_embeds; give exactly one.")
        if inputs_embeds is None:
            ids, embeds = _token_ids(input_ids, config.vocab_size), None
            shape = ids.shape
        else:
            ids, embeds = None, _embeddings(inputs_embeds, config.hidden_size)
            shape = embeds.shape[:2]
        mask = _mask(attention_mask, shape)
        positions = _positions(position_ids, mask, next_position)
        _check_positions(positions, mask, config.max_position_embeddings)
        _check_logits_to_keep(logits_to_keep, task, labels)
        if labels is not None:
            labels = checked_labels(config, task, _as_array("labels", labels), mask.shape)
        _check_number_of_items(num_items_in_batch, task, labels)
        pooled = None
        if task == "sequence_classification":
            pooled = pooled_positions(config, ids, None if attention_mask is None else mask, shape)
        return cls(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions.astype(np.int32),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            logits_to_keep=logits_to_keep,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            pooled_positions=pooled,
        )


def pooled_positions(
    config: GemmaConfig,
    input_ids: np.ndarray | None,
    attention_mask: np.ndarray | None,
    shape: tuple[int, ...],
) -> np.ndarray:
    """(B,) int32: the last real token of each row, whichever side its padding is on.

    Args:
        config: gives the padding id.
        input_ids: (B, T), or None for embeddings.
        attention_mask: (B, T) bool as the caller gave it. None: ids are real up to the rightmost
            that is not the padding id, and embeddings all are.
        shape: (B, T).

    Returns:
        0 for a row without a real token.

    Raises:
        InputError: several rows, and neither a mask nor a padding id that tells where they end.
    """
    batch, length = shape
    if attention_mask is not None:
        is_real = attention_mask
    elif input_ids is not None and config.pad_token_id is not None:
        is_real = input_ids != config.pad_token_id
    elif input_ids is None or batch == 1:
        return np.full(batch, length - 1, np.int32)
    else:
        raise InputError(
            f"The batch has {batch} rows, and neither an attention_mask nor pad_token_id in the "
            "config says where they end. Give an attention_mask."
        )
    last: np.ndarray = np.where(is_real, np.arange(length), 0).max(axis=1)
    return last.astype(np.int32)


def _check_logits_to_keep(count: Any, task: str, labels: Any) -> None:
    if type(count) is not int or count < 0:
        raise InputError(f"logits_to_keep is {count!r}; expected an integer from 0 up.")
    if count and task != "causal_lm":
        raise InputError(f"logits_to_keep is {count}; the task {task!r} has no such choice.")
    if count and labels is not None:
        raise InputError(f"logits_to_keep is {count} and labels were given; a loss needs them all.")


def _check_number_of_items(count: Any, task: str, labels: np.ndarray | None) -> None:
    is_over_tokens = task in ("causal_lm", "token_classification")
    if count is None:
        if labels is not None and is_over_tokens and counted_labels(task, labels) == 0:
            raise InputError(
                f"No label counts, so that the loss would be 0 / 0: all are {IGNORED}"
                + (", or a row's first, which nothing predicts." if task == "causal_lm" else ".")
            )
        return
    if type(count) is not int or count < 1:
        raise InputError(f"num_items_in_batch is {count!r}; expected an integer from 1 up.")
    if labels is None or not is_over_tokens:
        why = "no labels were given" if labels is None else "this loss is a mean over rows"
        raise InputError(f"num_items_in_batch is {count} and {why}. Leave it out.")


def _as_array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(
            f"{name} cannot become an array ({error}). Rows of unequal length need padding and an "
            "attention_mask."
        ) from error
    except (TypeError, RuntimeError) as error:  # an array on a device, or of a type of its own
        raise InputError(
            f"{name} cannot become a NumPy array ({error}). Move it to the host and to a type that "
            "NumPy knows first."
        ) from error


def _whole_numbers(name: str, value: Any) -> np.ndarray:
    array = _as_array(name, value)
    if array.dtype == np.bool_ or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} holds {array.dtype}; expected integers.")
    return array


def _token_ids(value: Any, vocab_size: int) -> np.ndarray:
    ids = _whole_numbers("input_ids", value)
    if ids.ndim != 2 or 0 in ids.shape:
        raise InputError(
            f"input_ids has shape {ids.shape}; expected (batch, tokens), both at least 1."
        )
    bad = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"input_ids[{row}, {column}] is {ids[row, column]}; expected 0 to {vocab_size - 1}, "
            "the ids of this model's vocabulary. Use the tokenizer of the same checkpoint."
        )
    return ids.astype(np.int32)


def _embeddings(value: Any, hidden_size: int) -> np.ndarray:
    embeds = _as_array("inputs_embeds", value)
    if embeds.ndim != 3 or 0 in embeds.shape or embeds.shape[2] != hidden_size:
        raise InputError(
            f"inputs_embeds has shape {embeds.shape}; expected (batch, tokens, {hidden_size})."
        )
    if embeds.dtype not in DTYPES.values():
        raise InputError(
            f"inputs_embeds holds {embeds.dtype}; expected floating-point numbers "
            f"({', '.join(DTYPES)})."
        )
    return embeds


def _mask(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    if value is None:
        return np.ones(shape, dtype=np.bool_)
    mask = _as_array("attention_mask", value)
    if mask.shape != shape:
        raise InputError(f"attention_mask has shape {mask.shape}; expected {shape}, as the input.")
    if mask.dtype.kind not in "biuf":
        raise InputError(f"attention_mask holds {mask.dtype}; expected 0 and 1.")
    bad = np.argwhere((mask != 0) & (mask != 1))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"attention_mask[{row}, {column}] is {mask[row, column]}; expected 1 at a real token "
            "and 0 at padding."
        )
    return mask.astype(np.bool_)


def _positions(value: Any, mask: np.ndarray, next_position: np.ndarray | None) -> np.ndarray:
    """(B, T) in an integer type that holds whatever was given; 0 at padding."""
    if value is None:
        first = np.zeros(len(mask), np.int64) if next_position is None else next_position
        counted = np.cumsum(mask, axis=1) - 1 + first[:, None]
        return np.where(mask, counted, 0)
    positions = _whole_numbers("position_ids", value)
    if positions.shape == (1, mask.shape[1]):
        positions = np.broadcast_to(positions, mask.shape)
    if positions.shape != mask.shape:
        raise InputError(f"position_ids has shape {positions.shape}; expected {mask.shape}.")
    return np.where(mask, positions, positions.dtype.type(0))


def _check_positions(positions: np.ndarray, mask: np.ndarray, limit: int) -> None:
    bad = np.argwhere(mask & ((positions < 0) | (positions >= limit)))
    if len(bad):
        row, column = bad[0]
        raise CapacityError(
            f"position_ids[{row}, {column}] is {positions[row, column]}; this model has positions "
            f"0 to {limit - 1} (max_position_embeddings={limit}). Shorten the input."
        )
