"""Small models with weights that make every part of Gemma matter."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.config import ARCHITECTURES, GemmaConfig
from gemma_hub.parameters import ArrayWeights, parameter_shapes

SMALL = GemmaConfig(
    vocab_size=131,
    hidden_size=48,  # not a square, and not heads * head_dim
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=3e-6,
    rope_theta=50_000.0,
    pad_token_id=3,
    eos_token_id=1,
    bos_token_id=5,
)


def draw_weights(config: GemmaConfig, seed: int = 0, task: str = "causal_lm") -> ArrayWeights:
    """Float32 weights: scores that spread, GELU inputs up to 4, norms far from zero and unlike."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in parameter_shapes(config, task).items():
        if name.endswith("norm.weight"):
            value = random.uniform(-0.6, 2.0, shape)
        elif name.endswith(".bias"):
            value = random.normal(size=shape) * 0.5
        else:
            value = random.normal(size=shape) / np.sqrt(shape[1])
        if name == "model.embed_tokens.weight":
            value *= np.exp(0.35 * random.normal(size=(shape[0], 1)))
            value[7] *= 1e-4  # a row so small that rms_norm_eps matters
        arrays[name] = value.astype(np.float32)
    return ArrayWeights(arrays)


@pytest.fixture(scope="session")
def make_config():
    return lambda **changes: dataclasses.replace(SMALL, **changes)


@pytest.fixture(scope="session")
def make_weights():
    return draw_weights


@pytest.fixture(scope="session")
def config():
    return SMALL


@pytest.fixture(scope="session")
def weights():
    return draw_weights(SMALL)


@pytest.fixture
def ids():
    """(3, 23) token ids, one of them the embedding row that is nearly zero."""
    ids = np.random.default_rng(1).integers(0, 131, (3, 23))
    ids[:, 4] = 7
    return ids


@pytest.fixture
def ragged_mask():
    """(3, 23): nothing padded, 9 on the left, 6 on the right."""
    mask = np.ones((3, 23), np.int64)
    mask[1, :9] = 0
    mask[2, 17:] = 0
    return mask


class TorchWithoutFloat32:
    """The module torch, with float64 under the names of float32."""

    def __init__(self, torch):
        self._torch = torch
        self.float = self.float32 = torch.float64

    def __getattr__(self, name):
        return getattr(self._torch, name)


@pytest.fixture
def double_precision(monkeypatch):
    """Transformers that computes in float64 wherever it would in float32.

    It computes RMSNorm, RoPE, softmax and losses in float32 even in a float64 model, so as it is it
    can confirm the reference to 1e-7 only. This turns exactly these upcasts into float64: inside
    the modules that hold Gemma, the names `torch.float` and `torch.float32` mean float64, and
    `Tensor.float()` is `Tensor.double()`. No formula is touched, and a test shows that the
    unchanged transformers agrees with the changed one up to float32 rounding.
    """
    torch = pytest.importorskip("torch")
    for name in ("models.gemma.modeling_gemma", "models.gemma2.modeling_gemma2"):
        module = pytest.importorskip(f"transformers.{name}")
        monkeypatch.setattr(module, "torch", TorchWithoutFloat32(torch))
    module = pytest.importorskip("transformers.modeling_rope_utils")
    monkeypatch.setattr(module, "torch", TorchWithoutFloat32(torch))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the embedding scale is a buffer of the default type
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def make_transformers():
    """(config, weights, task, dtype) to Transformers' own model of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(config, weights, task="causal_lm", dtype="float64"):
        raw = config.to_dict(task)
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
        rope |= config.rope_scaling or {}
        for key in ("architectures", "model_type", "rope_theta", "rope_scaling", "torch_dtype"):
            raw.pop(key)
        kind = getattr(transformers, ARCHITECTURES[task])
        model = kind(
            transformers.GemmaConfig(**raw, rope_parameters=rope, attn_implementation="eager")
        )
        model = model.to(getattr(torch, dtype)).eval()
        state = {name: torch.tensor(weights.read(name)) for name in weights.names()}
        if task == "base":
            state = {name.removeprefix("model."): value for name, value in state.items()}
        if task == "causal_lm" and config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        return model

    return make


@pytest.fixture
def run_transformers():
    """(model, inputs) to Transformers' outputs, with the loss where the inputs have labels."""
    torch = pytest.importorskip("torch")

    def run(model, inputs, **arguments):
        if inputs.labels is not None:
            is_whole = inputs.labels.dtype.kind == "i"
            labels = inputs.labels.astype(np.int64 if is_whole else np.float64)
            arguments |= {"labels": torch.tensor(labels)}
        if inputs.num_items_in_batch is not None:
            arguments |= {"num_items_in_batch": inputs.num_items_in_batch}
        return model(
            torch.tensor(inputs.input_ids.astype(np.int64)),
            attention_mask=torch.tensor(inputs.attention_mask.astype(np.int64)),
            position_ids=torch.tensor(inputs.position_ids.astype(np.int64)),
            output_hidden_states=inputs.output_hidden_states,
            output_attentions=inputs.output_attentions,
            **arguments,
        )

    return run
