"""Laws that the reference holds: caches, chunks, padding, windows, finite rows."""

import numpy as np
import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import ArrayWeights
from gemma_hub_numpy.backend import NumpyModel
from gemma_hub_numpy.model import Reference

WINDOWS = {
    "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    "sliding_window": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}


def extend_in_chunks(model, config, ids, mask, sizes):
    """Logits of `ids` fed in chunks of `sizes` through a cache."""
    cache = model.init_cache(len(ids), ids.shape[1] + 2)
    parts, start = [], 0
    for size in sizes:
        inputs = ModelInputs.prepare(
            config,
            ids[:, start : start + size],
            mask[:, start : start + size],
            next_position=cache.next_position,
        )
        outputs, cache = model.extend(inputs, cache)
        parts.append(outputs.logits)
        start += size
    assert cache.length == ids.shape[1]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["gemma 1", "windows and caps"])
@pytest.mark.parametrize(
    "sizes", [(10, *[1] * 13), (7, 9, 7), (3,) * 7 + (2,), (23,)], ids=lambda sizes: str(len(sizes))
)
def test_a_cache_changes_nothing(changes, sizes, make_config, make_weights, ids, ragged_mask):
    config = make_config(**changes)
    model = NumpyModel(Reference(config, make_weights(config)))
    full = model.forward(ModelInputs.prepare(config, ids, ragged_mask)).logits
    chunked = extend_in_chunks(model, config, ids, ragged_mask, sizes)
    real = ragged_mask.astype(bool)
    np.testing.assert_allclose(chunked[real], full[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["gemma 1", "windows and caps"])
def test_padding_anywhere_changes_nothing(changes, make_config, make_weights, ids):
    config = make_config(**changes)
    model = Reference(config, make_weights(config))
    alone = model.run(ModelInputs.prepare(config, ids[:1, :11])).logits[0]
    for kept in (range(12, 23), range(11), [0, 1, 2, 3, 9, 10, 11, 15, 16, 17, 22]):
        padded, mask = np.full((1, 23), 3), np.zeros((1, 23), int)
        padded[0, list(kept)], mask[0, list(kept)] = ids[0, :11], 1
        logits = model.run(ModelInputs.prepare(config, padded, mask)).logits[0]
        np.testing.assert_allclose(logits[list(kept)], alone, rtol=0, atol=1e-12)


def test_a_window_reaches_exactly_its_number_of_tokens(make_config, make_weights, ids):
    config = make_config(num_hidden_layers=1, layer_types=("sliding_attention",), sliding_window=5)
    model = Reference(config, make_weights(config))
    before = model.run(ModelInputs.prepare(config, ids)).logits
    ids[:, 6] = (ids[:, 6] + 1) % 131
    moved = np.abs(model.run(ModelInputs.prepare(config, ids)).logits - before).max(axis=(0, 2)) > 0
    assert np.flatnonzero(moved).tolist() == [6, 7, 8, 9, 10]


def test_a_soft_cap_comes_before_the_mask(make_config, make_weights, ids):
    config = make_config(attn_logit_softcapping=2.0)
    model = Reference(config, make_weights(config))
    before = model.run(ModelInputs.prepare(config, ids)).logits
    ids[:, 15] = (ids[:, 15] + 1) % 131
    after = model.run(ModelInputs.prepare(config, ids)).logits
    np.testing.assert_array_equal(after[:, :15], before[:, :15])  # a capped mask would let it leak


def test_rows_that_see_nothing_are_finite(config, weights, ids):
    mask = np.ones((3, 23), int)
    mask[0] = 0
    mask[1, :5] = 0
    inputs = ModelInputs.prepare(config, ids, mask, output_hidden_states=True)
    outputs = Reference(config, weights).run(inputs)
    assert np.isfinite(outputs.logits).all()
    assert all(np.isfinite(state).all() for state in outputs.hidden_states)


def test_embeddings_instead_of_ids(config, weights, ids):
    table = weights.read("model.embed_tokens.weight")
    model = Reference(config, weights)
    from_ids = model.run(ModelInputs.prepare(config, ids)).logits
    from_embeddings = model.run(ModelInputs.prepare(config, inputs_embeds=table[ids])).logits
    np.testing.assert_array_equal(from_embeddings, from_ids)


@pytest.mark.parametrize("keep", [1, 4, 23, 40])
def test_logits_to_keep(keep, config, weights, ids):
    model = Reference(config, weights)
    full = model.run(ModelInputs.prepare(config, ids)).logits
    kept = model.run(ModelInputs.prepare(config, ids, logits_to_keep=keep)).logits
    assert kept.shape == (3, min(keep, 23), 131)
    np.testing.assert_allclose(kept, full[:, -keep:], rtol=0, atol=1e-13)


def test_the_norm_offset_is_read(make_config, make_weights, ids):
    offset, plain = make_config(), make_config(rms_norm_offset=0.0)
    weights = make_weights(offset)
    shifted = {name: weights.read(name) for name in weights.names()}
    for name in shifted:
        if name.endswith("norm.weight"):
            shifted[name] = shifted[name].astype(np.float64) + 1.0
    expected = Reference(offset, weights).run(ModelInputs.prepare(offset, ids)).logits
    actual = Reference(plain, ArrayWeights(shifted)).run(ModelInputs.prepare(plain, ids)).logits
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_weights_of_any_type_are_read_exactly(config, weights, ids):
    halves = {name: weights.read(name).astype(np.float16) for name in weights.names()}
    doubles = {name: value.astype(np.float64) for name, value in halves.items()}
    inputs = ModelInputs.prepare(config, ids)
    np.testing.assert_array_equal(
        Reference(config, ArrayWeights(halves)).run(inputs).logits,
        Reference(config, ArrayWeights(doubles)).run(inputs).logits,
    )


class CountingWeights(ArrayWeights):
    """Counts how often each tensor is read."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.reads = []

    def read(self, name, index=None):
        self.reads.append(name)
        return super().read(name, index)


def test_a_large_model_is_read_part_by_part(config, weights, ids, monkeypatch):
    counting = CountingWeights({name: weights.read(name) for name in weights.names()})
    inputs = ModelInputs.prepare(config, ids)
    expected = Reference(config, weights).run(inputs).logits
    monkeypatch.setattr("gemma_hub_numpy.arithmetic._KEEP_BYTES", 0)
    monkeypatch.setattr("gemma_hub_numpy.heads._VOCABULARY_BLOCK", 50)
    model = Reference(config, counting)
    for _ in range(2):
        np.testing.assert_allclose(model.run(inputs).logits, expected, rtol=0, atol=1e-13)
    assert counting.reads.count("model.layers.0.mlp.up_proj.weight") == 2  # nothing was kept
    # Each row that is looked up, and three blocks.
    rows = len(np.unique(ids))
    assert counting.reads.count("model.embed_tokens.weight") == 2 * (rows + 3)


def test_a_small_model_is_read_once(config, weights, ids):
    counting = CountingWeights({name: weights.read(name) for name in weights.names()})
    model = Reference(config, counting)
    for _ in range(2):
        model.run(ModelInputs.prepare(config, ids))
    assert sorted(counting.reads) == sorted(counting.names())


def test_the_released_models_are_too_large_to_keep(weights):
    assert not Reference(GemmaConfig.preset("gemma-2b"), weights)._small
