"""The loop over real models: the float64 reference, and the frameworks that are installed."""

import importlib.util

import numpy as np
import pytest

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub.plugins.registry import plugin_registry

CONFIG = GemmaConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=48,
    eos_token_id=None,
)
PROMPTS = [[2, 11, 40, 7, 7, 31], [2], [2, 5, 66]]
GREEDY = GenerationSettings(max_new_tokens=10, logprobs=True)
SAMPLED = GenerationSettings(max_new_tokens=10, temperature=0.9, top_k=30, top_p=0.9, seed=5)


def weights():
    """Large enough that every part of the model changes the tokens."""
    draw = np.random.default_rng(3).normal
    arrays = {name: draw(size=s) for name, s in parameter_shapes(CONFIG).items()}
    for name, array in arrays.items():
        array *= 0.3 if "norm" in name else array.shape[-1] ** -0.5
    return ArrayWeights({name: array.astype(np.float32) for name, array in arrays.items()})


def build(backend, dtype):
    if importlib.util.find_spec(f"gemma_hub_{backend}") is None:
        pytest.skip(f"gemma-hub-{backend} is not installed")
    pytest.importorskip(backend)
    loaded = plugin_registry().load(backend)
    return loaded.backend.build(CONFIG, TaskSpec(), weights(), BuildOptions(dtype=dtype))


@pytest.fixture(scope="module")
def reference():
    return build("numpy", "float64")


def ids(model, prompts, settings):
    return [row.token_ids for row in generate_ids(model, CONFIG, prompts, settings)]


def test_greedy_batches_equal_single_rows(reference):
    batch = generate_ids(reference, CONFIG, PROMPTS, GREEDY)
    for prompt, row in zip(PROMPTS, batch, strict=True):
        (alone,) = generate_ids(reference, CONFIG, [prompt], GREEDY)
        assert alone.token_ids == row.token_ids
        np.testing.assert_allclose(alone.logprobs, row.logprobs, atol=1e-9)
    assert len({row.token_ids for row in batch}) == 3


def test_samples_do_not_depend_on_the_other_rows(reference):
    batch = ids(reference, PROMPTS, SAMPLED)
    assert ids(reference, [[2, 9] * 6, PROMPTS[1]], SAMPLED)[1] == batch[1]
    assert ids(reference, PROMPTS[:1], SAMPLED) == batch[:1]


def test_the_cache_changes_nothing(reference):
    class Uncached:
        native, device = reference.native, reference.device
        forward, to_numpy = reference.forward, reference.to_numpy

    for settings in (GREEDY, SAMPLED):
        assert ids(Uncached(), PROMPTS, settings) == ids(reference, PROMPTS, settings)


@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_framework_gives_the_tokens_of_the_reference(reference, backend, settings):
    assert ids(build(backend, "float32"), PROMPTS, settings) == ids(reference, PROMPTS, settings)
