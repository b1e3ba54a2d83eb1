"""The native product: exact but for one rounding, the same for any rows, and differentiable."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from gemma_hub import Gemma, GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.native.library import has_compiler, load_library
from gemma_hub_flax import FlaxGemmaForCausalLM, fast_attention, fast_native
from gemma_hub_flax import linear as linear_module
from gemma_hub_flax.attention import attend
from gemma_hub_flax.dropout import Dropout
from gemma_hub_flax.fast_native import (
    MOST_ROWS,
    load_native,
    native_attend,
    native_linear,
    use_native,
)
from gemma_hub_flax.linear import Embedding, Linear, linear

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")

CONFIG = GemmaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip
SIZES = [(1, 1), (5, 31), (7, 33), (61, 64), (9, 200)]  # (out, in)
ROWS = [1, 2, 3, 7, 8, 9, 16, 17, 25]
DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_native()


def draw(*shape: int, dtype: Any = jnp.float32) -> Array:
    numbers = np.random.default_rng(sum(shape)).normal(size=shape)
    return jnp.asarray(numbers, dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights for which it is taken, where a program is traced."""
    shapes: list[tuple[int, ...]] = []

    def counted(x: Array, weight: Array) -> Array:
        shapes.append(weight.shape)
        return native_linear(x, weight)

    monkeypatch.setattr(linear_module, "native_linear", counted)
    return shapes


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_summed_in_float32_and_rounded_once(size: tuple[int, int], dtype: Any) -> None:
    weight = draw(*size, dtype=dtype)
    exact_weight = np.asarray(weight, np.float64)
    for rows in ROWS:
        x = draw(rows, size[1], dtype=dtype)
        y, exact_x = native_linear(x, weight), np.asarray(x, np.float64)
        exact = exact_x @ exact_weight.T
        sums = np.abs(exact_x) @ np.abs(exact_weight).T * size[1] * np.finfo(np.float32).eps
        rounding = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2
        assert y.dtype == dtype
        assert (np.abs(np.asarray(y, np.float64) - exact) <= 1.01 * rounding + sums).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_a_row_is_the_same_bit_by_bit_beside_any_others(dtype: Any) -> None:
    for size in SIZES:
        weight, x = draw(*size, dtype=dtype), draw(max(ROWS), size[1], dtype=dtype)
        alone = jnp.concatenate([native_linear(row[None], weight) for row in x])
        for rows in ROWS:
            assert np.array_equal(native_linear(x[-rows:], weight), alone[-rows:])


def test_products_of_one_program_share_its_threads() -> None:
    # XLA runs what does not depend on one another at the same time.
    weights = [draw(200, 300) + n for n in range(24)]
    x = draw(3, 300)

    @jax.jit
    def sums(weights: list[Array]) -> list[Array]:
        return [native_linear(x, weight) for weight in weights]

    for _ in range(50):
        found = sums(weights)
    for y, weight in zip(found, weights, strict=True):
        np.testing.assert_allclose(y, x @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_its_derivatives_are_those_of_the_plain_product(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight, dx, dweight, dy = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 3, 40), (7, 40), (2, 3, 40), (7, 40), (2, 3, 7))
    )

    def plain(x: Array, weight: Array) -> Array:
        return linear(x, weight)

    def native(x: Array, weight: Array) -> Array:
        return linear(x, weight, native=True)

    for one, other in zip(
        jax.jvp(native, (x, weight), (dx, dweight)),
        jax.jvp(plain, (x, weight), (dx, dweight)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        jax.vjp(native, x, weight)[1](dy), jax.vjp(plain, x, weight)[1](dy), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    rows = jax.vmap(native, in_axes=(0, None))(x, weight)
    np.testing.assert_allclose(rows, native(x, weight), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_no_rows_are_no_error(dtype: Any) -> None:
    y = native_linear(jnp.empty((0, 7), dtype), jnp.ones((3, 7), dtype))
    assert y.shape == (0, 3)


# -- attention ------------------------------------------------------------------------------------


def draw_attention(shape: tuple[int, ...], dtype: Any) -> tuple[Array, ...]:
    rows, slots, heads, kv_heads, size = shape
    q, k = draw(rows, heads, size, dtype=dtype), draw(rows, slots, kv_heads, size, dtype=dtype)
    v = draw(rows, slots, size, kv_heads, dtype=dtype).swapaxes(2, 3)
    visible = np.random.default_rng(slots).random((rows, slots)) < 0.8
    visible[0, : 2 * slots // 3], visible[0, -1] = False, True
    return q, k, v, jnp.asarray(visible)


def plain_attend(q: Array, k: Array, v: Array, visible: Array, scale: float) -> Array:
    dropout = Dropout(0.0, None)
    return attend(q[:, None], k, v, visible[:, None], scale, dropout)[0][:, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2), (2, 5, 4, 2, 8), (2, 129, 9, 1, 40), (3, 300, 24, 2, 6)], ids=str
)
def test_attention_is_that_of_the_model(shape: tuple[int, ...], dtype: Any) -> None:
    inputs = draw_attention(shape, dtype)
    found, expected = native_attend(*inputs, 0.4), plain_attend(*inputs, 0.4)
    assert found.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32),
        rtol=4 * eps, atol=max(2 * eps, 3e-6),
    )  # fmt: skip


def test_the_derivatives_of_attention_are_those_of_the_model() -> None:
    q, k, v, visible = draw_attention((2, 9, 4, 2, 8), jnp.float32)
    tangents = tuple(draw(*x.shape[::-1]).T.reshape(x.shape) for x in (q, k, v))

    def native(q: Array, k: Array, v: Array) -> Array:
        return native_attend(q, k, v, visible, 0.4)

    def plain(q: Array, k: Array, v: Array) -> Array:
        return plain_attend(q, k, v, visible, 0.4)

    for one, other in zip(
        jax.jvp(native, (q, k, v), tangents), jax.jvp(plain, (q, k, v), tangents), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    dy = draw(*q.shape)
    for one, other in zip(jax.vjp(native, q, k, v)[1](dy), jax.vjp(plain, q, k, v)[1](dy),
                          strict=True):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_one_query_a_row_takes_it_unless_weights_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    def counted(q: Array, *others: Any) -> Array:
        taken.append(q.shape)
        return native_attend(q, *others)

    monkeypatch.setattr(fast_attention, "native_attend", counted)
    model = FlaxGemmaForCausalLM(CONFIG)
    use_native(model)
    model(jnp.array([[5, 6, 7]]))
    model(jnp.array([[5]]), output_attentions=True)
    assert not taken
    model(jnp.array([[5]]))
    assert len(taken) == CONFIG.num_hidden_layers


# -- where it is taken ----------------------------------------------------------------------------


def test_a_step_takes_it_for_every_matrix(calls: list[tuple[int, ...]]) -> None:
    model = FlaxGemmaForCausalLM(CONFIG)
    use_native(model)
    model(jnp.full((MOST_ROWS, 1), 5))
    assert len(calls) == 7 * CONFIG.num_hidden_layers + 1
    assert calls[-1] == (CONFIG.vocab_size, CONFIG.hidden_size)  # the head


def test_other_products_are_the_plain_ones(calls: list[tuple[int, ...]]) -> None:
    x, weight = draw(2, 16), draw(5, 16)
    linear(x, weight, native=True)
    assert len(calls) == 1
    linear(draw(MOST_ROWS + 1, 16), weight, native=True)
    linear(x.astype(jnp.float16), weight.astype(jnp.float16), native=True)
    linear(x, weight.astype(jnp.bfloat16), native=True)
    linear(x, weight, draw(5), native=True)
    linear(x, weight)
    assert len(calls) == 1


# -- the option -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "model"
    FlaxGemmaForCausalLM(CONFIG, nnx.Rngs(0)).save_pretrained(path)
    return path


def load(path: Path, dtype: str = "float32", **options: Any) -> Any:
    return Gemma.load(path, backend="flax", device="cpu", dtype=dtype, backend_options=options)


def test_the_option_makes_every_layer_native(path: Path) -> None:
    for given in (True, False):
        nodes = [node for _, node in nnx.iter_graph(load(path, native=given).model)]
        parts = [node for node in nodes if isinstance(node, Linear | Embedding)]
        assert len(parts) == 7 * CONFIG.num_hidden_layers + 1
        assert all(part.native == given for part in parts)


@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_are_those_of_the_plain_loop_in_any_batch(path: Path, seed: int) -> None:
    plain, native = load(path), load(path, native=True)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 61, n).tolist() for n in rng.integers(1, 30, rng.integers(1, 12))]
    settings = {
        "max_new_tokens": int(rng.integers(1, 20)),
        "eos_token_id": int(rng.integers(61)),
        "temperature": float(seed % 2),
        "seed": seed,
    }
    expected = plain.generate(input_ids=rows, **settings)
    found = native.generate(input_ids=rows, **settings)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_compiled_programs_of_it_are_read_from_the_disk(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_HUB_COMPILE_CACHE", str(tmp_path / "programs"))
    ids, settings = [[5, 6, 7]], {"max_new_tokens": 9, "eos_token_id": ()}
    first = load(path, native=True).generate(input_ids=ids, **settings)
    assert list((tmp_path / "programs").iterdir())
    from gemma_hub_flax import backend, fast_greedy

    for programs in (backend._RUN, fast_greedy._STEPS):
        monkeypatch.setattr(programs, "_programs", {})  # as in another process
    again = load(path, native=True).generate(input_ids=ids, **settings)
    assert again == first


def test_a_gradient_of_a_native_model_is_that_of_the_plain_one(path: Path) -> None:
    from gemma_hub.inputs import ModelInputs

    ids = np.array([[5, 6, 7, 8]])
    inputs = ModelInputs.prepare(CONFIG, ids, labels=ids)
    plain, native = load(path), load(path, native=True)
    loss, gradients = plain.contract.loss_and_gradients(inputs)
    other_loss, others = native.contract.loss_and_gradients(inputs)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(others[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nativ": True}, r"The flax backend has no option 'nativ'\. Did you mean 'native'\?"),
        ({"native": 1}, "native is 1; expected True or False"),
        ({"compile": True}, "Known: native"),
    ],
)
def test_a_wrong_option_is_refused(path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(path, **options)


def test_a_native_module_without_the_library_is_a_plain_one(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    model = FlaxGemmaForCausalLM(CONFIG)
    use_native(model)
    expected = model(jnp.array([[5]])).logits
    calls.clear()
    monkeypatch.setattr(fast_native, "_DTYPES", [])  # as in a process that has not loaded it
    monkeypatch.delattr(fast_attention, "native_attend")
    np.testing.assert_allclose(model(jnp.array([[5]])).logits, expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_the_library_may_be_loaded_again_from_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = draw(2, 40), draw(5, 40)
    expected = native_linear(x, weight)
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path))
    load_library.cache_clear()
    load_native()
    assert list((tmp_path / "native").iterdir())
    assert np.array_equal(native_linear(x, weight), expected)


def test_another_dtype_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="the model is float16 on cpu"):
        load(path, dtype="float16", native=True)
