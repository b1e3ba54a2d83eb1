"""What is between native products, in one pass: the numbers of the plain operations, or nearer."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma_hub import GemmaConfig
from gemma_hub.native.library import has_compiler
from gemma_hub_torch import GemmaForCausalLM
from gemma_hub_torch import model as model_module
from gemma_hub_torch.fast_native import load_native, native_gated_, native_norm, use_native

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")

CONFIG = GemmaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]

WIDTHS = [1, 15, 16, 31, 32, 33, 64, 200]  # around the vectors' lanes


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_native()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@torch.no_grad()
def test_a_norm_is_in_float32_and_rounded_once(offset: float, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, weight = 3 * draw(2, 5, width, dtype=dtype), draw(width, dtype=dtype)
        y, wide = native_norm(x, weight, 1e-3, offset), x.double()
        exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        exact = exact * (offset + weight.double())
        rounding = exact.abs() * (torch.finfo(dtype).eps / 2 + 1e-6)
        # offset + weight is rounded too, which is all of it where they cancel
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= 1.01 * rounding + 1e-6 * wide.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_gate_is_in_float32_and_rounded_where_the_plain_one_is(dtype: torch.dtype) -> None:
    gates = torch.linspace(-12, 12, 4001).to(dtype)
    x = gates.double()
    u = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    exact = x * torch.sigmoid(u)  # 1 + tanh is nothing in float64 either, far on the left
    y = native_gated_(gates.clone(), torch.ones_like(gates)).double()
    rounding = torch.finfo(dtype).eps / 2 + 3e-7 * (1 + u.abs())
    assert ((y - exact).abs() <= 1.01 * rounding * exact.abs() + 1e-36).all()
    plain = F.gelu(gates, approximate="tanh").double()
    assert ((y - plain).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + 2e-6).all()
    ups = 3 * draw(4001, dtype=dtype)
    twice = (y.to(dtype).float() * ups.float()).to(dtype)  # GELU is rounded, then the product
    assert torch.equal(native_gated_(gates, ups), twice)
    assert torch.equal(gates, twice)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_gates_far_out_are_0_or_the_number_itself(dtype: torch.dtype) -> None:
    gates = torch.tensor([0.0, -0.0, 1e30, torch.inf, -60.0, -1e30, torch.nan], dtype=dtype)
    y = native_gated_(gates.clone(), torch.ones_like(gates))
    assert torch.equal(y[:4], gates[:4])
    assert torch.equal(y[4:6], torch.zeros(2, dtype=dtype))
    assert y[6].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_row_between_products_is_the_same_beside_any_others(dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, other, weight = (
            draw(*shape, dtype=dtype) for shape in ((9, width), (9, width), (width,))
        )
        norms = torch.cat([native_norm(row[None], weight, 1e-6, 1.0) for row in x])
        gates = torch.cat([native_gated_(x[i : i + 1].clone(), other[i : i + 1]) for i in range(9)])
        assert torch.equal(native_norm(x, weight, 1e-6, 1.0), norms)
        assert torch.equal(native_gated_(x, other), gates)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two functions are called."""
    names: list[str] = []

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Tensor:
            names.append(function.__name__)
            return cast(Tensor, function(*arguments))

        return call

    for function in (native_norm, native_gated_):
        monkeypatch.setattr(model_module, function.__name__, counted(function))
    return names


def test_a_prompt_takes_them_in_every_layer_and_training_does_not(passes: list[str]) -> None:
    torch.manual_seed(0)
    model, plain = GemmaForCausalLM(CONFIG), GemmaForCausalLM(CONFIG)
    use_native(model)
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 9, 30, 2], [7, 8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    layers = CONFIG.num_hidden_layers
    assert (passes.count("native_norm"), passes.count("native_gated_")) == (2 * layers + 1, layers)
    passes.clear()
    model(ids).logits.sum().backward()
    assert not passes
    with torch.no_grad():
        model.model.norm.weight.data = model.model.norm.weight.double()
        model.model.norm(torch.ones(2, 24))  # another dtype than the input's
    assert not passes
