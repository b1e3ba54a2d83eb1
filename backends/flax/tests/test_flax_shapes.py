"""Calls of many lengths share a few programs, and give what the calls as they were made would."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma_hub_flax.backend
import gemma_hub_flax.fast_shapes
from gemma_hub import GemmaConfig
from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub_flax.backend import FlaxBackend
from gemma_hub_flax.fast_shapes import padded_length
from gemma_hub_flax.linear import linear

CONFIG = GemmaConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_labels=3,
)
NOISE = 2e-5  # of float32 and logits of some units
LENGTHS = range(3, 23)


@pytest.fixture(autouse=True)
def no_cache_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_HUB_COMPILE_CACHE", "off")


def model(task: str = "causal_lm", **changes: Any) -> Any:
    config = dataclasses.replace(CONFIG, **changes)
    rng = np.random.default_rng(3)
    weights = ArrayWeights(
        {
            name: (0.3 * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in parameter_shapes(config, task).items()
        }
    )
    return FlaxBackend().build(config, TaskSpec(task), weights, BuildOptions(dtype="float32"))


def inputs(length: int, rows: int = 2, *, cache: Cache | None = None, **more: Any) -> ModelInputs:
    ids = np.random.default_rng(length).integers(3, CONFIG.vocab_size, (rows, length))
    mask = np.ones((rows, length), np.bool_)
    mask[0, length - length // 3 :] = False
    next_position = None if cache is None else cache.next_position
    return ModelInputs.prepare(CONFIG, ids, mask, next_position=next_position, **more)


def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing is padded."""
    for module in (gemma_hub_flax.backend, gemma_hub_flax.fast_shapes):
        monkeypatch.setattr(module, "padded_length", lambda length, room=None: length)


def test_a_padded_length_is_enough_and_wastes_little() -> None:
    lengths = range(1, 5000)
    padded = [padded_length(length) for length in lengths]
    assert padded == sorted(padded)
    assert all(length <= each for length, each in zip(lengths, padded, strict=True))
    assert all(
        each < 1.25 * length for length, each in zip(lengths, padded, strict=True) if length > 64
    )
    assert [padded_length(each) for each in set(padded)] == list(set(padded))
    assert padded[0] == 1, "a step of decoding has no padding"
    assert len(set(padded)) <= 5 + 4 * 7


def test_no_padding_that_does_not_fit() -> None:
    assert padded_length(9, room=16) == 16
    assert padded_length(9, room=15) == 9


def decode_one(one: Any, length: int) -> None:
    """A prompt and one token after it."""
    cache = one.init_cache(2, length + 1)
    _, cache = one.extend(inputs(length, logits_to_keep=1), cache)
    one.extend(inputs(1, cache=cache, logits_to_keep=1), cache)


def test_prompts_of_twenty_lengths_need_a_program_for_each_padded_length(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model(vocab_size=71)  # a shape that no other test has compiled
    first = {(padded_length(T), padded_length(T + 1)): T for T in LENGTHS}
    assert (len(LENGTHS), len(first)) == (20, 5)
    for length in first.values():
        decode_one(one, length)
    assert len(compiled) >= len(first), "nothing is counted"
    compiled.clear()
    for length in LENGTHS:
        decode_one(one, length)
    assert not compiled
    exact(monkeypatch)
    decode_one(one, 9)
    assert compiled, "without padding, a length of its own needs a program of its own"


@pytest.mark.parametrize("kept", [0, 1, 2, 9])
def test_logits_are_those_of_the_call_without_padding(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model()
    padded = [one.forward(inputs(T, logits_to_keep=kept)).to_numpy().logits for T in (3, 9, 21)]
    exact(monkeypatch)
    for T, found in zip((3, 9, 21), padded, strict=True):
        expected = one.forward(inputs(T, logits_to_keep=kept)).to_numpy().logits
        assert expected.shape[1] == (min(kept, T) if kept else T)
        np.testing.assert_allclose(found, expected, atol=NOISE, rtol=0, strict=True)


def chunks(one: Any, lengths: tuple[int, ...], capacity: int) -> list[np.ndarray]:
    """All outputs of a sequence that is fed in parts."""
    cache, found = one.init_cache(2, capacity), []
    for length in lengths:
        given = inputs(length, cache=cache, output_hidden_states=True, output_attentions=True)
        out, cache = one.extend(given, cache)
        known = out.to_numpy()
        found += [known.logits, *known.hidden_states, *known.attentions]
    assert cache.length == sum(lengths)
    return [*found, cache.valid, cache.next_position]


@pytest.mark.parametrize(
    ("lengths", "capacity"), [((5, 1, 3), 10), ((9, 2, 11), 23), ((3, 14), 17)]
)
def test_parts_of_a_sequence_give_what_they_would_without_padding(
    lengths: tuple[int, ...], capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model()
    padded = chunks(one, lengths, capacity)
    exact(monkeypatch)
    for found, expected in zip(padded, chunks(one, lengths, capacity), strict=True):
        np.testing.assert_allclose(found, expected, atol=NOISE, rtol=0, strict=True)


def test_gathered_rows_come_from_the_right_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model()

    def logits() -> np.ndarray:
        caches = []
        for length, capacity in ((5, 9), (11, 12)):
            cache = one.init_cache(2, capacity)
            caches.append(one.extend(inputs(length), cache)[1])
        cache = one.gather_rows(caches, [(1, 1), (0, 0), (1, 0)], 13)
        out, _ = one.extend(inputs(2, rows=3, cache=cache), cache)
        found: np.ndarray = out.to_numpy().logits
        return found

    padded = logits()
    exact(monkeypatch)
    np.testing.assert_allclose(padded, logits(), atol=NOISE, rtol=0, strict=True)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("causal_lm", np.full((2, 11), 5)),
        ("token_classification", np.full((2, 11), 2)),
        ("sequence_classification", np.array([0, 2])),
    ],
)
def test_losses_and_gradients_are_those_without_padding(
    task: str, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model(task)
    given = inputs(11, task=task, labels=labels)
    loss, gradients = one.loss_and_gradients(given)
    logits = one.forward(given).to_numpy().logits
    exact(monkeypatch)
    expected_loss, expected = one.loss_and_gradients(given)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(
        logits, one.forward(given).to_numpy().logits, atol=NOISE, strict=True
    )
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = float(np.abs(expected[name]).max())
        np.testing.assert_allclose(gradient, expected[name], atol=NOISE * max(scale, 1e-3), rtol=0)


def test_a_loss_that_counts_the_first_token_after_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    # It is predicted from padding, whose query sees nothing and averages over all slots.
    one = model("causal_lm")
    mask = np.ones((2, 11), np.bool_)
    mask[1, :3] = False
    labels = np.where(mask, 5, -100)
    given = dataclasses.replace(inputs(11, labels=labels), attention_mask=mask)
    loss, gradients = one.loss_and_gradients(given)
    logits = one.forward(given).to_numpy().logits
    exact(monkeypatch)
    expected_loss, expected = one.loss_and_gradients(given)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(logits, one.forward(given).to_numpy().logits, atol=NOISE)
    name = "model.embed_tokens.weight"
    np.testing.assert_allclose(gradients[name], expected[name], atol=NOISE)


def test_hidden_states_of_a_model_without_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model("base")
    padded = one.forward(inputs(5, task="base")).to_numpy().last_hidden_state
    exact(monkeypatch)
    expected = one.forward(inputs(5, task="base")).to_numpy().last_hidden_state
    np.testing.assert_allclose(padded, expected, atol=NOISE, rtol=0, strict=True)


# -- what makes a call quick -----------------------------------------------------------------------


def test_changes_of_a_module_are_seen() -> None:
    one = model()
    given = inputs(5)
    before = one.forward(given).to_numpy().logits
    head = one.native.model.embed_tokens
    head.weight[...] = 2 * head.weight[...]  # as an optimizer does
    changed = one.forward(given).to_numpy().logits
    assert not np.allclose(before, changed)
    head.weight = nnx.Param(head.weight[...] / 2)  # another variable in its place
    np.testing.assert_allclose(one.forward(given).to_numpy().logits, before, atol=NOISE, rtol=0)
    one.native.model.layers[0].self_attn.scale *= 2  # a plain attribute
    assert not np.allclose(one.forward(given).to_numpy().logits, before, atol=NOISE, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64, 65])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_any_number_of_rows(rows: int, dtype: Any) -> None:
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, 40)), dtype)
    weight = jnp.asarray(rng.standard_normal((24, 40)), dtype)
    bias = jnp.asarray(rng.standard_normal(24), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T + np.asarray(bias)
    found = jax.jit(linear)(x, weight, bias)
    assert (found.shape, found.dtype) == ((rows, 24), dtype)
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=100 * ulp, rtol=ulp)


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_no_product_of_16_bits_converts_its_weight(rows: int) -> None:
    x, weight = jnp.ones((rows, 512), jnp.bfloat16), jnp.ones((4096, 512), jnp.bfloat16)
    program = jax.jit(linear).lower(x, weight).compile()
    assert program.memory_analysis().temp_size_in_bytes < weight.nbytes
