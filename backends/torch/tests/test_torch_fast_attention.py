"""The fused kernel gives the sums of the plain attention, and is used where it may be."""

import pytest
import torch
from torch import Tensor

from gemma_hub.config import GemmaConfig
from gemma_hub_torch import GemmaForCausalLM, attention
from gemma_hub_torch.attention import MASKED, attend, causal_mask
from gemma_hub_torch.fast_attention import FusedMask, fused_mask

SCALE = 0.2


def drawn(dtype, num_queries, num_slots, heads=(4, 2)):
    """q, k, v of three rows with scores that are far from equal."""
    draw = torch.Generator().manual_seed(7)
    shapes = [(3, num_queries, heads[0], 8), *[(3, num_slots, heads[1], 8)] * 2]
    return [2 * torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def valid_slots(padding, num_slots):
    valid = torch.ones(3, num_slots, dtype=torch.bool)
    if padding == "left":
        valid[0, :3] = valid[1, :1] = False
    if padding == "right":
        valid[0, -3:] = False
    if padding == "whole row":
        valid[1] = False
    return valid


def both(q, k, v, visible):
    fused = fused_mask(visible, MASKED)
    assert isinstance(fused, FusedMask)
    assert fused.shape == visible.shape
    assert fused.visible is visible
    return attend(q, k, v, fused, SCALE, 0.0)[0], attend(q, k, v, visible, SCALE, 0.0)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "right", "whole row"])
@pytest.mark.parametrize(("start", "heads"), [(0, (4, 2)), (5, (4, 1)), (0, (2, 2)), (5, (8, 2))])
@pytest.mark.parametrize("num_queries", [1, 9])
@torch.no_grad()
def test_the_sums_are_those_of_the_plain_attention(dtype, padding, start, heads, num_queries):
    q, k, v = drawn(dtype, num_queries, start + num_queries, heads)
    visible = causal_mask(valid_slots(padding, start + num_queries), start, num_queries)
    found, expected = both(q, k, v, visible)
    assert found.dtype == dtype
    limit = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def test_gradients_are_those_of_the_plain_attention():
    inputs = [x.requires_grad_() for x in drawn(torch.float32, 9, 9)]
    visible = causal_mask(valid_slots("none", 9), 0, 9)
    weights = torch.randn(3, 9, 4, 8, generator=torch.Generator().manual_seed(8))
    found, expected = (
        torch.autograd.grad((out * weights).sum(), inputs) for out in both(*inputs, visible)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_padding_with_gradients_keeps_the_plain_attention():
    visible = causal_mask(valid_slots("left", 9), 0, 9)
    assert fused_mask(visible, MASKED) is visible


@torch.no_grad()
def test_the_triangle_is_for_batches_without_padding_only():
    def bias(padding, start, num_queries) -> Tensor | None:
        visible = causal_mask(valid_slots(padding, start + num_queries), start, num_queries)
        mask = fused_mask(visible, MASKED)
        assert isinstance(mask, FusedMask)
        return mask.bias

    assert bias("none", 0, 9) is None
    for padding, start in (("left", 0), ("right", 0), ("whole row", 0), ("none", 4)):
        assert bias(padding, start, 9) is not None, (padding, start)


def test_another_device_and_dropout_keep_the_plain_attention():
    elsewhere = torch.ones(3, 4, 4, dtype=torch.bool, device="meta")
    assert fused_mask(elsewhere, MASKED) is elsewhere
    q, k, v = drawn(torch.float32, 4, 4)
    visible = causal_mask(torch.ones(3, 4, dtype=torch.bool), 0, 4)
    mask = fused_mask(visible, MASKED)
    torch.manual_seed(3)
    dropped, weights = attend(q, k, v, mask, SCALE, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropped, attend(q, k, v, visible, SCALE, 0.5)[0])
    assert weights.shape == (3, 4, 4, 4)


def test_a_model_uses_it_unless_the_weights_are_asked_for(monkeypatch):
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    lm = GemmaForCausalLM(config)
    calls = []
    real = attention.fused_attend
    monkeypatch.setattr(attention, "fused_attend", lambda *a: calls.append(1) or real(*a))
    ids = torch.tensor([[2, 5, 7, 9]])
    with torch.no_grad():
        plain = lm(ids, output_attentions=True)
        assert not calls
        fused = lm(ids)
        assert len(calls) == lm.config.num_hidden_layers
        last = lm(ids[:, 3:], past_key_values=lm(ids[:, :3]).past_key_values)
    assert len(calls) == 3 * lm.config.num_hidden_layers
    torch.testing.assert_close(last.logits, plain.logits[:, 3:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.logits, plain.logits, rtol=1e-5, atol=1e-5)
    assert plain.attentions[0].shape == (1, lm.config.num_attention_heads, 4, 4)
