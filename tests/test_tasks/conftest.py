"""A model with every head, in NumPy, behind each task; nothing of it is Gemma but the contract."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub.plugins.registry import LoadedBackend
from gemma_hub.plugins.spec import BackendSpec
from gemma_hub.tasks.causal_lm import CausalLM
from gemma_hub.tasks.embedding import BaseModel
from gemma_hub.tasks.sequence_classification import SequenceClassifier
from gemma_hub.tasks.token_classification import TokenClassifier

CLASSES = {kind.task: kind for kind in (CausalLM, BaseModel, SequenceClassifier, TokenClassifier)}


class HeadModel:
    """Features that depend on every real token so far and its position, and a head over them.

    Attributes:
        calls: the inputs of every call, in order.
    """

    device = "fake:0"

    def __init__(self, config, task, weights):
        self.native = self
        self.config, self.task, self.weights = config, task, weights
        self.calls = []

    def to_numpy(self, array):
        return np.asarray(array)

    def features(self, inputs):
        """(B, T, D)."""
        embeddings = self.weights.read("model.embed_tokens.weight").astype(np.float64)
        turned = np.cos(inputs.position_ids[..., None] * np.arange(1.0, embeddings.shape[1] + 1))
        real = np.where(inputs.attention_mask[..., None], embeddings[inputs.input_ids] * turned, 0)
        # Padding has features too, and large ones: who takes them for a token's is found out.
        return np.where(inputs.attention_mask[..., None], np.tanh(np.cumsum(real, axis=1)), 1e3)

    def forward(self, inputs):
        self.calls.append(inputs)
        x = self.features(inputs)
        if self.task == "base":
            return ModelOutputs(last_hidden_state=x.astype(np.float32))
        head = "model.embed_tokens" if self.task == "causal_lm" else "score"
        if self.task == "sequence_classification":
            x = x[np.arange(len(x)), inputs.pooled_positions]
        logits = x @ self.weights.read(f"{head}.weight").T.astype(np.float64)
        if self.task == "token_classification":
            logits = logits + self.weights.read("score.bias")
        loss = None if inputs.labels is None else np.float32(inputs.labels.sum())
        return ModelOutputs(logits.astype(np.float32), loss=loss)

    def loss_and_gradients(self, inputs):
        loss = float(self.forward(inputs).loss)
        shapes = parameter_shapes(self.config, self.task)
        return loss, {name: np.full(shape, loss) for name, shape in shapes.items()}

    def export(self):
        return self.weights


FEATURES = frozenset({"export", "gradients", "attentions", "inputs_embeds"})


@pytest.fixture
def text_config(tokenizer) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=6,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        id2label={0: "noun", 1: "verb", 2: "other"},
    )


@pytest.fixture
def build(text_config, tokenizer):
    """build(task, features=..., model=..., **config fields): a task over a `HeadModel`."""

    def build(task, *, features=FEATURES, model=HeadModel, tokenizer=tokenizer, **changes):
        config = dataclasses.replace(text_config, **changes)
        draw = np.random.default_rng(3).normal
        shapes = parameter_shapes(config, task).items()
        weights = ArrayWeights({n: draw(size=shape).astype(np.float32) for n, shape in shapes})
        spec = BackendSpec(name="fake", api_version="1.0", factory="f:F", features=features)
        backend = LoadedBackend(
            name="fake", spec=spec, distribution="fake-dist", version="1.2", backend=None
        )
        made = model(config, task, weights)
        return CLASSES[task](made, config, backend=backend, dtype="float32", tokenizer=tokenizer)

    return build
