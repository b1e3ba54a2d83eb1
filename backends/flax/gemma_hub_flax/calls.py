"""What the arguments of a call mean: defaults, checks, positions. Twin: gemma_hub_torch/calls.py.

Axes: B batch, T tokens of this call, S slots, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError
from gemma_hub.problem import ProblemType, problem_type
from gemma_hub_flax.cache import KeyValueCache, LayerCache, filled, store


class Call(NamedTuple):
    """A call with nothing left to decide.

    Attributes:
        inputs: (B, T) ids or (B, T, D) embeddings.
        mask: (B, T) bool, true at real tokens of this call.
        position_ids: (B, T) integers; 0 at padding.
        valid: (B, S) bool, the slots of the cache that hold real tokens once this call's are in.
        visible: `valid` as far as a query may have to look.
        layers: one `LayerCache` per layer, or None for each without a cache.
        start: slot of the first token.
        past: the cache that the call goes on from, with room for it.
    """

    inputs: Array
    mask: Array
    position_ids: Array
    valid: Array
    visible: Array
    layers: tuple[LayerCache | None, ...]
    start: Array | int
    past: KeyValueCache | None


def prepare_call(
    config: GemmaConfig,
    input_ids: Array | None,
    attention_mask: Array | None,
    position_ids: Array | None,
    past: KeyValueCache | None,
    inputs_embeds: Array | None,
) -> Call:
    """The meaning of a call's arguments.

    `attention_mask` is (B, T), or (B, length of the cache + T) as in Transformers. Without
    `position_ids` each row counts its own real tokens, so that padding leaves them unchanged.

    Raises:
        InputError: both or neither of the inputs, or a wrong shape, type or id.
        CapacityError: past the cache or the model's positions.
    """
    inputs = check_inputs(config, input_ids, inputs_embeds)
    T = inputs.shape[1]
    past = None if past is None else past.with_room(T)
    start = 0 if past is None else past.length
    mask, valid = real_tokens(attention_mask, inputs, past)
    if position_ids is None:
        first = 0 if past is None else past.next_position[:, None]
        position_ids = jnp.cumsum(mask, 1) - 1 + first
    position_ids = check_positions(config, position_ids, mask)
    layers = (None,) * config.num_hidden_layers if past is None else past.layers
    visible = filled(valid, start + T)
    return Call(inputs, mask, position_ids, valid, visible, layers, start, past)


def finished_cache(call: Call, layers: list[LayerCache]) -> KeyValueCache:
    """The cache to return: `call.past` with this call's tokens in it, or a new one."""
    T = call.mask.shape[1]
    latest = jnp.max(jnp.where(call.mask, call.position_ids, -1), 1)
    before = 0 if call.past is None else call.past.next_position
    following = jnp.where(latest >= 0, latest + 1, before)
    can_grow = call.past is None or call.past.can_grow
    return KeyValueCache(tuple(layers), call.valid, following, call.start + T, can_grow)


def real_tokens(
    mask: Array | None, inputs: Array, past: KeyValueCache | None
) -> tuple[Array, Array]:
    """Which of this call's tokens are real, (B, T), and which slots with them in, (B, S)."""
    B, T = inputs.shape[:2]
    if mask is None:
        mask = jnp.ones((B, T), dtype=jnp.bool)
    check_mask(mask, B, T, past)
    mask = mask != 0
    if past is None:
        return mask, mask
    # The mask may begin at the first slot of the cache, or at this call's.
    return mask[:, -T:], store(past.valid, mask, past.length + T - mask.shape[1])


def check_mask(mask: Array, B: int, T: int, past: KeyValueCache | None) -> None:
    """Refuse a mask that is neither of this call's tokens nor of all tokens so far."""
    if past is not None and past.valid.shape[0] != B:
        raise InputError(f"The inputs have {B} rows and the cache {past.valid.shape[0]}.")
    fits = mask.ndim == 2 and mask.shape[0] == B
    if fits and mask.shape[1] != T:
        fits = past is not None and past.counts(mask.shape[1] - T)
    if not fits:
        before = "" if past is None else ", or with the tokens in the cache before these"
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {(B, T)}{before}."
        )


def check_inputs(
    config: GemmaConfig, input_ids: Array | None, inputs_embeds: Array | None
) -> Array:
    """The one input that is there, once it has its shape, type and range."""
    if input_ids is not None and inputs_embeds is None:
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or 0 in shape or not is_integer(input_ids):
            raise InputError(
                f"input_ids is {input_ids.dtype} of shape {shape}; expected integers of shape "
                "(batch, tokens), both at least 1."
            )
        check_range("input_ids", input_ids, 0, config.vocab_size)
        return input_ids
    if inputs_embeds is not None and input_ids is None:
        shape = tuple(inputs_embeds.shape)
        if len(shape) != 3 or 0 in shape or shape[2] != config.hidden_size:
            raise InputError(
                f"inputs_embeds has shape {shape}; expected (batch, tokens, {config.hidden_size}), "
                "all at least 1."
            )
        return inputs_embeds
    given = "neither" if input_ids is None else "both"
    raise InputError(f"Got {given} of input_ids and inputs_embeds; give exactly one.")


def check_positions(config: GemmaConfig, position_ids: Array, mask: Array) -> Array:
    """(B, T) positions with 0 at padding, once those of real tokens are the model's."""
    B, T = mask.shape
    if tuple(position_ids.shape) not in {(B, T), (1, T)} or not is_integer(position_ids):
        raise InputError(
            f"position_ids is {position_ids.dtype} of shape {tuple(position_ids.shape)}; expected "
            f"integers of shape {(B, T)}, or {(1, T)} for all rows."
        )
    limit = config.max_position_embeddings
    real = jnp.where(mask, position_ids, 0)
    if can_look(real) and not bool(((real >= 0) & (real < limit)).all()):
        raise CapacityError(
            f"position_ids go from {int(real.min())} to {int(real.max())}; this model has 0 to "
            f"{limit - 1} (max_position_embeddings={limit}). Shorten the input."
        )
    return real


def token_labels(labels: Array, shape: tuple[int, ...], num_classes: int) -> Array:
    """Integer labels as indices, once they have this shape and are in range or -100."""
    if tuple(labels.shape) != shape or not is_integer(labels):
        raise InputError(
            f"labels is {labels.dtype} of shape {tuple(labels.shape)}; expected integers of shape "
            f"{shape}."
        )
    labels = labels.astype(jnp.int32)
    check_range("labels", jnp.where(labels == -100, 0, labels), 0, num_classes)
    return labels


def sequence_labels(config: GemmaConfig, labels: Array, num_rows: int) -> tuple[ProblemType, Array]:
    """The problem type, and labels in its shape: (B,) choices, or (B, num_labels) numbers.

    Raises:
        InputError: a wrong type, shape or choice.
    """
    kind = problem_type(config, tuple(labels.shape), is_integer(labels))
    if labels.shape[0] != num_rows:
        raise InputError(f"labels has {labels.shape[0]} rows; expected {num_rows}, as the input.")
    if kind == "single_label_classification":
        return kind, token_labels(labels.reshape(num_rows), (num_rows,), config.num_labels)
    return kind, labels.reshape(num_rows, config.num_labels)


def check_range(name: str, values: Array, low: int, high: int) -> None:
    """Refuse integers outside low to high - 1, where looking at them costs nothing."""
    if not can_look(values):
        return
    known = np.asarray(values)  # in JAX it would become part of the function that is being traced
    if not ((known >= low) & (known < high)).all():
        raise InputError(
            f"{name} go from {known.min()} to {known.max()}; expected {low} to {high - 1}."
        )


def is_integer(array: Array) -> bool:
    """Whether the type is an integer type, bool not included."""
    return jnp.issubdtype(array.dtype, jnp.integer)


def can_look(array: Array) -> bool:
    """Whether values can be read here: not in a graph, and not by waiting for a device."""
    return not isinstance(array, jax.core.Tracer) and on_cpu(array) and array.size > 0


def on_cpu(array: Array | np.ndarray) -> bool:
    """Whether the array is in the memory of the host; one of NumPy is."""
    return isinstance(array, np.ndarray) or all(
        device.platform == "cpu" for device in array.devices()
    )


def last_real_tokens(
    config: GemmaConfig,
    input_ids: Array | None,
    attention_mask: Array | None,
    num_rows: int,
    num_tokens: int,
) -> Array:
    """Index of each row's last real token, (B,): what a sequence is classified by.

    From the attention mask where there is one; else the rightmost id that is not padding, as in
    Transformers; else the last.

    Raises:
        InputError: several rows, no mask, and no pad id to tell padding by.
    """
    if attention_mask is not None:
        real = attention_mask[:, -num_tokens:] != 0
    elif input_ids is not None and config.pad_token_id is not None:
        real = input_ids != config.pad_token_id
    elif input_ids is None or num_rows == 1:
        return jnp.full((num_rows,), num_tokens - 1)
    else:
        raise InputError(
            f"{num_rows} rows, no attention_mask and no pad_token_id in the config: the last real "
            "token of each row is unknown. Give an attention_mask."
        )
    places = jnp.arange(num_tokens)
    return jnp.argmax(jnp.where(real, places, -1), 1)
