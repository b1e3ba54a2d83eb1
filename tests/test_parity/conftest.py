"""A layered model without a framework, right or wrong in one place, and a registry that has it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from gemma_hub.backend import Cache
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import BackendNotFoundError, PluginError
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import ArrayWeights
from gemma_hub.parity.compare import compare
from gemma_hub.parity.report import ParityReport
from gemma_hub.parity.texts import prompts
from gemma_hub.plugins.spec import BackendSpec

LAYERS, WIDTH, VOCABULARY = 4, 24, 40
ROUNDING = 2.0**-24


class LayeredModel:
    """Running means of embeddings through residual layers; each place can be made wrong by name."""

    device = "fake:0"

    def __init__(self, rounding: float, seed: int, wrong_at: str | None) -> None:
        draw = np.random.default_rng(0).standard_normal
        self.native = self
        self.table = draw((VOCABULARY, WIDTH))
        self.layers = draw((LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
        self.rounding, self.seed, self.wrong_at = rounding, seed, wrong_at

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        assert inputs.input_ids is not None
        return self.outputs(inputs.input_ids, inputs.attention_mask, inputs)

    def outputs(self, ids: np.ndarray, mask: np.ndarray, inputs: ModelInputs) -> ModelOutputs:
        random = np.random.default_rng(self.seed)

        def stored(x: np.ndarray, place: str) -> np.ndarray:
            if place == self.wrong_at:
                x = x * np.where(np.arange(x.shape[-1]) % 2, 1.0, 1.0 + 1e-3)
            return x * (1 + self.rounding * random.uniform(-1, 1, x.shape))

        counts = np.maximum(np.cumsum(mask, axis=1), 1)[..., None]
        sums = np.cumsum(np.where(mask[..., None], self.table[ids], 0.0), axis=1)
        x = stored(sums / counts, "embedding")
        states = [x]
        for i, weight in enumerate(self.layers):
            x = stored(x + np.tanh(x @ weight), f"layer {i}")
            states.append(x)
        states[-1] = stored(x / (1 + np.linalg.norm(x, axis=-1, keepdims=True)), "final norm")
        logits = stored(4 * states[-1] @ self.table.T, "logits")[:, -inputs.logits_to_keep :]
        return ModelOutputs(logits, tuple(states))

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array


class CachedModel(LayeredModel):
    """The same with a cache, which at "cache" forgets the first token."""

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        ids = np.zeros((batch_size, max_length), np.int64)
        return Cache.empty(ids, batch_size, max_length)

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        valid, ids = cache.admit(inputs), cache.arrays
        end = cache.length + inputs.shape[1]
        ids[:, cache.length : end] = inputs.input_ids
        seen = valid.copy()
        if self.wrong_at == "cache" and cache.length:
            seen[np.arange(len(seen)), valid.argmax(axis=1)] = False
        return self.outputs(ids[:, :end], seen[:, :end], inputs), cache.advanced(inputs, ids)


class FakeBackend:
    """Builds `LayeredModel`s: exact, a witness, or a candidate that may be wrong."""

    def __init__(self, wrong_at: str | None = None, error: Exception | None = None) -> None:
        self.wrong_at, self.error = wrong_at, error
        self.built: list[Any] = []

    def devices(self) -> tuple[str, ...]:
        return ("fake:0",)

    def build(self, config, task, weights, options):
        self.built.append(options)
        if self.error is not None:
            raise self.error
        if options.dtype == "float64":
            return LayeredModel(0.0, 0, None)
        if "witness" in options.extra:
            return LayeredModel(ROUNDING, options.extra["witness"], None)
        return CachedModel(ROUNDING, 1000, self.wrong_at)


@dataclass(frozen=True)
class Loaded:
    backend: Any
    spec: BackendSpec
    distribution: str = "gemma-hub-fake"
    version: str = "1.2.3"


@dataclass
class FakeRegistry:
    """Backends by name; an exception in place of one is raised when it is loaded."""

    backends: dict[str, Any] = field(default_factory=lambda: {"numpy": FakeBackend()})

    def load(self, name: str | None = None) -> Loaded:
        assert name is not None
        if name not in self.backends:
            raise BackendNotFoundError(f"There is no backend {name!r}.")
        backend = self.backends[name]
        if isinstance(backend, PluginError):
            raise backend
        spec = BackendSpec(name=name, api_version="1.0", factory="x:y", requires=("numpy>=1",))
        return Loaded(backend, spec)


@pytest.fixture
def config() -> GemmaConfig:
    return GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=32,
        eos_token_id=None,
    )


@pytest.fixture
def run(config):
    """`run({"name": backend}, **arguments)` gives the report; "numpy" is there already."""

    def compared(offered: dict[str, Any], /, **arguments: Any) -> ParityReport:
        registry = arguments.pop("registry", FakeRegistry())
        registry.backends |= offered
        texts = arguments.pop("texts", None)
        given = {
            "source": "fake",
            "backends": list(offered),
            "dtype": "float32",
            "device": "auto",
            "max_new_tokens": 6,
            "witnesses": 6,
            "seed": 3,
            "eos_token_ids": (),
            "tokenizer": None,
            "progress": None,
        } | arguments
        asked = prompts(texts, config, given["tokenizer"], given["max_new_tokens"])
        return compare(registry, config, ArrayWeights({}), asked, **given)

    return compared


@pytest.fixture
def backend():
    """`backend(wrong_at=..., error=...)` makes a fake one."""
    return FakeBackend


@pytest.fixture
def registry():
    """`registry({name: backend})` makes a fake one."""
    return FakeRegistry
