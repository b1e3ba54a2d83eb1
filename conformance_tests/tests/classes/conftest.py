"""Model classes of both frameworks beside those of transformers, on checkpoints it writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import gemma_hub_flax
import gemma_hub_torch
from gemma_hub.config import ARCHITECTURES

SHAPES: dict[str, dict[str, Any]] = {
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "gqa": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "mha": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0},
    },
}
VOCABULARY, WIDTH, PAD = 61, 40, 3


def transformers_model(task: str, shape: str, **changes: Any) -> Any:
    """A model of transformers with large weights, norms far from zero and eager attention."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 3e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "pad_token_id": PAD,
        "bos_token_id": 5,
        "eos_token_id": 1,
        "num_labels": 3,
    }
    config = transformers.GemmaConfig(**{**settings, **SHAPES[shape], **changes})
    config._attn_implementation = "eager"  # the one that returns attentions
    model = getattr(transformers, ARCHITECTURES[task])(config).eval()
    torch.manual_seed(sum(map(ord, shape)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.6, 2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                # The factor brings the largest logit to about 10.
                large = (
                    1.5 if "embed" in name or "lm_head" in name else 2.5 if "score" in name else 1
                )
                parameter.normal_(0, large * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Makes (a model of transformers, the folder that it saved itself to), each once."""
    made: dict[Any, tuple[Any, Path]] = {}

    def make(task: str, shape: str = "gqa", **changes: Any) -> tuple[Any, Path]:
        key = (task, shape, repr(changes))
        if key not in made:
            model = transformers_model(task, shape, **changes)
            path = tmp_path_factory.mktemp(f"{task}_{shape}")
            model.save_pretrained(path, max_shard_size="20KB")
            made[key] = model, path
        model, path = made[key]
        model.zero_grad()
        # transformers keeps what the labels of an earlier call meant.
        model.config.problem_type = changes.get("problem_type")
        return model, path

    return make


class Torch:
    """How a test speaks to the PyTorch classes."""

    name = "torch"

    def kind(self, task: str) -> Any:
        return getattr(gemma_hub_torch, ARCHITECTURES[task])

    def array(self, value: Any) -> torch.Tensor:
        array = np.asarray(value)
        return torch.tensor(array.astype(np.int64) if array.dtype.kind == "i" else array)

    def numpy(self, value: torch.Tensor) -> np.ndarray:
        return value.detach().to(torch.float32).numpy()

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        return {name: self.numpy(value) for name, value in model.named_parameters()}

    def gradients(self, model: Any, arrays: dict[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
        """As a training loop does it: a call with the defaults, and backward()."""
        model.zero_grad()
        loss = model(**arrays).loss
        loss.backward()
        return loss.item(), {name: self.numpy(p.grad) for name, p in model.named_parameters()}


@nnx.jit
def flax_loss_and_gradients(model: Any, arrays: dict[str, Any]) -> Any:
    return nnx.value_and_grad(lambda model: model(**arrays).loss)(model)


class Flax:
    """How a test speaks to the Flax classes."""

    name = "flax"

    def kind(self, task: str) -> Any:
        return getattr(gemma_hub_flax, f"Flax{ARCHITECTURES[task]}")

    def array(self, value: Any) -> jax.Array:
        return jnp.asarray(value)

    def numpy(self, value: jax.Array) -> np.ndarray:
        return np.asarray(value.astype(jnp.float32))

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        return self._named(nnx.state(model, nnx.Param))

    def gradients(self, model: Any, arrays: dict[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
        """As a training loop does it: nnx.value_and_grad of a call with the defaults."""
        loss, gradients = flax_loss_and_gradients(model, arrays)
        return float(loss), self._named(gradients)

    def _named(self, state: Any) -> dict[str, np.ndarray]:
        flat = nnx.to_flat_state(state)
        return {".".join(map(str, path)): self.numpy(leaf.get_value()) for path, leaf in flat}


class Models:
    """Models of one framework, each read once, and calls of them in NumPy."""

    def __init__(self, framework: Torch | Flax) -> None:
        self.framework = framework
        self.name = framework.name
        self._read: dict[Any, Any] = {}

    def read(self, task: str, path: Path, **options: Any) -> Any:
        """A model that the test may not change."""
        key = (task, path, repr(options))
        if key not in self._read:
            self._read[key] = self.framework.kind(task).from_pretrained(path, **options)
        return self._read[key]

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        """{name in the model: float32 array}; exact for the 16-bit types."""
        return self.framework.parameters(model)

    def arrays(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """NumPy arrays as the framework's own; the rest as it is."""
        return {
            name: self.framework.array(value) if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }

    def call(self, model: Any, **arguments: Any) -> Any:
        """The outputs of a call, all arrays but those of the cache in NumPy."""
        out = model(**self.arrays(arguments))
        return type(out)(**{name: self._converted(name, v) for name, v in out._asdict().items()})

    def _converted(self, name: str, value: Any) -> Any:
        if value is None or name == "past_key_values":
            return value
        if isinstance(value, tuple):
            return tuple(self.framework.numpy(entry) for entry in value)
        return self.framework.numpy(value)


_FRAMEWORKS = {"torch": Models(Torch()), "flax": Models(Flax())}


@pytest.fixture(params=_FRAMEWORKS)
def models(request: pytest.FixtureRequest) -> Models:
    """The classes of one framework."""
    return _FRAMEWORKS[request.param]


@pytest.fixture
def both() -> tuple[Models, Models]:
    """The classes of both frameworks."""
    return _FRAMEWORKS["torch"], _FRAMEWORKS["flax"]
