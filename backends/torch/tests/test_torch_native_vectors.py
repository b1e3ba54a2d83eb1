"""The bfloat16 product by vectors, on a processor where AMX does its work in all other tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gemma_hub.cache import processor
from gemma_hub.native.library import has_compiler, load_library
from gemma_hub_torch import fast_native
from gemma_hub_torch.fast_native import load_native, native_linear

pytestmark = [
    pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler"),
    pytest.mark.skipif(
        "amx_bf16" not in processor(), reason="there is no AMX: all other tests are of the vectors"
    ),
]

SIZES = [(1, 1), (5, 31), (64, 32), (7, 33), (61, 64), (9, 200)]  # (out, in)


def without_amx(source: Path, flags: tuple[str, ...]) -> object:
    return load_library(source, (*flags, "-mno-amx-tile"))


@pytest.fixture(scope="module", params=["AMX", "vectors"])
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "vectors":
            patch.setattr(fast_native, "load_library", without_amx)
        load_native()
    yield request.param
    load_native()


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_it_is_summed_in_float32_and_rounded_once(library: str, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(size))
    weight = torch.randn(size, generator=generator).bfloat16()
    x = torch.randn(25, size[1], generator=generator).bfloat16()
    y = native_linear(x, weight)
    exact = x.double() @ weight.double().T
    sums = x.double().abs() @ weight.double().abs().T * size[1] * torch.finfo(torch.float32).eps
    rounding = exact.abs() * torch.finfo(torch.bfloat16).eps / 2
    assert ((y.double() - exact).abs() <= 1.01 * rounding + sums).all()
    for rows in (1, 7, 8, 9, 16, 17):
        assert torch.equal(native_linear(x[:rows], weight), y[:rows])


@torch.no_grad()
def test_they_are_two_ways(library: str) -> None:
    tiny = torch.full((1, 40), torch.finfo(torch.bfloat16).smallest_normal / 4).bfloat16()
    y = native_linear(tiny, torch.ones(2, 40).bfloat16())
    assert (y == 0).all() if library == "AMX" else (y > 0).all()
