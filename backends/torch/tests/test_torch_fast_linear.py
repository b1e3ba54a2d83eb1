"""The CPU's fast products give the plain ones' numbers, and are taken where they should be only."""

from collections.abc import Callable, Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma_hub import GemmaConfig
from gemma_hub_torch import GemmaForCausalLM, fast_linear
from gemma_hub_torch import linear as linear_module
from gemma_hub_torch.linear import linear

SIZES = [(1, 1), (3, 7), (64, 512), (61, 24), (512, 64)]  # (out, in)
CONFIG = GemmaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def make_model(kind: Any = GemmaForCausalLM, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return kind(CONFIG).to(dtype).eval()


def assert_exact_but_for_one_rounding(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y is x times weight, summed in float32 at least and then rounded to y's type."""
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    sums = scale * weight.shape[1] * torch.finfo(torch.float32).eps
    rounding = exact.abs() * torch.finfo(y.dtype).eps / 2
    assert bool(((y.double() - exact).abs() <= 1.01 * rounding + sums).all())


@pytest.fixture(autouse=True)
def onednn_is_on() -> Iterator[None]:
    """As it is in every process, and so that no test finds what another has left off."""
    assert torch.backends.mkldnn.enabled
    yield
    is_on = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = True
    assert is_on


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each product is taken."""
    counts = {"one_row_linear": 0, "onednn_linear": 0, "widened_linear": 0}

    def counted(name: str) -> Callable[..., Tensor]:
        product = getattr(fast_linear, name)

        def count(*arguments: Any) -> Tensor:
            counts[name] += 1
            return product(*arguments)

        return count

    for name in counts:
        monkeypatch.setattr(linear_module, name, counted(name))
    monkeypatch.setattr(fast_linear, "_HAS_WIDE_VECTORS", True)
    monkeypatch.setattr(fast_linear, "_IS_INTEL", False)
    monkeypatch.setattr(fast_linear, "_IS_INTEL_WITHOUT_AMX", False)
    return counts


# -- one row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_one_row_is_summed_in_float32_and_rounded_once(
    size: tuple[int, int], calls: dict[str, int]
) -> None:
    weight, x = draw(*size, dtype=torch.bfloat16), draw(1, 1, size[1], dtype=torch.bfloat16)
    y = linear(x, weight)
    assert calls["one_row_linear"] == 1
    assert y.shape == (1, 1, size[0])
    assert y.dtype == torch.bfloat16
    assert_exact_but_for_one_rounding(y, x, weight)


@torch.no_grad()
def test_one_row_gets_its_bias(calls: dict[str, int]) -> None:
    weight, bias = draw(5, 16, dtype=torch.bfloat16), draw(5, dtype=torch.bfloat16)
    x = draw(1, 16, dtype=torch.bfloat16)
    y = linear(x, weight, bias)
    assert calls["one_row_linear"] == 1
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@torch.no_grad()
def test_one_row_may_be_a_slice_of_a_mapped_weight_at_any_offset(calls: dict[str, int]) -> None:
    memory = draw(5 * 16 + 3, dtype=torch.bfloat16)
    weight, x = memory[3:].reshape(5, 16), draw(1, 9, 16, dtype=torch.bfloat16)[:, -1:]
    assert_exact_but_for_one_rounding(linear(x, weight), x, weight)
    assert calls["one_row_linear"] == 1


@pytest.mark.parametrize(
    ("rows", "dtype"), [(2, torch.bfloat16), (1, torch.float64), (1, torch.float16)], ids=str
)
@torch.no_grad()
def test_other_rows_and_types_take_the_plain_product(
    rows: int, dtype: torch.dtype, calls: dict[str, int]
) -> None:
    x, weight = draw(rows, 16, dtype=dtype), draw(5, 16, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not any(calls.values())


@pytest.mark.parametrize("change", [{"_HAS_WIDE_VECTORS": False}, {"_IS_INTEL": True}], ids=str)
@torch.no_grad()
def test_a_cpu_on_which_it_is_slow_or_was_not_measured_takes_the_plain_product(
    change: dict[str, bool], calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(fast_linear, name, value)
    linear(draw(1, 16, dtype=torch.bfloat16), draw(5, 16, dtype=torch.bfloat16))
    assert not any(calls.values())


@torch.no_grad()
def test_a_product_on_another_device_is_left_alone(calls: dict[str, int]) -> None:
    x = torch.empty(1, 16, dtype=torch.bfloat16, device="meta")
    linear(x, torch.empty(5, 16, dtype=torch.bfloat16, device="meta"))
    assert not any(calls.values())


def test_a_product_with_a_gradient_is_the_plain_one(calls: dict[str, int]) -> None:
    x = draw(1, 16, dtype=torch.bfloat16).requires_grad_()
    linear(x, draw(5, 16, dtype=torch.bfloat16)).sum().backward()
    assert x.grad is not None
    assert not any(calls.values())


def test_one_new_token_takes_it_for_every_matrix(calls: dict[str, int]) -> None:
    model = make_model()
    with torch.no_grad():
        model(torch.tensor([[5]]))
    assert calls["one_row_linear"] == 7 * CONFIG.num_hidden_layers + 1  # and the head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_torch_compile_gets_one_row_as_a_sum_that_it_can_fuse(
    dtype: torch.dtype, has_bias: bool, calls: dict[str, int]
) -> None:
    graphs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    weight, x = draw(64, 512, dtype=dtype), draw(1, 1, 512, dtype=dtype)
    bias = draw(64, dtype=dtype) if has_bias else None
    y = torch.compile(linear, backend=backend, fullgraph=True)(x, weight, bias)
    assert ".sum(" in graphs[0]
    assert "linear" not in graphs[0]
    if has_bias:
        torch.testing.assert_close(y, F.linear(x, weight, bias))
    else:
        assert_exact_but_for_one_rounding(y, x, weight)
    torch.compile(linear, backend=backend, fullgraph=True)(x.repeat(1, 2, 1), weight, bias)
    assert "linear" in graphs[1]


def test_onednn_is_on_again_after_an_error() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError):
        fast_linear.one_row_linear(draw(1, 3), draw(5, 4), None)
    assert torch.backends.mkldnn.enabled


def test_onednn_is_on_again_when_threads_leave_in_the_order_they_came() -> None:
    barrier, seen = Barrier(2, timeout=20), []
    off = fast_linear._OneDNNOff()

    def first() -> None:
        with off:
            barrier.wait()  # both are inside
        barrier.wait()

    def second() -> None:
        with off:
            barrier.wait()
            barrier.wait()  # the first has left
            seen.append(torch.backends.mkldnn.enabled)

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False]
    assert torch.backends.mkldnn.enabled


# -- float32 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_float32_rows_are_summed_in_float32(
    size: tuple[int, int],
    num_rows: int,
    has_bias: bool,
    calls: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast_linear, "_HAS_MKL_FOR_ONE_ROW", False)
    memory = draw(size[0] * size[1] + 3)
    weight = memory[3:].reshape(size)  # as one that is mapped at any offset
    bias = draw(size[0]) if has_bias else None
    x = draw(1, num_rows + 1, size[1] + 1)[:, 1:, 1:]  # of which no two rows are neighbours
    y = linear(x, weight, bias)
    assert calls["onednn_linear"] == 1
    assert y.shape == (1, num_rows, size[0])
    assert y.dtype == torch.float32
    if bias is None:
        assert_exact_but_for_one_rounding(y, x, weight)
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_what_is_left_to_pytorch_in_float32(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_linear, "_HAS_MKL_FOR_ONE_ROW", True)
    weight, x = draw(5, 16).requires_grad_(), draw(3, 16)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        linear(x[:1], weight)  # one row
        linear(x.double(), weight.double())
        torch.backends.mkldnn.enabled = False
        linear(x, weight)
        torch.backends.mkldnn.enabled = True
    assert calls["onednn_linear"] == 0
    with torch.no_grad():
        linear(x, weight)
    assert calls["onednn_linear"] == 1


# -- many rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_many_rows_are_widened_in_parts_and_rounded_once(
    has_bias: bool, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_linear, "_IS_INTEL_WITHOUT_AMX", True)
    monkeypatch.setattr(fast_linear, "_WIDENED", 24)  # 64 is no multiple of it
    weight, x = draw(64, 40, dtype=torch.bfloat16), draw(2, 64, 40, dtype=torch.bfloat16)
    bias = draw(64, dtype=torch.bfloat16) if has_bias else None
    y = linear(x, weight, bias)
    assert calls["widened_linear"] == 1
    assert y.dtype == torch.bfloat16
    if bias is None:
        assert_exact_but_for_one_rounding(y, x, weight)
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=2e-2, atol=2e-2)


def test_what_is_not_widened(calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_linear, "_IS_INTEL_WITHOUT_AMX", True)
    weight, x = draw(5, 16, dtype=torch.bfloat16), draw(128, 16, dtype=torch.bfloat16)
    linear(x.requires_grad_(), weight).sum().backward()
    with torch.no_grad():
        linear(x[1:], weight)
        linear(x.half(), weight.half())
        linear(x.to("meta"), weight.to("meta"))
        monkeypatch.setattr(fast_linear, "_IS_INTEL_WITHOUT_AMX", False)
        linear(x, weight)
        assert calls["widened_linear"] == 0
        monkeypatch.setattr(fast_linear, "_IS_INTEL_WITHOUT_AMX", True)
        linear(x, weight)
        assert calls["widened_linear"] == 1


# -- GELU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gelu_of_16_bits_is_that_of_float32_rounded_once(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)]
    expected = F.gelu(x.to(torch.float32), approximate="tanh").to(dtype)
    assert torch.equal(F.gelu(x, approximate="tanh"), expected)
