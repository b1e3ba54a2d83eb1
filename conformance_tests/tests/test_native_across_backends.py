"""The option `native` keeps the contract, and gives PyTorch and JAX the same bits."""

import io

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from rich.console import Console

import gemma_hub_flax.fast_native as flax_native
import gemma_hub_torch.fast_native as torch_native
from gemma_hub.native.library import has_compiler
from gemma_hub_conformance.engine import load_subject, run_conformance

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")


@pytest.mark.parametrize("name", ["torch", "flax"])
def test_the_backend_with_native_products_is_certified(name, oracle):
    dtypes = ("float32", "bfloat16")  # those that the option is for
    subject = load_subject(name, extra={"native": True}, dtypes=dtypes)
    report = run_conformance(subject, oracle=oracle)
    stream = io.StringIO()
    report.print(Console(file=stream, width=120))
    assert report.exit_code == 0, stream.getvalue()
    assert not report.missing
    assert report.summary.startswith(f"{name} with native=true (float32, bfloat16 only) is ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(61, 64), (7, 33), (130, 1000)], ids=str)  # (out, in)
def test_both_backends_give_the_same_bits(size, dtype):
    torch_native.load_native()
    flax_native.load_native()
    rng = np.random.default_rng(size[0])
    weight = rng.normal(size=size).astype(np.float32)
    for rows in (1, 3, 8, 13):
        x = rng.normal(size=(rows, size[1])).astype(np.float32)
        kind = getattr(torch, dtype)
        with torch.no_grad():
            one = torch_native.native_linear(
                torch.from_numpy(x).to(kind), torch.from_numpy(weight).to(kind)
            )
        other = flax_native.native_linear(jnp.asarray(x, dtype), jnp.asarray(weight, dtype))
        bits = np.uint16 if dtype == "bfloat16" else np.uint32
        mine = one.view(torch.uint16 if dtype == "bfloat16" else torch.uint32).numpy()
        theirs = np.asarray(other).view(bits)
        assert other.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        np.testing.assert_array_equal(mine, theirs)
