"""The Flax classes train with JAX's own tools: nnx, optax, jit, value_and_grad, checkpointing."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gemma_hub_flax
from gemma_hub import GemmaConfig
from gemma_hub_flax import FlaxGemmaForCausalLM, FlaxGemmaForTokenClassification
from gemma_hub_flax.attention import rope
from gemma_hub_flax.dropout import Dropout
from gemma_hub_flax.model import Attention

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
RATE = 0.3
SIGMAS = 6.0  # a correct count is further out once in 5e8
CLASSES = [getattr(gemma_hub_flax, name) for name in gemma_hub_flax.__all__ if "For" in name]
CLASSES.append(gemma_hub_flax.FlaxGemmaModel)


def new(kind: Any = FlaxGemmaForCausalLM, seed: int = 0, **changes: Any) -> Any:
    return kind(GemmaConfig(**{**CONFIG, **changes}), nnx.Rngs(seed))


def batch(rows: int = 2, tokens: int = 9) -> jax.Array:
    ids = np.random.default_rng(5).integers(3, CONFIG["vocab_size"], (rows, tokens))
    return jnp.asarray(ids, jnp.int32)


def loss_of(model: Any, ids: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return model(ids, labels=ids, use_cache=False, dropout_rng=key).loss


@nnx.jit
def train_step(model: Any, optimizer: nnx.Optimizer, ids: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_of)(model, ids)
    optimizer.update(model, gradients)
    return loss


loss_and_gradients = nnx.jit(nnx.value_and_grad(loss_of))


def train(model: Any, ids: jax.Array, steps: int = 8) -> list[float]:
    """The loss before each of some steps of AdamW."""
    optimizer = nnx.Optimizer(model, optax.adamw(0.01), wrt=nnx.Param)
    return [float(train_step(model, optimizer, ids)) for _ in range(steps)]


def parameters(model: Any) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.array(value.get_value()) for path, value in flat}


def equal(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(bool(jnp.array_equal(a, b)) for a, b in pairs)


# -- nnx.Optimizer --------------------------------------------------------------------------------


def test_adamw_trains_a_checkpoint_and_leaves_its_file_alone(tmp_path: Path) -> None:
    new(num_hidden_layers=1).save_pretrained(tmp_path / "gemma")
    file = tmp_path / "gemma" / "model.safetensors"
    before = file.read_bytes()
    model = FlaxGemmaForCausalLM.from_pretrained(tmp_path / "gemma")
    start = parameters(model)
    losses = train(model, batch())
    assert losses[-1] < 0.7 * losses[0]
    unchanged = [name for name, value in parameters(model).items() if (value == start[name]).all()]
    assert not unchanged
    assert file.read_bytes() == before


def test_a_step_in_bfloat16_is_finite_and_moves_every_parameter(tmp_path: Path) -> None:
    new(num_hidden_layers=1).save_pretrained(tmp_path / "gemma")
    model = FlaxGemmaForCausalLM.from_pretrained(tmp_path / "gemma", dtype="bfloat16")
    start = parameters(model)
    losses = train(model, batch())
    assert losses[-1] < losses[0]
    for name, value in parameters(model).items():
        assert value.dtype == jnp.bfloat16
        assert np.isfinite(value.astype(np.float32)).all(), name
        assert not (value == start[name]).all(), name


# -- split, merge and jit -------------------------------------------------------------------------


def test_split_and_merge_give_the_same_model_back() -> None:
    model = new()
    graphdef, state = nnx.split(model)
    again = nnx.merge(graphdef, state)
    assert type(again) is FlaxGemmaForCausalLM
    assert equal(nnx.state(again), state)
    assert again.config == model.config
    assert nnx.split(again)[0] == graphdef  # so a compiled function is not compiled anew
    assert hash(nnx.split(again)[0]) == hash(graphdef)


def test_jit_over_graphdef_and_state_compiles_once() -> None:
    traces = []

    def loss(graphdef: Any, state: Any, ids: jax.Array) -> jax.Array:
        traces.append(1)
        return loss_of(nnx.merge(graphdef, state), ids)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    model, ids = new(num_hidden_layers=1), batch()
    found = compiled(*nnx.split(model), ids)
    # nnx.jit and nnx.value_and_grad are the same function of the same arrays.
    assert equal(found, loss_and_gradients(model, ids))
    other, _ = compiled(*nnx.split(new(seed=1, num_hidden_layers=1)), ids)
    assert float(other) != float(found[0])
    assert len(traces) == 1


# -- the cache is a pytree ------------------------------------------------------------------------


def greedy(model: Any, prompt: jax.Array, capacity: int, count: int) -> Any:
    """(B, count) greedy tokens after `prompt`, the logits (count, B, V), the cache; under jit."""
    graphdef, state = nnx.split(model)
    cache = model.init_cache(len(prompt), capacity)

    @jax.jit
    def run(state: Any, cache: Any, prompt: jax.Array) -> Any:
        model = nnx.merge(graphdef, state)

        def step(carry: Any, _: Any) -> tuple[Any, Any]:
            cache, token = carry
            out = model(token, past_key_values=cache)
            token = jnp.argmax(out.logits[:, -1:], -1).astype(jnp.int32)
            return (out.past_key_values, token), (token[:, 0], out.logits[:, -1])

        cache = model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1).past_key_values
        (cache, _), (tokens, logits) = jax.lax.scan(step, (cache, prompt[:, -1:]), length=count)
        return tokens.T, logits, cache

    return run(state, cache, prompt)


def test_a_decode_loop_under_scan_writes_the_tokens_of_a_whole_call() -> None:
    model, prompt = new(num_hidden_layers=1), batch(2, 5)
    tokens, logits, cache = greedy(model, prompt, capacity=9, count=5)
    assert int(cache.length) == 9
    assert bool(jnp.isfinite(logits).all())
    ids = jnp.concatenate([prompt, tokens], 1)
    whole = nnx.jit(lambda model, ids: model(ids, use_cache=False).logits)(model, ids)
    assert jnp.argmax(whole[:, 4:-1], -1).tolist() == tokens.tolist()


def test_an_overrun_that_jit_hides_is_nan_and_not_a_wrong_number() -> None:
    # 4 tokens, and then 4 steps into 6 slots
    _, logits, _ = greedy(new(num_hidden_layers=1), batch(2, 5), capacity=6, count=4)
    assert bool(jnp.isfinite(logits[:2]).all())
    assert bool(jnp.isnan(logits[2:]).all())


# -- dropout --------------------------------------------------------------------------------------


def assert_dropped(dropped: np.ndarray, kept: np.ndarray, rate: float) -> None:
    """Every row of `dropped` (M, n) is 0, or `kept` (M, n) scaled up; M of them at random."""
    zero = (dropped == 0).all(-1)
    np.testing.assert_allclose(
        dropped[~zero], kept[~zero] / (1 - rate), rtol=2 * np.finfo(kept.dtype).eps
    )
    count, number = int(zero.sum()), len(zero)
    assert abs(count - rate * number) < SIGMAS * math.sqrt(number * rate * (1 - rate))


def test_attention_dropout_zeroes_single_probabilities_at_its_rate() -> None:
    # A token that sees only itself has probability 1 in each head, and the identity for o_proj
    # shows it: each head's output is v / (1 - rate), or 0.
    B, N, H = 4000, 4, 8
    config = GemmaConfig(**{**CONFIG, "hidden_size": N * H, "attention_dropout": RATE})
    layer = Attention(config, nnx.Rngs(1))
    layer.o_proj.weight[...] = jnp.eye(N * H)
    x = jax.random.normal(jax.random.key(1), (B, 1, N * H))
    turns = rope(jnp.zeros((B, 1), jnp.int32), config)
    mask = jnp.ones((B, 1, 1), jnp.bool)
    call = nnx.jit(lambda layer, key: layer(x, turns, mask, None, 0, key)[:2])
    kept, _ = call(layer, None)
    dropped, probs = call(layer, jax.random.key(2))
    dropped, kept = np.asarray(dropped), np.asarray(kept)
    assert_dropped(dropped.reshape(B * N, H), kept.reshape(B * N, H), RATE)
    assert bool((probs == 1).all())  # those that are returned are not dropped
    both = (dropped.reshape(B, N, H) == 0).all(-1)[:, :2].all(-1)  # heads that share keys
    assert abs(int(both.sum()) - RATE**2 * B) < SIGMAS * math.sqrt(B * RATE**2 * (1 - RATE**2))


@pytest.mark.parametrize("rate", [None, RATE], ids=["default", "given"])
def test_classifier_dropout_zeroes_single_features_at_its_rate(rate: float | None) -> None:
    D = CONFIG["hidden_size"]
    model = new(
        FlaxGemmaForTokenClassification,
        num_hidden_layers=1,
        num_labels=D,
        classifier_dropout=rate,
    )
    model.score.weight[...] = jnp.eye(D)  # the logits are the features themselves
    ids = batch(40, 30)
    call = nnx.jit(lambda model, key: model(ids, dropout_rng=key).logits)
    kept, dropped = np.asarray(call(model, None)), np.asarray(call(model, jax.random.key(3)))
    assert_dropped(dropped.reshape(-1, 1), kept.reshape(-1, 1), 0.1 if rate is None else rate)


def test_dropout_needs_a_key_and_is_a_function_of_it() -> None:
    model = new(num_hidden_layers=1, attention_dropout=RATE)
    ids = batch()
    call = nnx.jit(lambda model, key: model(ids, dropout_rng=key).logits)
    quiet, one, two = (call(model, key) for key in (None, jax.random.key(1), jax.random.key(2)))
    assert bool(jnp.array_equal(call(model, None), quiet))
    assert bool(jnp.array_equal(call(model, jax.random.key(1)), one))
    assert not bool(jnp.array_equal(one, two))
    assert not bool(jnp.array_equal(one, quiet))
    x = jnp.ones(5)
    assert Dropout(0.0, jax.random.key(0))(x) is x


def test_each_layer_drops_other_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    call = Attention.__call__
    monkeypatch.setattr(
        Attention, "__call__", lambda self, *a: keys.append(a[-1]) or call(self, *a)
    )

    @nnx.jit
    def run(model: Any) -> list[jax.Array]:
        model(batch(1, 2), dropout_rng=jax.random.key(1))
        return [jax.random.key_data(key) for key in keys]

    first, second = run(new(attention_dropout=RATE))
    assert first.tolist() != second.tolist()


# -- gradient checkpointing -----------------------------------------------------------------------


def kept_bytes(model: Any, ids: jax.Array) -> int:
    """Memory that a forward pass keeps for the backward pass, without the parameters."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state: loss_of(nnx.merge(graphdef, state), ids, jax.random.key(0)))
    _, backward = jax.vjp(run, state)
    kept = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(backward)}
    for parameter in jax.tree.leaves(state):
        kept.pop(parameter.unsafe_buffer_pointer(), None)
    return sum(kept.values())


def test_checkpointing_keeps_about_one_array_a_layer() -> None:
    ids = batch(4, 32)
    few, many = new(num_hidden_layers=1), new(num_hidden_layers=2)
    plain = kept_bytes(many, ids) - kept_bytes(few, ids)
    few.gradient_checkpointing_enable()
    many.gradient_checkpointing_enable()
    recomputed = kept_bytes(many, ids) - kept_bytes(few, ids)
    layer_input = ids.size * CONFIG["hidden_size"] * 4
    assert layer_input <= recomputed < 2 * layer_input
    assert plain > 10 * layer_input


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_the_switch(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new(kind, num_hidden_layers=1)
    runs = []
    whole = gemma_hub_flax.model.remat
    monkeypatch.setattr(
        gemma_hub_flax.model, "remat", lambda layer: runs.append(layer) or whole(layer)
    )

    def count() -> int:
        runs.clear()
        nnx.eval_shape(lambda model: model(batch(1, 2)), model)
        return len(runs)

    assert count() == 0
    model.gradient_checkpointing_enable()
    assert count() == 1
    model.gradient_checkpointing_disable()
    assert count() == 0
