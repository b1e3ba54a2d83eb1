"""What a golden pack says is right: against Transformers, autograd, and programs under test.

Transformers computes norms, rotary angles and the softmax in float32 also where its weights are
float64; `in_float64` lifts that, so that the two agree to the last digits of float64.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs
from gemma_hub.plugins.registry import plugin_registry
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.packs import UNITS, check_pack, write_pack
from gemma_hub_conformance.packs.catalogue import GRADIENT, activations
from gemma_hub_conformance.packs.recording import run
from gemma_hub_numpy.model import Reference, Witness

FLOAT32 = [name for name in UNITS if name.endswith("float32")]
AGREE = 1e-10  # of a tensor's largest value; float64 in another order of sums gives about 1e-14


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole pack."""
    folder = tmp_path_factory.mktemp("golden") / "pack"
    write_pack(folder)
    return folder


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype: softmax(x, dim, torch.float64)
    )


def tensors_of(pack: Path, unit: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and expected results."""
    return load_file(pack / unit / "inputs.safetensors"), load_file(
        pack / unit / "expected.safetensors"
    )


MODULES = {
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "attention_output",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
"""Modules of a layer in Transformers and in the torch backend, and the pack's names for them."""


class Recorder:
    """Outputs of modules by the pack's names, from forward hooks on a model in torch."""

    def __init__(self, model: Any, config: Any) -> None:
        self.found: dict[str, np.ndarray] = {}
        for i, layer in enumerate(model.model.layers):
            for name, ours in MODULES.items():
                module = layer.get_submodule(name)
                module.register_forward_hook(self.hook(f"layers.{i}.{ours}", config, ours))

    def hook(self, name: str, config: Any, kind: str) -> Any:
        def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            value = output.detach().double().numpy().copy()
            if kind in ("q", "k", "v"):
                value = value.reshape(*value.shape[:2], -1, config.head_dim)
            self.found[name] = value

        return note


# -- Transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", FLOAT32)
@pytest.mark.usefixtures("in_float64")
def test_transformers_and_autograd_agree_in_float64(pack: Path, unit: str) -> None:
    inputs, expected = tensors_of(pack, unit)
    model = transformers.GemmaForCausalLM.from_pretrained(
        pack / unit, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    recorder = Recorder(model, model.config)
    found = {}
    losses = []
    for number, labels in enumerate(inputs["labels"]):
        outputs = model(
            torch.tensor(inputs["input_ids"]).long(),
            attention_mask=torch.tensor(inputs["attention_mask"]),
            position_ids=torch.tensor(inputs["position_ids"]).long(),
            labels=torch.tensor(labels).long(),
            output_hidden_states=True,
            output_attentions=True,
        )
        losses.append(outputs.loss.item())
        if number == 0:
            outputs.loss.backward()
            found = recorder.found | from_outputs(outputs)
            found |= {GRADIENT + n: p.grad.numpy() for n, p in model.named_parameters()}
    found["losses"] = np.array(losses)
    mask = inputs["attention_mask"] == 1
    for name, value in found.items():
        assert_agree(name, value, expected[name], mask)
    layers = model.config.num_hidden_layers
    absent = ("q_rotated", "k_rotated", "attention_mixed", "attention_residual", "activation")
    left = {name for name in expected if name not in found}
    assert left == {
        *(f"layers.{i}.{name}" for i in range(layers) for name in (*absent, "product")),
        f"layers.{layers - 1}.output",
        "greedy_tokens",
        "sampled_tokens",
    }


def from_outputs(outputs: Any) -> dict[str, np.ndarray]:
    """The pack's names of what a model in Transformers returns."""
    states = [state.detach().numpy() for state in outputs.hidden_states]
    return {
        "embedding": states[0],
        **{f"layers.{i}.output": state for i, state in enumerate(states[1:-1])},
        **{
            f"layers.{i}.attention_probs": probs.detach().numpy()
            for i, probs in enumerate(outputs.attentions)
        },
        "final_norm": states[-1],
        "logits": outputs.logits.detach().numpy(),
    }


def assert_agree(name: str, found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> None:
    assert found.shape == expected.shape, name
    if name.endswith("attention_probs"):
        found, expected = np.moveaxis(found, 1, 2)[mask], np.moveaxis(expected, 1, 2)[mask]
    elif expected.shape[:2] == mask.shape:
        found, expected = found[mask], expected[mask]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < AGREE, f"{name}: {error}"


@pytest.mark.parametrize("unit", FLOAT32)
def test_the_rest_follows_by_its_formula(pack: Path, unit: str) -> None:
    """What Transformers does not show, by plain formulas from what it does."""
    inputs, x = tensors_of(pack, unit)
    config = json.loads((pack / unit / "config.json").read_text("utf-8"))
    mask, H = inputs["attention_mask"] == 1, config["head_dim"]
    theta = config["rope_theta"] ** (-2.0 * np.arange(H // 2) / H)
    turn = np.exp(1j * inputs["position_ids"][..., None] * theta)[:, :, None]
    last = config["num_hidden_layers"] - 1
    for i in range(last + 1):
        at = {name.removeprefix(f"layers.{i}."): v for name, v in x.items()}
        before = x["embedding"] if i == 0 else x[f"layers.{i - 1}.output"]
        for which in "qk":
            pairs = at[which][..., : H // 2] + 1j * at[which][..., H // 2 :]
            turned = pairs * turn
            expected = np.concatenate([turned.real, turned.imag], -1)
            assert_agree(f"{which}_rotated", at[f"{which}_rotated"], expected, mask)
        groups = at["q"].shape[2] // at["v"].shape[2]
        values = np.repeat(at["v"], groups, axis=2)
        mixed = np.einsum("bnts,bsnh->btnh", at["attention_probs"], values)
        flat = mixed.reshape(*mixed.shape[:2], -1)
        assert_agree("attention_mixed", at["attention_mixed"], flat, mask)
        residual = before + at["attention_output"]
        assert_agree("attention_residual", at["attention_residual"], residual, mask)
        gelu = torch.nn.functional.gelu(torch.tensor(at["gate"]), approximate="tanh").numpy()
        assert_agree("activation", at["activation"], gelu, mask)
        assert_agree("product", at["product"], at["activation"] * at["up"], mask)
        assert_agree("output", at["output"], at["attention_residual"] + at["down"], mask)


@pytest.mark.parametrize("unit", list(UNITS))
def test_transformers_generates_the_greedy_tokens(pack: Path, unit: str) -> None:
    inputs, expected = tensors_of(pack, unit)
    model = transformers.GemmaForCausalLM.from_pretrained(pack / unit, dtype=torch.float64).eval()
    tokens = model.generate(
        torch.tensor(inputs["prompts"]).long(),
        attention_mask=torch.tensor(inputs["prompt_mask"]),
        max_new_tokens=expected["greedy_tokens"].shape[1],
        do_sample=False,
        eos_token_id=None,
    )
    found = tokens[:, inputs["prompts"].shape[1] :].numpy()
    certain = expected["greedy_tokens"] >= 0
    assert certain[:, 0].all(), "the first token of every prompt is compared"
    assert unit == "untied-bfloat16" or certain.all()
    assert unit == "untied-bfloat16" or (expected["sampled_tokens"] >= 0).mean() > 0.9
    assert (found == expected["greedy_tokens"])[certain].all()


# -- those who use it ------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", list(UNITS))
def test_the_torch_backend_is_judged_right(pack: Path, unit: str, tmp_path: Path) -> None:
    inputs, _ = tensors_of(pack, unit)
    dtype = UNITS[unit][1]
    checkpoint = open_checkpoint(pack / unit)
    model = (
        plugin_registry()
        .load("torch")
        .backend.build(
            checkpoint.config, TaskSpec("causal_lm"), checkpoint.weights, BuildOptions(dtype=dtype)
        )
    )
    recorder = Recorder(model.native, checkpoint.config)
    prepared = prepared_inputs(checkpoint.config, inputs, output_hidden_states=True)
    outputs = model.forward(prepared).to_numpy()
    found = {name: value.astype(np.float32) for name, value in recorder.found.items()}
    states = outputs.hidden_states
    found |= {"embedding": states[0], "final_norm": states[-1], "logits": outputs.logits}
    found |= {f"layers.{i}.output": state for i, state in enumerate(states[1:-1])}
    losses = []
    for number, labels in enumerate(inputs["labels"]):
        batch = prepared_inputs(checkpoint.config, inputs, labels=labels)
        loss, gradients = model.loss_and_gradients(batch)
        losses.append(loss)
        if number == 0:
            found |= {GRADIENT + name: model.to_numpy(g) for name, g in gradients.items()}
    found["losses"] = np.array(losses, np.float32)
    found |= generated(model, checkpoint.config, inputs, samplings(pack, unit))
    save(tmp_path / f"{unit}.safetensors", found)
    report = check_pack(pack, tmp_path, [unit])
    wrong = [each for each in report.units[0].results if not each.passed]
    assert report.exit_code == 0, wrong
    assert len(report.units[0].results) == len(found)
    judged = [each for each in report.units[0].results if each.ratio is not None]
    assert max(each.ratio for each in judged) < 3
    # Neither number is that of noise which was measured too large or too small.
    assert 0.5 < np.median([each.ratio for each in judged]) < 2
    assert 0.5 < np.median([each.worst_ratio for each in judged]) < 2


def prepared_inputs(config: Any, inputs: dict[str, np.ndarray], **wanted: Any) -> ModelInputs:
    given = (inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    return ModelInputs.prepare(config, *given, **wanted)


def samplings(pack: Path, unit: str) -> list[dict[str, Any]]:
    return json.loads((pack / "manifest.json").read_text("utf-8"))["units"][unit]["samplings"]


def generated(
    model: Any, config: Any, inputs: dict[str, np.ndarray], drawn: list[dict[str, Any]]
) -> dict[str, np.ndarray]:
    prompts = [
        row[keep == 1].tolist()
        for row, keep in zip(inputs["prompts"], inputs["prompt_mask"], strict=True)
    ]
    count = inputs["uniforms"].shape[-1]
    rows = []
    for settings in ({"temperature": 0.0}, *drawn):
        settings = GenerationSettings(max_new_tokens=count, eos_token_id=(), **settings)
        results = generate_ids(model, config, prompts, settings)
        rows.append([result.token_ids for result in results])
    return {"greedy_tokens": np.array(rows[0]), "sampled_tokens": np.array(rows[1:])}


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)


def recorded(kind: type[Reference], pack: Path, unit: str) -> dict[str, np.ndarray]:
    """What a port with the bug of `kind` would write for one unit."""
    inputs, _ = tensors_of(pack, unit)
    checkpoint = open_checkpoint(pack / unit)
    model = kind(checkpoint.config, checkpoint.weights)
    tape, gradients = run(
        model, prepared_inputs(checkpoint.config, inputs, labels=inputs["labels"][0])
    )
    found = {GRADIENT + name: value for name, value in gradients.items()}
    for spec in activations(checkpoint.config, *inputs["input_ids"].shape):
        found[spec.name] = tape[spec.tape].reshape(spec.shape)
    return {name: value.astype(np.float32) for name, value in found.items()}


MUTANTS = {
    "emb-scale-missing": ("gqa", "embedding"),
    "emb-scale-int-floor": ("gqa", "embedding"),
    "norm-without-offset": ("mqa", "layers.0.input_norm"),
    "norm-eps-outside-sqrt": ("gqa", "layers.0.input_norm"),
    "norm-in-bf16": ("untied", "layers.0.input_norm"),
    "norm-order-swapped": ("gqa", "layers.0.input_norm"),
    "attn-kv-swapped": ("gqa", "layers.0.k"),
    "attn-bias-dropped": ("bias", "layers.0.q"),
    "attn-output-bias-dropped": ("bias", "layers.0.attention_output"),
    "rope-interleaved": ("mha", "layers.0.q_rotated"),
    "rope-theta-hardcoded": ("gqa", "layers.0.q_rotated"),
    "rope-keys-backwards": ("gqa", "layers.0.k_rotated"),
    "rope-on-v": ("mqa", "layers.0.v"),
    "positions-ignored": ("gqa", "layers.0.q_rotated"),
    "attn-scale-hidden": ("gqa", "layers.0.attention_probs"),
    "attn-gqa-order": ("gqa", "layers.0.attention_probs"),
    "attn-causal-off-by-one": ("mha", "layers.0.attention_probs"),
    "pad-attended-prefill": ("gqa", "layers.0.attention_probs"),
    "attn-head-layout-o": ("gqa", "layers.0.attention_mixed"),
    "mlp-gelu-erf": ("gqa", "layers.0.activation"),
    "mlp-gelu-constant": ("mqa", "layers.0.activation"),
    "head-tie-overrides-untied": ("untied", "logits"),
    "head-logits-in-bf16": ("gqa", "logits"),
    "grad-norm-root-constant": ("gqa", "gradients.model.layers.2.mlp.down_proj.weight"),
    "grad-gelu-erf": ("mqa", "gradients.model.layers.1.mlp.gate_proj.weight"),
    "grad-shared-head-mean": ("mqa", "gradients.model.layers.1.self_attn.v_proj.weight"),
    "grad-heads-reversed": ("mha", "gradients.model.layers.1.self_attn.v_proj.weight"),
    "grad-key-bias-zero": ("bias", "gradients.model.layers.1.self_attn.k_proj.bias"),
    "grad-tied-without-head": ("gqa", "gradients.model.embed_tokens.weight"),
}
"""{bug: (model, the first tensor that it changes)}."""


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_bug_is_named_by_the_first_tensor_that_it_changes(
    name: str, pack: Path, tmp_path: Path
) -> None:
    checkpoint, first = MUTANTS[name]
    unit = f"{checkpoint}-float32"
    save(tmp_path / f"{unit}.safetensors", recorded(all_mutants()[name].kind, pack, unit))
    report = check_pack(pack, tmp_path, [unit])
    wrong = report.units[0].first_wrong
    assert report.exit_code == 1
    assert wrong is not None
    assert (wrong.name, report.units[0].between) == (first, ())


def test_the_reference_itself_is_right_everywhere(pack: Path, tmp_path: Path) -> None:
    for unit in FLOAT32:
        save(tmp_path / f"{unit}.safetensors", recorded(Reference, pack, unit))
    report = check_pack(pack, tmp_path)
    assert report.exit_code == 0, report.summary
    assert report.summary.endswith(f"are right, units: {', '.join(sorted(FLOAT32))}")


@pytest.fixture
def fresh_witness() -> type[Reference]:
    """A right implementation whose rounding the pack's noise was not made from."""

    class Fresh(Witness):
        def __init__(self, config: Any, weights: Any) -> None:
            super().__init__(config, weights, weights.dtype("model.norm.weight"), 424242)

    return Fresh


@pytest.mark.parametrize("unit", list(UNITS))
def test_another_rounding_is_right(
    unit: str, pack: Path, tmp_path: Path, fresh_witness: type[Reference]
) -> None:
    save(tmp_path / f"{unit}.safetensors", recorded(fresh_witness, pack, unit))
    report = check_pack(pack, tmp_path, [unit])
    assert report.exit_code == 0, [each for each in report.units[0].results if not each.passed]


def test_the_pack_is_small_and_a_checkpoint_for_every_unit(pack: Path) -> None:
    size = sum(file.stat().st_size for file in pack.rglob("*") if file.is_file())
    assert 20_000_000 < size < 30_000_000
    for unit, (_, dtype) in UNITS.items():
        assert open_checkpoint(pack / unit).dtype == dtype
