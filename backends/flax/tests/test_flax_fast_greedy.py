"""The compiled loop takes the steps that the core would, and needs no memory and few programs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_hub import GemmaConfig
from gemma_hub.backend import BuildOptions, Cache, SupportsGreedySteps, TaskSpec
from gemma_hub.errors import CapacityError, GemmaHubError
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.many import generate_many_ids
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub_flax import fast_greedy
from gemma_hub_flax.backend import FlaxBackend
from gemma_hub_flax.fast_greedy import MOST_STEPS, largest, padded_stops

CONFIG = GemmaConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=False,  # a tied head of random weights says one token again and again
    eos_token_id=None,
)
NOISE = 2e-5  # of float32 and logits of some units


@pytest.fixture(autouse=True)
def no_cache_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_HUB_COMPILE_CACHE", "off")


def arrays(config: GemmaConfig, seed: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).normal
    return {
        name: draw(size=shape, scale=0.3 if "norm" in name else shape[-1] ** -0.5)
        for name, shape in parameter_shapes(config).items()
    }


def built(config: GemmaConfig = CONFIG, dtype: str = "float32", **changed: np.ndarray) -> Any:
    """A model with large random weights, so that it says something."""
    kind = jnp.dtype(dtype)
    weights = {name: array.astype(kind) for name, array in {**arrays(config), **changed}.items()}
    options = BuildOptions(dtype=dtype)
    return FlaxBackend().build(config, TaskSpec(), ArrayWeights(weights), options)


class Plain:
    """A model without the feature."""

    def __init__(self, model: Any) -> None:
        self.native, self.device = model.native, model.device
        self.forward, self.to_numpy = model.forward, model.to_numpy
        self.init_cache, self.extend = model.init_cache, model.extend
        self.gather_rows = model.gather_rows


@pytest.fixture(scope="module")
def model() -> Any:
    return built()


def prompts(rng: np.random.Generator, rows: int, length: int = 9) -> list[list[int]]:
    return [rng.integers(3, 67, rng.integers(1, length)).tolist() for _ in range(rows)]


def started(model: Any, rows: list[list[int]], capacity: int) -> tuple[np.ndarray, Cache]:
    """The best tokens after left-padded `rows`, and the cache with the rows."""
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.arange(length) >= length - np.array([[len(row)] for row in rows])
    logits, cache = extended(model, ids, mask, model.init_cache(len(rows), capacity))
    return logits.argmax(axis=1), cache


def extended(
    model: Any, ids: np.ndarray, mask: np.ndarray, cache: Cache
) -> tuple[np.ndarray, Cache]:
    """(B, V) logits of the last tokens, and the cache with all of them."""
    position = cache.next_position
    inputs = ModelInputs.prepare(CONFIG, ids, mask, logits_to_keep=1, next_position=position)
    outputs, cache = model.extend(inputs, cache)
    found: np.ndarray = outputs.to_numpy().logits[:, -1]
    return found, cache


# -- the tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_are_those_of_the_core(model: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings = GenerationSettings(
        max_new_tokens=int(rng.integers(2, 50)), eos_token_id=rng.integers(3, 67, 2).tolist()
    )
    asked = prompts(rng, 1 + seed)
    plain = Plain(model)
    assert not isinstance(plain, SupportsGreedySteps)
    found = generate_ids(model, CONFIG, asked, settings)
    assert found == generate_ids(plain, CONFIG, asked, settings)
    many = generate_many_ids(model, CONFIG, asked, settings, batch_size=2)
    assert [each.result for each in many] == found


@pytest.mark.parametrize("seed", range(4))
def test_the_cache_is_that_of_plain_calls(model: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, count = prompts(rng, 4), int(rng.integers(1, 9))
    running = np.array([True, seed % 2 == 0, True, False])
    ids, cache = started(model, rows, 20)
    _, expected = started(model, rows, 20)
    found, cache = model.greedy_steps(ids, running, cache, count, ())
    assert (found.shape, found.dtype) == ((4, count), np.int64)
    fed = ids
    for column in found.T:
        logits, expected = extended(model, fed[:, None], running[:, None], expected)
        np.testing.assert_array_equal(column, np.where(running, logits.argmax(axis=1), -1))
        fed = np.where(running, column, ids)
    assert (cache.length, cache.capacity) == (expected.length, 20)
    np.testing.assert_array_equal(cache.valid, expected.valid, strict=True)
    np.testing.assert_array_equal(cache.next_position, expected.next_position, strict=True)
    pair = [extended(model, fed[:, None], np.ones((4, 1), np.bool_), each)[0]
            for each in (cache, expected)]  # fmt: skip
    np.testing.assert_allclose(*pair, atol=NOISE, rtol=0)


def test_a_call_ends_with_a_stop_id(model: Any) -> None:
    rows = prompts(np.random.default_rng(1), 3)
    everyone = np.ones(3, np.bool_)
    ids, cache = started(model, rows, 40)
    free, _ = model.greedy_steps(ids, everyone, cache, 20, ())
    step = next(n for n in range(2, 20) if not np.isin(free[:, n], free[:, :n]).all())
    stop = int(np.setdiff1d(free[:, step], free[:, :step])[0])
    others = np.setdiff1d(np.arange(67), free)[:20].tolist()
    for stops in ([stop], [*others, stop], [stop, *others]):
        ids, cache = started(model, rows, 40)
        found, cache = model.greedy_steps(ids, everyone, cache, 20, stops)
        np.testing.assert_array_equal(found, free[:, : step + 1])
    # Of a row that does not run it stops nothing.
    goes_on = ~np.isin(np.arange(3), np.flatnonzero(free[:, step] == stop))
    ids, cache = started(model, rows, 40)
    found, _ = model.greedy_steps(ids, goes_on, cache, step + 1, [stop])
    assert found.shape == (3, step + 1)


def test_no_more_steps_than_fit(model: Any) -> None:
    ids, cache = started(model, [[5, 6], [7]], 200)
    found, cache = model.greedy_steps(ids, np.ones(2, np.bool_), cache, 100, ())
    assert (found.shape, cache.length) == ((2, MOST_STEPS), 2 + MOST_STEPS)
    ids, cache = started(model, [[5, 6], [7]], 6)
    with pytest.raises(CapacityError, match="holds 2 of 6 tokens and 5 more do not fit"):
        model.greedy_steps(ids, np.ones(2, np.bool_), cache, 5, ())
    found, cache = model.greedy_steps(ids, np.ones(2, np.bool_), cache, 4, ())
    assert (found.shape, cache.length) == ((2, 4), 6)


def test_the_lowest_of_equal_logits_is_chosen() -> None:
    logits = np.float32([[1, 3, 3, 2], [0, 0, 0, 0], [-np.inf, -1, -5, -1]])
    ids, is_finite = jax.jit(largest)(logits)
    np.testing.assert_array_equal(ids, logits.argmax(axis=1))
    assert is_finite.all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_without_a_largest_are_told(value: float) -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1] = value
    np.testing.assert_array_equal(jax.jit(largest)(logits)[1], [True, False])
    logits[1, 1:] = 0
    np.testing.assert_array_equal(jax.jit(largest)(logits)[1], [True, value == -np.inf])


def test_broken_logits_are_the_error_of_the_core(model: Any) -> None:
    asked = [[5, 9, 11], [4, 8, 30, 31]]
    settings = GenerationSettings(max_new_tokens=20)
    free = generate_ids(model, CONFIG, asked, settings)
    known = {0, 5, 9, 11, 4, 8, 30, 31}
    bad = next(token for token in free[1].token_ids[4:] if token not in known)
    embedding = arrays(CONFIG)["model.embed_tokens.weight"].copy()
    embedding[bad] = np.nan
    broken = built(**{"model.embed_tokens.weight": embedding})
    said = []
    for each in (broken, Plain(broken)):
        with pytest.raises(GemmaHubError, match=r"row \d at step \d+ hold NaN") as caught:
            generate_ids(each, CONFIG, asked, settings)
        said.append(str(caught.value))
    assert said[0] == said[1]


# -- the programs ----------------------------------------------------------------------------------


def test_other_numbers_of_steps_and_stops_compile_nothing(compiled: list[str]) -> None:
    model = built(dataclasses.replace(CONFIG, vocab_size=71))  # of no other test
    everyone = np.ones(2, np.bool_)
    ids, cache = started(model, [[5, 6], [7]], 50)
    compiled.clear()
    _, cache = model.greedy_steps(ids, everyone, cache, 3, (1,))
    assert len(compiled) == 1
    compiled.clear()
    for num_steps, stops in ((1, ()), (8, (70,)), (5, tuple(range(60, 68)))):
        _, cache = model.greedy_steps(ids, everyone, cache, num_steps, stops)
    model.greedy_steps(ids, ~everyone | [True, False], cache, 2, ())
    assert not compiled
    padded = [len(padded_stops(range(count))) for count in (0, 1, 8, 9, 16, 17)]
    assert padded == [8, 8, 8, 16, 16, 32]


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("is_tied", [True, False])
def test_no_weight_is_converted_before_the_loop(rows: int, is_tied: bool) -> None:
    config = dataclasses.replace(
        CONFIG, vocab_size=8192, hidden_size=256, tie_word_embeddings=is_tied, num_hidden_layers=1
    )
    model = built(config, "bfloat16")
    weight = model.native.model.embed_tokens.weight[...]
    before = set(fast_greedy._STEPS._programs)
    ids = np.full(rows, 7)
    model.greedy_steps(ids, np.ones(rows, np.bool_), model.init_cache(rows, 16), 2, ())
    (key,) = set(fast_greedy._STEPS._programs) - before
    program: Any = fast_greedy._STEPS._programs[key]
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < weight.nbytes / 4
    cache_bytes = sum(each.nbytes for layer in model.init_cache(rows, 16).arrays.layers
                      for each in layer)  # fmt: skip
    assert memory.alias_size_in_bytes >= cache_bytes, "the cache is copied"
