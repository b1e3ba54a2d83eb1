"""With the real reference: a wrong activation in one layer of one backend is found and named."""

import json
import math

import numpy as np
import pytest

from gemma_hub import parity
from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import ArrayWeights, parameter_shapes

numpy_backend = pytest.importorskip("gemma_hub_numpy.backend", reason="needs gemma-hub-numpy")
LAYERS = 4


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


class WrongBackend(numpy_backend.NumpyBackend):
    """The reference's arithmetic in float32, with the exact GELU in one layer."""

    def __init__(self, layer: int | None) -> None:
        self.layer = layer

    def build(self, config, task, weights, options):
        model = super().build(config, task, weights, options)
        reference, mlp = model.native, model.native.mlp

        def wrong_mlp(i, x):
            if i == self.layer:
                reference.activation = lambda x: reference.store(exact_gelu(x))
            try:
                return mlp(i, x)
            finally:
                vars(reference).pop("activation", None)

        reference.mlp = wrong_mlp
        return model


@pytest.fixture
def checkpoint(tmp_path):
    config = GemmaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        eos_token_id=5,
    )
    draw = np.random.default_rng(3).standard_normal
    arrays = {
        name: (0.25 * draw(shape)).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    save_checkpoint(tmp_path / "model", config, ArrayWeights(arrays))
    return tmp_path / "model"


@pytest.fixture
def with_backends(monkeypatch):
    """Serve `WrongBackend`s under their names beside the installed backends."""
    from gemma_hub.plugins.registry import PluginRegistry

    load = PluginRegistry.load

    def serve(**backends):
        def served(self, name=None):
            loaded = load(self, "numpy")
            if name not in backends:
                return loaded
            return type(loaded)(
                name=name,
                spec=loaded.spec,
                distribution="test",
                version="0",
                backend=backends[name],
            )

        monkeypatch.setattr(PluginRegistry, "load", served)

    return serve


@pytest.mark.parametrize(
    ("layer", "place"), [(0, "layer 0"), (2, "layer 2"), (LAYERS - 1, "final norm")]
)
def test_a_wrong_activation_is_found_in_its_layer(checkpoint, with_backends, layer, place):
    with_backends(right=WrongBackend(None), wrong=WrongBackend(layer))
    report = parity(checkpoint, ["right", "wrong"], texts=[[2, 9, 33, 8]], max_new_tokens=12)
    assert report.first_divergence == ("wrong", place)
    assert not report.passed
    for row in report.rows:
        assert row.cells["right"].passed
        assert 0.6 < row.cells["right"].ratio < 1.7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_backend_passes_from_a_checkpoint_without_a_tokenizer(
    checkpoint, with_backends, dtype, tmp_path
):
    with_backends(right=WrongBackend(None))
    report = parity(checkpoint, ["right"], dtype=dtype, max_new_tokens=8)
    assert report.passed, report.verdict
    report.to_json(tmp_path / "parity.json")
    values = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    assert values["passed"] is True
    assert values["dtype"] == dtype
    assert values["source"] == str(checkpoint)


def test_continuations_stop_where_the_checkpoint_says(checkpoint, with_backends):
    with_backends(right=WrongBackend(None))
    free = parity(checkpoint, ["right"], texts=[[2, 9, 33, 8]], max_new_tokens=12)
    stop = free.texts[0].greedy_token_ids[3]
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [stop]}), encoding="utf-8")
    stopped = parity(checkpoint, ["right"], texts=[[2, 9, 33, 8]], max_new_tokens=12)
    ids = stopped.texts[0].greedy_token_ids
    assert ids[-1] == stop
    assert stop not in ids[:-1]
    assert stopped.passed
