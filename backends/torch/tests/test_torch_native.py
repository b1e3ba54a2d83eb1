"""The native product: exact but for one rounding, the same for any rows, and for inference only."""

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma_hub import Gemma, GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.native.library import has_compiler, load_library
from gemma_hub_torch import (
    GemmaForCausalLM,
    GemmaForSequenceClassification,
    fast_attention,
    fast_native,
)
from gemma_hub_torch import linear as linear_module
from gemma_hub_torch.fast_native import (
    MOST_ROWS,
    load_native,
    native_attend,
    native_linear,
    use_native,
)
from gemma_hub_torch.linear import Embedding, Linear, linear

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")

CONFIG = GemmaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip
# (out, in): around the vectors' 16 and 32 lanes, and the blocks' 3 and 4 columns
SIZES = [(1, 1), (3, 7), (4, 16), (5, 31), (64, 32), (7, 33), (13, 63), (61, 64), (9, 200)]
ROWS = [*range(1, 10), 15, 16, 17, 25]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_native()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def make_model(kind: Any = GemmaForCausalLM, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = kind(CONFIG).to(dtype).eval()
    use_native(model)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights for which it is taken."""
    shapes: list[tuple[int, ...]] = []

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        shapes.append(tuple(weight.shape))
        return native_linear(x, weight)

    monkeypatch.setattr(linear_module, "native_linear", counted)
    return shapes


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_it_is_summed_in_float32_and_rounded_once(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = draw(*size, dtype=dtype)
    for rows in ROWS:
        x = draw(rows, size[1], dtype=dtype)
        y = native_linear(x, weight)
        exact = x.double() @ weight.double().T
        sums = x.double().abs() @ weight.double().abs().T * size[1] * torch.finfo(torch.float32).eps
        rounding = exact.abs() * torch.finfo(dtype).eps / 2
        assert y.dtype == dtype
        assert bool(((y.double() - exact).abs() <= 1.01 * rounding + sums).all())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_row_is_the_same_bit_by_bit_beside_any_others(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in SIZES:
            weight, x = draw(*size, dtype=dtype), draw(max(ROWS), size[1], dtype=dtype)
            alone = torch.cat([native_linear(row[None], weight) for row in x])
            for rows in ROWS:
                assert torch.equal(native_linear(x[-rows:], weight), alone[-rows:])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_rounding_is_to_the_nearest_and_then_to_even() -> None:
    # One column of ones and one row: the product is the number itself, in float32.
    numbers = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32).view(np.float32)
    halves = (np.arange(256, dtype=np.uint32) << 16 | 0x3F808000).view(np.float32)
    # Of bfloat16, AMX takes subnormal numbers for zero.
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) > 1e-30)]
    for value in np.concatenate([numbers, halves])[-3000:]:
        high = torch.tensor([[float(value)]]).to(torch.bfloat16)
        low = torch.tensor([[float(value) - float(high)]]).to(torch.bfloat16)
        x, ones = torch.cat([high, low], 1), torch.ones(1, 2, dtype=torch.bfloat16)
        expected = (high.float() + low.float()).to(torch.bfloat16)
        assert torch.equal(native_linear(x, ones), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_what_is_not_a_number_stays_in_its_row_and_column(dtype: torch.dtype) -> None:
    weight, x = draw(6, 40, dtype=dtype), draw(3, 40, dtype=dtype)
    weight[2, 39], x[1, 5] = torch.nan, torch.inf
    y = native_linear(x, weight)
    assert y[:, 2].isnan().all()
    assert not y[1].isfinite().any()
    assert y[[0, 2]][:, [0, 1, 3, 4, 5]].isfinite().all()


@torch.no_grad()
def test_subnormal_numbers_count_in_float32() -> None:
    tiny = torch.full((1, 40), torch.finfo(torch.float32).smallest_normal / 4)
    assert (native_linear(tiny, torch.ones(2, 40)) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_no_byte_behind_a_weight_is_read(dtype: torch.dtype) -> None:
    page, protect = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True).mprotect
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert protect(ctypes.c_void_p(start + page), page, 0) == 0  # reading there ends the process
    whole = torch.frombuffer(memory, dtype=dtype)
    for out, size in ((3, 7), (5, 33), (4, 64), (1, 100)):
        weight = whole[page // dtype.itemsize - out * size : page // dtype.itemsize]
        weight = weight.reshape(out, size).copy_(draw(out, size, dtype=dtype))
        for rows in (1, 8, 11):
            x = draw(rows, size, dtype=dtype)
            expected = native_linear(x, weight.clone())
            assert torch.equal(native_linear(x, weight), expected)
    assert protect(ctypes.c_void_p(start + page), page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@torch.no_grad()
def test_a_slice_of_a_mapped_weight_may_begin_anywhere() -> None:
    memory = draw(5 * 40 + 3, dtype=torch.bfloat16)
    weight, x = memory[3:].reshape(5, 40), draw(2, 9, 40, dtype=torch.bfloat16)[:, -1:]
    y = native_linear(x, weight)
    assert y.shape == (2, 1, 5)
    assert torch.equal(y, native_linear(x.clone(), weight.clone()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_no_rows_are_no_error(dtype: torch.dtype) -> None:
    y = native_linear(torch.empty(0, 7, dtype=dtype), torch.ones(3, 7, dtype=dtype))
    assert y.shape == (0, 3)


# -- attention ------------------------------------------------------------------------------------

# (rows, slots, heads, key/value heads, head size): around pieces of 128 slots, groups of 8 heads
# that share keys, and the vectors' lanes
SHAPES = [
    (1, 1, 1, 1, 2), (2, 5, 4, 2, 8), (1, 127, 8, 1, 64), (3, 128, 4, 4, 24), (2, 129, 9, 1, 40),
    (2, 400, 24, 2, 6), (1, 300, 8, 1, 256),
]  # fmt: skip


def draw_attention(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, and k, v and a mask that are the first slots of larger arrays."""
    rows, slots, heads, kv_heads, size = shape
    q = draw(rows, heads, size, dtype=dtype)
    k = draw(rows, slots + 3, kv_heads, size, dtype=dtype)[:, :slots]
    v = draw(rows, slots + 3, size, kv_heads, dtype=dtype).transpose(2, 3).contiguous()[:, :slots]
    visible = torch.rand(rows, slots, generator=torch.Generator().manual_seed(slots)) < 0.8
    visible[0, : 2 * slots // 3] = False
    visible[0, -1] = True
    return q, k, v, visible


def exact_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    rows, heads, size = q.shape
    q, k, v = (x.double() for x in (q, k, v))
    q = q.reshape(rows, k.shape[2], -1, size)
    scores = torch.einsum("bkgh,bskh->bkgs", q, k) * scale
    probs = torch.where(visible[:, None, None], scores, -2.0e38).softmax(-1)
    return torch.einsum("bkgs,bskh->bkgh", probs, v).reshape(rows, heads, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_attention_is_in_float32_and_rounded_once(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v, visible = draw_attention(shape, dtype)
    for scale in (shape[-1] ** -0.5, 1.5):
        found = native_attend(q, k, v, visible, scale)
        exact = exact_attention(q, k, v, visible, scale)
        assert found.dtype == dtype
        # The scores' own rounding is multiplied by the exponential.
        sums = 3e-6 * (1 + scale * shape[-1] ** 0.5) * v.double().abs().amax()
        rounding = exact.abs() * torch.finfo(dtype).eps / 2
        assert bool(((found.double() - exact).abs() <= 1.01 * rounding + sums).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_row_that_sees_nothing_averages(dtype: torch.dtype) -> None:
    q, k, v, visible = draw_attention((2, 200, 4, 2, 8), dtype)
    visible[1] = False
    found = native_attend(q, k, v, visible, 0.3)[1]
    mean = v[1].double().mean(0).repeat_interleave(2, 0)
    torch.testing.assert_close(found.double(), mean, atol=2e-3, rtol=4e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_attention_is_the_same_bit_by_bit_beside_other_rows_and_on_more_threads(
    dtype: torch.dtype,
) -> None:
    q, k, v, visible = draw_attention((5, 300, 8, 2, 24), dtype)
    alone = [
        native_attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], visible[i : i + 1], 0.2)
        for i in range(5)
    ]
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(native_attend(q, k, v, visible, 0.2), torch.cat(alone))
        finally:
            torch.set_num_threads(before)


@torch.no_grad()
def test_what_a_query_does_not_see_changes_nothing_and_a_nan_that_it_sees_shows() -> None:
    q, k, v, visible = draw_attention((2, 300, 4, 2, 8), torch.float32)
    expected = native_attend(q, k, v, visible, 0.3)
    other_k, other_v = (torch.where(visible[..., None, None], x, 1e30) for x in (k, v))
    assert torch.equal(native_attend(q, other_k, other_v, visible, 0.3), expected)
    native_attend(q, k, v * torch.nan, torch.ones_like(visible), 0.3)  # leaves its sums in memory
    assert torch.equal(native_attend(q, k, v, visible, 0.3), expected)
    k = k.clone()
    k[1, 299, 0, 3], visible[1, 299] = torch.nan, True
    found = native_attend(q, k, v, visible, 0.3)
    assert torch.equal(found[0], expected[0])
    assert found[1, :2].isnan().all()
    assert found[1, 2:].isfinite().all()


@torch.no_grad()
def test_slots_that_all_score_nan_are_not_left_out_and_infinitely_small_ones_are() -> None:
    q, k, v, visible = draw_attention((1, 300, 2, 1, 8), torch.float32)
    visible[:] = True
    q = q.abs()
    expected = native_attend(q, k[:, 128:], v[:, 128:], visible[:, 128:], 0.3)
    for value in (torch.nan, -torch.inf):
        k[:, :128] = value  # a whole piece
        found = native_attend(q, k, v, visible, 0.3)
        if value != value:
            assert found.isnan().all()
        else:
            torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_keys_in_another_layout_are_read_right() -> None:
    q, k, v, visible = draw_attention((2, 40, 4, 2, 8), torch.float32)
    turned = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        native_attend(q, turned, v, visible, 0.3), native_attend(q, k, v, visible, 0.3)
    )


@torch.no_grad()
def test_exponentials_are_right_to_the_last_places() -> None:
    # One key of zeros and one that scores x: the second weighs exp(x), relative to the first.
    scores = torch.linspace(-90, 0, 4001)
    q = scores.reshape(-1, 1, 1)
    k = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(len(scores), -1, -1, -1).contiguous()
    visible = torch.ones(len(scores), 2, dtype=torch.bool)
    found = native_attend(q, k, k, visible, 1.0).flatten().double()
    exact = torch.sigmoid(scores.double())
    shown = scores > -86  # below it is 0, or nearly
    assert bool(((found - exact).abs() <= 4e-7 * exact)[shown].all())
    assert bool((found[~shown] <= 1e-37).all())


# -- where it is taken ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_takes_it_for_every_matrix(dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    model = make_model(dtype=dtype)
    with torch.no_grad():
        model(torch.tensor([[5]] * MOST_ROWS))
    assert len(calls) == 7 * CONFIG.num_hidden_layers + 1
    assert calls[-1] == (CONFIG.vocab_size, CONFIG.hidden_size)  # the head


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the keys for which the attention is taken."""
    shapes: list[tuple[int, ...]] = []

    def counted(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        shapes.append(tuple(k.shape))
        return native_attend(q, k, *others)

    monkeypatch.setattr(fast_attention, "native_attend", counted)
    return shapes


def test_one_query_a_row_takes_it_in_every_layer(attended: list[tuple[int, ...]]) -> None:
    model, plain = make_model(), GemmaForCausalLM(CONFIG)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]] * 3)).past_key_values
        assert not attended
        found = model(torch.tensor([[8]] * 3), past_key_values=cache).logits
        assert len(attended) == CONFIG.num_hidden_layers
        assert attended[0][:2] == (3, 4)
        cache = plain(torch.tensor([[5, 6, 7]] * 3)).past_key_values
        plain_out = plain(torch.tensor([[8]] * 3), past_key_values=cache)
        torch.testing.assert_close(found, plain_out.logits, rtol=1e-4, atol=1e-4)
        model(torch.tensor([[8]]), output_attentions=True)
    model(torch.tensor([[8]])).logits.sum().backward()
    assert len(attended) == CONFIG.num_hidden_layers


def plain_rows() -> tuple[Tensor, Tensor]:
    return draw(2, 16), draw(5, 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (draw(MOST_ROWS + 1, 16), w),
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.half(), w.half()),
        lambda x, w: (x, draw(16, 5).T),
        lambda x, w: (x.to("meta"), w.to("meta")),
    ],
    ids=["rows", "float64", "float16", "layout", "device"],
)
@torch.no_grad()
def test_other_products_are_the_plain_ones(
    change: Callable[..., tuple[Tensor, Tensor]], calls: list[tuple[int, ...]]
) -> None:
    x, weight = plain_rows()
    linear(x, weight, native=True)
    assert len(calls) == 1
    linear(*change(x, weight), native=True)
    linear(x, weight, draw(5), native=True)
    linear(x, weight)
    assert len(calls) == 1


def test_a_model_that_was_made_native_is_trained_as_before(calls: list[tuple[int, ...]]) -> None:
    plain, native = GemmaForCausalLM(CONFIG), make_model()
    native.load_state_dict(plain.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    for model in (plain, native):
        model(ids, labels=ids).loss.backward()
    assert not calls
    for one, other in zip(plain.parameters(), native.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_head_with_a_bias_takes_it_where_there_is_none(calls: list[tuple[int, ...]]) -> None:
    model = make_model(GemmaForSequenceClassification)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert (CONFIG.num_labels, CONFIG.hidden_size) in calls


@torch.no_grad()
def test_torch_compile_gets_it_as_one_operation() -> None:
    graphs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    x, weight = plain_rows()
    y = torch.compile(linear, backend=backend, fullgraph=True)(x, weight, native=True)
    assert "gemma_hub_torch.product" in graphs[0]
    assert torch.equal(y, native_linear(x, weight))
    torch.library.opcheck(torch.ops.gemma_hub_torch.product, (x, weight))
    attention = draw_attention((2, 5, 4, 2, 8), torch.float32)
    torch.library.opcheck(torch.ops.gemma_hub_torch.attend, (*attention, 0.3))


# -- the option -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("native") / "model"
    GemmaForCausalLM(CONFIG).save_pretrained(path)
    return path


def load(path: Path, **options: Any) -> Any:
    dtype = options.pop("dtype", "float32")
    own = {"native": True, **options}
    return Gemma.load(path, backend="torch", device="cpu", dtype=dtype, backend_options=own)


def test_the_option_makes_every_layer_native_and_saves_what_was_loaded(
    path: Path, tmp_path: Path
) -> None:
    lm = load(path)
    parts = [part for part in lm.model.modules() if isinstance(part, Linear | Embedding)]
    assert len(parts) == 7 * CONFIG.num_hidden_layers + 1
    assert all(part.native for part in parts)
    assert not any(part.native for part in load(path, native=False).model.modules()
                   if isinstance(part, Linear | Embedding))  # fmt: skip
    lm.save(tmp_path / "again")
    again = Gemma.load(tmp_path / "again", backend="torch", device="cpu").model.state_dict()
    for name, array in lm.model.state_dict().items():
        assert torch.equal(array, again[name])


@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_are_those_of_the_plain_loop_in_any_batch(path: Path, seed: int) -> None:
    plain, native = load(path, native=False), load(path)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 61, n).tolist() for n in rng.integers(1, 30, rng.integers(1, 12))]
    settings = {
        "max_new_tokens": int(rng.integers(1, 20)),
        "eos_token_id": int(rng.integers(61)),
        "temperature": float(rng.choice([0.0, 1.0])),
        "seed": seed,
    }
    expected = plain.generate(input_ids=rows, **settings)
    found = native.generate(input_ids=rows, **settings)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_a_step_of_a_batch_has_each_row_s_own_logits_bit_by_bit(path: Path) -> None:
    lm = load(path, dtype="bfloat16")
    ids = np.random.default_rng(1).integers(3, 61, (9, 1))
    together = lm.forward(ids).logits
    for row, logits in zip(ids, together, strict=True):
        assert np.array_equal(lm.forward(row[None]).logits[0], logits)


def test_it_can_be_compiled_too(path: Path) -> None:
    plain, both = load(path, native=False), load(path, compile=True)
    settings = {"input_ids": [[5, 6, 7]], "max_new_tokens": 12, "eos_token_id": ()}
    assert both.generate(**settings)[0].token_ids == plain.generate(**settings)[0].token_ids


PICKLED = """
import sys
import torch
model = torch.load(sys.argv[1], weights_only=False)
assert model.model.native
with torch.no_grad():
    torch.save(model(torch.tensor([[5]])).logits, sys.argv[2])
"""


def test_a_native_module_in_a_process_without_the_library_is_a_plain_one(tmp_path: Path) -> None:
    model = make_model()
    torch.save(model, tmp_path / "module.pt")
    files = [tmp_path / "module.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", PICKLED, *files], check=True, timeout=120)
    with torch.no_grad():
        expected = model(torch.tensor([[5]])).logits
    torch.testing.assert_close(torch.load(files[1]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_native_module_may_be_brought_to_another_dtype() -> None:
    model = make_model()
    expected = model(torch.tensor([[5]])).logits
    found = model.double()(torch.tensor([[5]])).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_another_dtype_or_device_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="the model is float16 on cpu"):
        load(path, dtype="float16")
    with torch.device("meta"):
        module = GemmaForCausalLM(CONFIG)
    with pytest.raises(InputError, match="the model is float32 on meta"):
        use_native(module)


def test_without_a_compiler_loading_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_library.cache_clear()
    with pytest.raises(InputError, match=r"option native .*no-such-compiler does not run"):
        load(path)
    assert fast_native._FUNCTIONS  # what was loaded before goes on working
