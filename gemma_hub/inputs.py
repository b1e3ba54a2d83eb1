"""ModelInputs: a call's arguments, checked and completed once, before any backend sees them."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError
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
        logits_to_keep: number of last positions to compute logits for; 0 for all.
    """

    input_ids: np.ndarray | None
    inputs_embeds: np.ndarray | None = None
    attention_mask: np.ndarray
    position_ids: np.ndarray
    output_hidden_states: bool = False
    logits_to_keep: int = 0

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
        output_hidden_states: bool = False,
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
            output_hidden_states: keep every layer's output.
            logits_to_keep: compute logits for this many last positions only; 0 for all.
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
        if type(logits_to_keep) is not int or logits_to_keep < 0:
            raise InputError(
                f"logits_to_keep is {logits_to_keep!r}; expected an integer from 0 up."
            )
        return cls(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions.astype(np.int32),
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
        )


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
