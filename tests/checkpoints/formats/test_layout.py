"""Places and the mapping table: every parameter somewhere, once, and back bit for bit."""

import math

import numpy as np
import pytest

from gemma_hub.checkpoints.formats.layout import (
    Place,
    canonical_weights,
    homeless,
    stored_weights,
)
from gemma_hub.checkpoints.formats.table import TABLE, layout, markdown, stacked
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

FORMATS = ["gemma_pytorch", "orbax", "keras", "gguf", "flax_msgpack", "stacked"]
PADDED = ("gemma_pytorch", "orbax", "stacked")


def layout_of(name):
    if name == "stacked":
        return stacked(layout("orbax"), "layer_{i}", "stacked_layers/attention_type_0")
    return layout(name)


@pytest.fixture(params=FORMATS)
def name(request):
    return request.param


def stored(opened, name, **options):
    weights = stored_weights(opened.weights, layout_of(name), opened.config, **options)
    return ArrayWeights({tensor: weights.read(tensor) for tensor in weights.names()})


# GGUF folds its norms in float32, which its own tests are about.
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "gguf"])
def test_there_and_back(any_opened, name, assert_same):
    pad = 64 if name in PADDED else None
    weights = stored(any_opened, name, pad_vocab_to=pad)
    back, dropped = canonical_weights("x", weights, layout_of(name), any_opened.config)
    assert_same(back, any_opened.weights)
    assert list(dropped.values()) == (["rows past vocab_size, for padding"] if pad else [])


def test_what_is_announced_is_what_is_read(any_opened, name):
    weights = stored_weights(any_opened.weights, layout_of(name), any_opened.config)
    for tensor in weights.names():
        array = weights.read(tensor)
        assert (array.shape, array.dtype.name) == (weights.shape(tensor), weights.dtype(tensor))


def test_every_parameter_is_written_once_and_nothing_else(any_opened, name):
    weights = stored_weights(any_opened.weights, layout_of(name), any_opened.config)
    parameters = [p for tensor in weights.names() for p in weights.parameters(tensor)]
    assert sorted(parameters) == sorted(any_opened.weights.names())
    written = sum(math.prod(weights.shape(tensor)) for tensor in weights.names())
    assert written == sum(map(math.prod, parameter_shapes(any_opened.config).values()))


def test_fused_rows_are_query_key_value(make_opened):
    opened = make_opened("gqa")
    fused = stored(opened, "gemma_pytorch").read("model.layers.1.self_attn.qkv_proj.weight")
    read = opened.weights.read
    parts = [read(f"model.layers.1.self_attn.{x}_proj.weight") for x in "qkv"]
    assert np.array_equal(fused, np.concatenate(parts))


def test_einsum_weights_compute_the_same(make_opened):
    opened = make_opened("gqa")
    config, weights = opened.config, stored(opened, "orbax")
    read = opened.weights.read
    x = np.random.default_rng(3).normal(size=(5, config.hidden_size)).astype(np.float32)

    def heads(name):
        rows = x @ read(f"model.layers.0.self_attn.{name}_proj.weight").T
        return rows.reshape(5, -1, config.head_dim)

    q = np.einsum("td,ndh->tnh", x, weights.read("layer_0/attn/q_einsum/w"))
    k, v = np.einsum("sd,ckdh->cskh", x, weights.read("layer_0/attn/kv_einsum/w"))
    for found, expected in ((q, heads("q")), (k, heads("k")), (v, heads("v"))):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    out = np.einsum("tnh,nhd->td", q, weights.read("layer_0/attn/attn_vec_einsum/w"))
    expected = q.reshape(5, -1) @ read("model.layers.0.self_attn.o_proj.weight").T
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    gate, up = np.einsum("td,cdf->ctf", x, weights.read("layer_0/mlp/gating_einsum/w"))
    np.testing.assert_allclose(gate, x @ read("model.layers.0.mlp.gate_proj.weight").T, rtol=1e-3)
    np.testing.assert_allclose(up, x @ read("model.layers.0.mlp.up_proj.weight").T, rtol=1e-3)


def test_either_gating_layout_is_read(make_opened, assert_same):
    opened = make_opened("mqa")
    weights = stored(opened, "orbax")
    turned = {
        name: weights.read(name).swapaxes(1, 2) if "gating" in name else weights.read(name)
        for name in weights.names()
    }
    back, _ = canonical_weights("x", ArrayWeights(turned), layout("orbax"), opened.config)
    assert_same(back, opened.weights)


def test_a_square_gating_tensor_is_ambiguous(make_opened):
    opened = make_opened("mqa", intermediate_size=24)
    with pytest.raises(CheckpointError, match=r"Ambiguous.*gating_einsum/w could hold"):
        canonical_weights("x", stored(opened, "orbax"), layout("orbax"), opened.config)


def test_slices_are_those_of_the_parameter(make_opened, name):
    opened = make_opened("gqa")
    weights, _ = canonical_weights("x", stored(opened, name), layout_of(name), opened.config)
    for parameter in weights.names():
        for index in (slice(1, 3), (slice(None), slice(2, 5)), 0):
            if isinstance(index, tuple) and len(weights.shape(parameter)) < 2:
                continue
            assert np.array_equal(weights.read(parameter, index), weights.read(parameter)[index]), (
                parameter
            )


def test_tensors_that_do_not_fit_are_named(make_opened):
    opened = make_opened("gqa")
    weights = stored(opened, "keras")
    arrays = {n: weights.read(n) for n in weights.names()}
    norm = arrays.pop("layers/rms_normalization/vars/0")
    arrays["layers/lora/vars/0"] = norm
    arrays["layers/gemma_decoder_block/ffw_linear/vars/0"] = norm
    with pytest.raises(CheckpointError) as raised:
        canonical_weights("the/path", ArrayWeights(arrays), layout("keras"), opened.config)
    message = str(raised.value)
    assert "the/path" in message
    assert "Missing (1): layers/rms_normalization/vars/0." in message
    assert "Unexpected (1): layers/lora/vars/0." in message
    assert "ffw_linear/vars/0 is (24,), expected (40, 24)" in message


def test_parts_of_one_tensor_have_one_type(make_opened):
    opened = make_opened("gqa")
    arrays = {n: opened.weights.read(n) for n in opened.weights.names()}
    name = "model.layers.1.self_attn.k_proj.weight"
    arrays[name] = arrays[name].astype(np.float16)
    with pytest.raises(CheckpointError, match="several types"):
        stored_weights(ArrayWeights(arrays), layout("gemma_pytorch"), opened.config)


def test_padding_is_never_less_than_the_vocabulary(make_opened):
    opened = make_opened()
    with pytest.raises(CheckpointError, match="pad_vocab_to is 49"):
        stored_weights(opened.weights, layout("orbax"), opened.config, pad_vocab_to=49)


def test_a_head_without_a_place_is_named(make_opened):
    config = make_opened().config
    assert homeless(layout("keras"), config, "token_classification") == (
        "score.weight",
        "score.bias",
    )
    assert homeless(layout("keras"), config, "base") == ()


def test_every_format_has_a_place_for_every_parameter(make_opened):
    shapes = parameter_shapes(make_opened().config)
    layer = {n.split(".", 3)[3] if n.startswith("model.layers.") else n for n in shapes}
    for name in FORMATS[:-1]:
        assert set(layout(name)) >= layer, name
    assert set(TABLE) == layer | {"lm_head.weight"}


def test_the_markdown_shows_every_place():
    text = markdown()
    for row in TABLE.values():
        for cell in row.values():
            for place in cell if isinstance(cell, tuple) else (cell,):
                assert isinstance(place, Place)
                assert f"`{place.name}`" in text


def test_the_documentation_has_the_table(request):
    page = request.config.rootpath / "docs" / "reference" / "checkpoint-formats.md"
    if not page.is_file():
        pytest.skip("needs docs/, which this copy of the tests has not")
    _, _, shown = page.read_text("utf-8").partition("formats.table.markdown -->\n")
    assert shown == markdown(), "put the output of table.markdown() there"
