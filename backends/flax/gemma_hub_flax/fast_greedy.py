"""Greedy decoding on the device: one compiled loop, several tokens a row from one call. Flax only.

A step of a small model takes XLA less time than the call from Python, the logits' way to the host
and the choice there. In torch a step is a sequence of calls from Python either way.
Axes: B batch, S key slots, V vocabulary, K stop ids.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma_hub.backend import Cache
from gemma_hub_flax.cache import KeyValueCache, LayerCache
from gemma_hub_flax.compile_programs import Programs
from gemma_hub_flax.fast_shapes import num_slots, widened_valid
from gemma_hub_flax.fast_state import Structure

MOST_STEPS = 32
"""Steps of a call at most, so that one program serves any number of them."""

_FEWEST_STOPS = 8  # places for stop ids, so that one program serves all usual ones


class Steps(NamedTuple):
    """What the loop carries.

    Attributes:
        cache: with the tokens that were fed.
        token_ids: (B,) int32 to feed next.
        chosen: (B, MOST_STEPS) int32, with what the steps chose in the first `done` columns.
        done: int32, steps that were taken.
        is_last: whether the loop ends.
    """

    cache: KeyValueCache
    token_ids: Array
    chosen: Array
    done: Array
    is_last: Array


def taken(
    structure: Structure,
    leaves: list[Array],
    cache: Cache,
    token_ids: np.ndarray,
    running: np.ndarray,
    num_steps: int,
    stops: Sequence[int],
) -> tuple[np.ndarray, Cache]:
    """`SupportsGreedySteps.greedy_steps` of a module; consumes the cache's arrays."""
    cache.stepped(running, num_steps, None)  # raises if there is no room
    book = {
        "valid": widened_valid(cache.valid, num_slots(cache)),
        "next_position": cache.next_position.astype(np.int32),
        "length": np.int32(cache.length),
    }
    request = {
        "token_ids": token_ids.astype(np.int32),
        "running": running,
        "num_steps": np.int32(min(num_steps, MOST_STEPS)),
        "stops": padded_stops(stops),
    }
    layers, chosen, done = _STEPS(structure, leaves, cache.arrays.layers, book, request)
    num_taken = int(done)
    found = np.asarray(chosen)[:, :num_taken].astype(np.int64)
    arrays = dataclasses.replace(cache.arrays, layers=layers)
    return np.where(running[:, None], found, -1), cache.stepped(running, num_taken, arrays)


def padded_stops(stops: Sequence[int]) -> np.ndarray:
    """(K,) int32 stop ids, and -1, which is none, up to a power of two."""
    size = max(_FEWEST_STOPS, 1 << (len(stops) - 1).bit_length()) if stops else _FEWEST_STOPS
    padded = np.full(size, -1, np.int32)
    padded[: len(stops)] = stops
    return padded


def steps(
    structure: Structure,
    leaves: list[Array],
    layers: tuple[LayerCache, ...],
    book: dict[str, Any],
    request: dict[str, Any],
) -> tuple[tuple[LayerCache, ...], Array, Array]:
    """The loop: layers of the cache, (B, MOST_STEPS) chosen ids, number of steps taken."""
    running = request["running"]

    def goes_on(state: Steps) -> Array:
        return ~state.is_last & (state.done < request["num_steps"])

    def step(state: Steps) -> Steps:
        # Bound to the step: XLA would convert 16-bit weights to float32 before the loop, and keep
        # both.
        own, _ = jax.lax.optimization_barrier((leaves, state.done))
        positions = jnp.where(running, state.cache.next_position, 0)
        out = structure.module(own)(
            input_ids=state.token_ids[:, None],
            attention_mask=running[:, None],
            position_ids=positions[:, None],
            past_key_values=state.cache,
        )
        ids, is_finite = largest(out.logits[:, -1])
        chosen = jax.lax.dynamic_update_slice(state.chosen, ids[:, None], (0, state.done))
        # What a row that does not run seems to choose is masked as the padding before it was.
        is_refused = jnp.any(running & ~is_finite)
        has_stopped = jnp.any(running & jnp.isin(ids, request["stops"]))
        done = jnp.where(is_refused, state.done, state.done + 1)
        return Steps(out.past_key_values, ids, chosen, done, is_refused | has_stopped)

    start = Steps(
        KeyValueCache(layers, **book),
        request["token_ids"],
        jnp.zeros((len(running), MOST_STEPS), jnp.int32),
        jnp.int32(0),
        jnp.bool(False),
    )
    end = jax.lax.while_loop(goes_on, step, start)
    return end.cache.layers, end.chosen, end.done


def largest(logits: Array) -> tuple[Array, Array]:
    """(B,) ids of the largest of (B, V) logits, the lowest of equal ones; whether it is finite."""
    most = jnp.max(logits, axis=1)
    # XLA's own argmax carries pairs through its reduction, which a CPU does one by one.
    places = jnp.arange(logits.shape[1], dtype=jnp.int32)
    ids = jnp.min(jnp.where(logits == most[:, None], places, logits.shape[1] - 1), axis=1)
    return ids, jnp.isfinite(most)


_STEPS = Programs(steps, donated=(2,))
