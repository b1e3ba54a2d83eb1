"""The torch classes train with PyTorch's own tools: optimisers, PEFT, compile, checkpointing."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import gemma_hub_torch
from gemma_hub import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub_torch import GemmaForCausalLM, GemmaForTokenClassification
from gemma_hub_torch.attention import rope
from gemma_hub_torch.backend import TorchModel
from gemma_hub_torch.dropout import dropout
from gemma_hub_torch.model import Attention
from gemma_hub_torch.outputs import HeadOutput

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
CLASSES = [getattr(gemma_hub_torch, name) for name in gemma_hub_torch.__all__ if "For" in name]
CLASSES.append(gemma_hub_torch.GemmaModel)


def new(kind: Any = GemmaForCausalLM, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return kind(GemmaConfig(**{**CONFIG, **changes}))


def batch(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, CONFIG["vocab_size"], (rows, tokens), generator=generator)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out: HeadOutput = model(ids, labels=ids, use_cache=False)
    assert out.loss is not None
    return out.loss


def train(model: Any, ids: torch.Tensor, steps: int = 8) -> list[float]:
    """The loss before each of some steps of AdamW."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The loss and its gradient by every parameter; dropout from a seed."""
    torch.manual_seed(11)
    loss = loss_of(model, ids)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# -- torch.optim ----------------------------------------------------------------------------------


def test_adamw_trains_a_mapped_checkpoint_and_leaves_its_file_alone(tmp_path: Path) -> None:
    new().save_pretrained(tmp_path / "gemma")
    file = tmp_path / "gemma" / "model.safetensors"
    before = file.read_bytes()
    model = GemmaForCausalLM.from_pretrained(tmp_path / "gemma").train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, batch())
    assert losses[-1] < 0.7 * losses[0]
    unchanged = [name for name, value in model.state_dict().items() if value.equal(start[name])]
    assert not unchanged
    assert file.read_bytes() == before


def test_a_step_in_bfloat16_is_finite_and_moves_every_parameter() -> None:
    model = new().to(torch.bfloat16)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, batch())
    assert losses[-1] < losses[0]
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.isfinite(value).all(), name
        assert not value.equal(start[name]), name


# -- PEFT -----------------------------------------------------------------------------------------


def adapted(model: GemmaForCausalLM) -> Any:
    """`model` with a LoRA that has been trained a little."""
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    lora = peft.get_peft_model(model, settings)
    train(lora, batch())
    return lora


def test_lora_gives_gradients_to_the_adapters_only() -> None:
    model = new()
    ids = batch()
    plain = model(ids).logits
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    lora = peft.get_peft_model(model, settings)
    assert torch.equal(lora(input_ids=ids).logits, plain)  # an adapter begins as nothing
    loss_of(lora, ids).backward()
    layers = range(CONFIG["num_hidden_layers"])
    assert {name for name, p in lora.named_parameters() if p.grad is not None} == {
        f"base_model.model.model.layers.{i}.self_attn.{which}_proj.lora_{side}.default.weight"
        for i in layers
        for which in "qv"
        for side in "AB"
    }
    losses = train(lora, ids)
    assert losses[-1] < losses[0]


def test_a_merged_adapter_is_the_model_with_the_product_added() -> None:
    model = new()
    names = list(model.state_dict())
    base = {name: value.clone() for name, value in model.state_dict().items()}
    lora = adapted(model)
    changes = {
        name: 8 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for name, layer in lora.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    merged = lora.merge_and_unload()
    assert isinstance(merged, GemmaForCausalLM)
    assert list(merged.state_dict()) == names
    assert len(changes) == 2 * CONFIG["num_hidden_layers"]
    for name, value in merged.state_dict().items():
        change = changes.get(name.removesuffix(".weight"), torch.zeros(()))
        assert torch.equal(value, base[name] + change), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_transformers_reads_the_adapter_as_its_own(tmp_path: Path) -> None:
    model = new()
    model.save_pretrained(tmp_path / "gemma")
    lora = adapted(model)
    lora.save_pretrained(tmp_path / "adapter")
    theirs = transformers.GemmaForCausalLM.from_pretrained(tmp_path / "gemma")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    ours = lora.merge_and_unload().state_dict()
    loaded = {name: value for name, value in theirs.state_dict().items() if name in ours}
    assert set(loaded) == set(ours)
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)


# -- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_compile_has_one_graph_and_the_same_numbers(checkpointing: bool) -> None:
    model = new(num_hidden_layers=1)
    ids = batch()
    expected = gradients(model, ids)
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # Not bit-equal: a graph cannot look at the mask and so keeps the plain attention.
    torch.testing.assert_close(gradients(compiled, ids), expected, rtol=1e-4, atol=1e-6)


# -- dropout --------------------------------------------------------------------------------------


def assert_dropped(dropped: torch.Tensor, kept: torch.Tensor, rate: float) -> None:
    """Every row of `dropped` (M, n) is 0, or `kept` (M, n) scaled up; M of them at random."""
    zero = (dropped == 0).all(-1)
    torch.testing.assert_close(
        dropped[~zero], kept[~zero] / (1 - rate), rtol=2 * torch.finfo(kept.dtype).eps, atol=0
    )
    count, number = int(zero.sum()), len(zero)
    assert abs(count - rate * number) < SIGMAS * math.sqrt(number * rate * (1 - rate))


def test_attention_dropout_zeroes_single_probabilities_at_its_rate() -> None:
    # A token that sees only itself has probability 1 in each head, and the identity for o_proj
    # shows it: each head's output is v / (1 - rate), or 0.
    B, N, H = 4000, 4, 8
    torch.manual_seed(1)
    config = GemmaConfig(**{**CONFIG, "hidden_size": N * H, "attention_dropout": RATE})
    layer = Attention(config).requires_grad_(False)
    layer.o_proj.weight.copy_(torch.eye(N * H))
    x = torch.randn(B, 1, N * H)
    turns = rope(torch.zeros(B, 1, dtype=torch.int64), config)
    mask = torch.ones(B, 1, 1, dtype=torch.bool)
    kept, _, _ = layer.eval()(x, turns, mask, None, 0)
    dropped, probs, _ = layer.train()(x, turns, mask, None, 0)
    assert_dropped(dropped.reshape(B * N, H), kept.reshape(B * N, H), RATE)
    assert torch.equal(probs, torch.ones(B, N, 1, 1))  # those that are returned are not dropped
    both = (dropped.reshape(B, N, H) == 0).all(-1)[:, :2].all(-1)  # heads that share keys
    assert abs(int(both.sum()) - RATE**2 * B) < SIGMAS * math.sqrt(B * RATE**2 * (1 - RATE**2))


@pytest.mark.parametrize("rate", [None, RATE], ids=["default", "given"])
def test_classifier_dropout_zeroes_single_features_at_its_rate(rate: float | None) -> None:
    D = CONFIG["hidden_size"]
    model = new(GemmaForTokenClassification, num_labels=D, classifier_dropout=rate)
    with torch.no_grad():
        model.score.weight.copy_(torch.eye(D))  # the logits are the features themselves
        ids = batch(40, 30)
        kept, dropped = model.eval()(ids).logits, model.train()(ids).logits
    assert_dropped(dropped.reshape(-1, 1), kept.reshape(-1, 1), 0.1 if rate is None else rate)


def test_dropout_is_of_the_training_mode_only() -> None:
    model = new(attention_dropout=RATE)
    ids = batch()
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    quiet = model(ids).logits
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(model(ids).logits, quiet)
    assert torch.equal(new().train()(ids).logits, new().eval()(ids).logits)  # a rate of 0
    x = torch.ones(5)
    assert dropout(x, 0.0) is x


def test_the_backend_computes_without_dropout_whatever_the_mode() -> None:
    native = new(attention_dropout=RATE)
    model, inputs = TorchModel(native), ModelInputs.prepare(native.config, batch())
    expected = TorchModel(native.eval()).forward(inputs).logits
    native.train()
    native.model.layers[1].eval()  # a part that the user took out of training
    extended, _ = model.extend(inputs, model.init_cache(2, 9))
    assert torch.equal(model.forward(inputs).logits, expected)
    assert torch.allclose(extended.logits, expected, atol=1e-5)
    assert native.training
    assert native.model.layers[0].training
    assert not native.model.layers[1].training


# -- gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, RATE], ids=["plain", "dropout"])
def test_checkpointing_changes_no_bit_of_the_gradients(rate: float) -> None:
    model = new(attention_dropout=rate).train()
    ids = batch()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    assert equal(gradients(model, ids), expected)


def kept_bytes(model: Any, ids: torch.Tensor) -> int:
    """Memory that a forward pass keeps for the backward pass, each piece of it counted once."""
    pieces = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, ids)
    return sum(size for size, _ in pieces.values())


def test_checkpointing_keeps_one_array_a_layer() -> None:
    ids = batch(4, 32)
    few, many = new(num_hidden_layers=2), new(num_hidden_layers=6)
    layer_parameters = sum(p.nbytes for p in few.model.layers[0].parameters())
    plain = (kept_bytes(many, ids) - kept_bytes(few, ids)) / 4 - layer_parameters
    few.gradient_checkpointing_enable()
    many.gradient_checkpointing_enable()
    recomputed = (kept_bytes(many, ids) - kept_bytes(few, ids)) / 4
    assert recomputed == ids.numel() * CONFIG["hidden_size"] * 4  # the layer's float32 input
    assert plain > 10 * recomputed


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_the_switch(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new(kind)
    runs = []
    whole = gemma_hub_torch.model.remat
    monkeypatch.setattr(
        gemma_hub_torch.model, "remat", lambda layer: runs.append(layer) or whole(layer)
    )
    model(batch())
    assert not runs
    model.gradient_checkpointing_enable()
    model(batch())
    assert len(runs) == CONFIG["num_hidden_layers"]
    model.gradient_checkpointing_disable()
    model(batch())
    assert len(runs) == CONFIG["num_hidden_layers"]
