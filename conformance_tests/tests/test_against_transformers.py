"""Both backends against Hugging Face transformers, on checkpoints that transformers writes.

The weights are large and the norms away from zero, so that every feature moves the logits; the
largest logit is near 10 and the bound is 1e-4.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gemma_hub import Gemma
from gemma_hub.tasks.causal_lm import CausalLM

BACKENDS = ("torch", "flax", "numpy")
SHAPES = {
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 20},
}
BATCH, LENGTH, NEW_TOKENS = 3, 23, 12


def transformers_model(shape: str) -> Any:
    config = transformers.GemmaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        max_position_embeddings=8192,
        rms_norm_eps=3e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        pad_token_id=3,
        bos_token_id=5,
        eos_token_id=1,
        **SHAPES[shape],
    )
    torch.manual_seed(sum(map(ord, shape)))
    model = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.6, 2.0)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
        model.model.embed_tokens.weight.mul_(1.5)  # brings the largest logit to about 10
    return model


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Any, Path]:
    """A transformers model and the sharded checkpoint that transformers saved of it."""
    model = transformers_model(request.param)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return model, path


@pytest.fixture(scope="module", params=BACKENDS)
def loaded(request: pytest.FixtureRequest, pair: tuple[Any, Path]) -> tuple[Any, CausalLM]:
    """The same model in transformers and in one of the backends."""
    model, path = pair
    return model, Gemma.load(path, backend=request.param, dtype=loading_dtype(request.param))


def loading_dtype(backend: str) -> str:
    return "float64" if backend == "numpy" else "float32"


def padded_batch(padding: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(11).integers(6, 131, (BATCH, LENGTH))
    mask = np.ones_like(ids)
    if padding == "left":
        mask[1, :9], mask[2, :1] = 0, 0
    elif padding == "right":
        mask[1, 14:], mask[2, 22:] = 0, 0
    ids[mask == 0] = 3
    return ids, mask


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_and_hidden_states(loaded: tuple[Any, CausalLM], padding: str) -> None:
    model, lm = loaded
    ids, mask = padded_batch(padding)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        expected = model(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            output_hidden_states=True,
        )
    got = lm.forward(ids, attention_mask=mask, output_hidden_states=True).to_numpy()
    real = mask == 1
    logits = expected.logits.numpy()
    assert 5 < np.abs(logits[real]).max() < 16
    np.testing.assert_allclose(got.logits[real], logits[real], rtol=0, atol=1e-4)
    assert got.hidden_states is not None
    assert len(got.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        np.testing.assert_allclose(ours[real], theirs.numpy()[real], rtol=0, atol=1e-4)


def test_greedy_tokens(loaded: tuple[Any, CausalLM]) -> None:
    model, lm = loaded
    ids, mask = padded_batch("left")
    expected = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=3,
        eos_token_id=1,
    )
    prompts = [row[keep == 1].tolist() for row, keep in zip(ids, mask, strict=True)]
    for generation, theirs in zip(
        lm.generate(input_ids=prompts, max_new_tokens=NEW_TOKENS), expected, strict=True
    ):
        ours = list(generation.token_ids)
        assert ours == theirs[LENGTH : LENGTH + len(ours)].tolist()
        assert generation.finish_reason == "stop" or len(ours) == NEW_TOKENS


@pytest.mark.parametrize("loaded", ["torch", "flax"], indirect=True)
def test_what_we_save_transformers_loads_bit_for_bit(
    loaded: tuple[Any, CausalLM], tmp_path: Path
) -> None:
    model, lm = loaded
    lm.save(tmp_path / "saved")
    again = transformers.GemmaForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, ours), (_, theirs) in zip(
        again.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
