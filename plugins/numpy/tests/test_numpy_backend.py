"""The backend "numpy" holds the contract of gemma_hub."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from gemma_hub.backend import (
    FEATURES,
    Backend,
    BuildOptions,
    Model,
    SupportsCache,
    SupportsExport,
    SupportsGradients,
    TaskSpec,
)
from gemma_hub.config import ARCHITECTURES
from gemma_hub.errors import CapacityError, CheckpointError, InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes
from gemma_hub_numpy.backend import NumpyBackend
from gemma_hub_numpy.plugin import gemma_hub_backends


def build(config, weights, dtype="float64", task="causal_lm", **options):
    return NumpyBackend().build(
        config, TaskSpec(task), weights, BuildOptions(dtype=dtype, **options)
    )


def test_the_classes_fit_the_protocols(config, weights):
    model = build(config, weights)
    assert isinstance(NumpyBackend(), Backend)
    for protocol in (Model, SupportsCache, SupportsExport, SupportsGradients):
        assert isinstance(model, protocol)
    assert list(NumpyBackend().devices()) == ["cpu"] == [model.device]


def test_the_spec_names_what_there_is():
    [spec] = gemma_hub_backends()
    module, name = spec.factory.split(":")
    assert getattr(sys.modules[module], name) is NumpyBackend
    assert spec.name == "numpy"
    assert set(FEATURES) - spec.features == {"qk_norm"}
    assert spec.tasks == tuple(ARCHITECTURES)


def test_the_plugin_imports_no_numpy():
    code = (
        "import sys, gemma_hub_numpy.plugin as plugin; plugin.gemma_hub_backends();"
        "print('numpy' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("dtype", "logits", "states"),
    [
        ("float64", np.float64, np.float64),
        ("float32", np.float32, np.float32),
        ("bfloat16", np.float32, ml_dtypes.bfloat16),
        ("float16", np.float32, np.float16),
    ],
)
def test_types_of_outputs(dtype, logits, states, config, weights, ids):
    inputs = ModelInputs.prepare(config, ids, output_hidden_states=True)
    outputs = build(config, weights, dtype, device="cpu").forward(inputs)
    assert outputs.logits.dtype == logits
    assert {state.dtype for state in outputs.hidden_states} == {np.dtype(states)}
    turned = outputs.to_numpy()
    expected = np.float64 if dtype == "float64" else np.float32
    assert {array.dtype for array in (turned.logits, *turned.hidden_states)} == {np.dtype(expected)}
    np.testing.assert_array_equal(
        turned.hidden_states[1], outputs.hidden_states[1].astype(expected)
    )
    assert build(config, weights).forward(ModelInputs.prepare(config, ids)).hidden_states is None


LABELS = {
    "causal_lm": np.arange(69).reshape(3, 23),
    "token_classification": np.arange(69).reshape(3, 23) % 4,
    "sequence_classification": np.array([3, 0, 1]),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("task", ARCHITECTURES)
def test_every_task(task, dtype, make_config, make_weights, ids, ragged_mask):
    config = make_config(num_labels=4)
    weights = make_weights(config, task=task)
    model = build(config, weights, dtype, task)
    labels = LABELS.get(task)
    inputs = ModelInputs.prepare(
        config, ids, ragged_mask, task=task, labels=labels, output_attentions=True
    )
    outputs = model.forward(inputs)
    kind = np.dtype(DTYPES[dtype])
    single = np.dtype(np.float64 if dtype == "float64" else np.float32)
    assert [each.shape for each in outputs.attentions] == [(3, 6, 23, 23)] * 3
    assert {each.dtype for each in outputs.attentions} == {kind}
    if task == "base":
        assert outputs.last_hidden_state.shape == (3, 23, 48)
        assert outputs.last_hidden_state.dtype == kind
        assert (outputs.logits, outputs.loss) == (None, None)
        with pytest.raises(UnsupportedFeature, match="without a head has no loss"):
            model.loss_and_gradients(inputs)
        return
    width = {"causal_lm": (23, 131), "token_classification": (23, 4)}.get(task, (4,))
    assert outputs.logits.shape == (3, *width)
    assert outputs.logits.dtype == outputs.loss.dtype == single
    assert outputs.loss.shape == ()
    assert outputs.last_hidden_state is None
    loss, gradients = model.loss_and_gradients(inputs)
    assert loss == float(outputs.loss)
    assert {name: each.shape for name, each in gradients.items()} == parameter_shapes(config, task)
    assert {each.dtype for each in gradients.values()} == {kind}
    assert model.export().names() == tuple(parameter_shapes(config, task))


def test_attentions_with_a_cache_reach_over_the_slots_filled_so_far(config, weights, ids):
    model = build(config, weights)
    whole = model.forward(ModelInputs.prepare(config, ids, output_attentions=True)).attentions
    cache = model.init_cache(3, 30)
    _, cache = model.extend(ModelInputs.prepare(config, ids[:, :20]), cache)
    inputs = ModelInputs.prepare(
        config, ids[:, 20:], next_position=cache.next_position, output_attentions=True
    )
    outputs, _ = model.extend(inputs, cache)
    for full, part in zip(whole, outputs.attentions, strict=True):
        np.testing.assert_allclose(part, full[:, :, 20:], rtol=0, atol=1e-13)


def test_inputs_of_another_task(config, make_weights, ids):
    model = build(
        config, make_weights(config, task="sequence_classification"), task="sequence_classification"
    )
    with pytest.raises(InputError, match="prepared for another task"):
        model.forward(ModelInputs.prepare(config, ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_witness_seeds(dtype, config, weights, ids):
    inputs = ModelInputs.prepare(config, ids)
    runs = [
        build(config, weights, dtype, extra=extra).forward(inputs).logits
        for extra in ({}, {"witness": 0}, {"witness": 1})
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[1] != runs[2]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "device is 'cuda'; the backend 'numpy' has only 'cpu'"),
        ({"dtype": "float8"}, "dtype is 'float8'; the backend 'numpy' has float64, float32"),
        ({"dtype": "float32", "extra": {"witnes": 1}}, "'witnes' is not an option.*'witness'"),
        ({"dtype": "float32", "extra": {"witness": -1}}, "witness is -1; expected a seed"),
        ({"dtype": "float32", "extra": {"witness": True}}, "witness is True; expected a seed"),
        ({"extra": {"witness": 1}}, "witness is given with dtype 'float64'"),
    ],
)
def test_wrong_options(options, message, config, weights):
    with pytest.raises(InputError, match=message):
        build(config, weights, **options)


def test_what_it_does_not_do(config, weights, make_config):
    with pytest.raises(UnsupportedFeature, match="'numpy' does not support 'qk_norm'"):
        build(make_config(use_qk_norm=True), weights)
    with pytest.raises(UnsupportedFeature, match="'numpy' does not support 'tagging'"):
        build(config, weights, task="tagging")


def test_weights_that_do_not_fit(config, weights):
    arrays = {name: weights.read(name) for name in weights.names()}
    arrays["model.norm.weight"] = np.zeros(1, np.float32)  # NumPy would stretch it without a word
    del arrays["model.layers.2.mlp.up_proj.weight"]
    message = (
        r"missing: model\.layers\.2\.mlp\.up_proj.*model\.norm\.weight \(1,\) instead of \(48,\)"
    )
    with pytest.raises(CheckpointError, match=message):
        build(config, ArrayWeights(arrays))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_export_gives_back_what_was_given(dtype, config, weights):
    exported = build(config, weights, dtype).export()
    assert exported.names() == tuple(parameter_shapes(config))
    for name in exported.names():
        expected = weights.read(name).astype(exported.read(name).dtype)
        assert exported.dtype(name) == dtype == exported.read(name).dtype.name
        assert exported.shape(name) == exported.read(name).shape
        np.testing.assert_array_equal(exported.read(name), expected)
    part = exported.read("model.layers.0.mlp.up_proj.weight", (slice(2, 9), slice(None)))
    assert part.shape == (7, 48)


def test_the_cache_is_full_at_its_capacity(config, weights, ids):
    model = build(config, weights)
    cache = model.init_cache(3, 24)
    _, cache = model.extend(ModelInputs.prepare(config, ids), cache)
    one = ModelInputs.prepare(config, ids[:, :1], next_position=cache.next_position)
    _, cache = model.extend(one, cache)
    with pytest.raises(CapacityError, match="24 of 24"):
        model.extend(one, cache)
    with pytest.raises(InputError, match="2 rows and the cache 3"):
        model.extend(ModelInputs.prepare(config, ids[:2]), cache)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_witness_decodes_with_a_cache(dtype, config, weights, ids, ragged_mask):
    model = build(config, weights, dtype)
    full = model.forward(ModelInputs.prepare(config, ids, ragged_mask)).logits
    cache = model.init_cache(3, 23)
    for t in range(23):
        inputs = ModelInputs.prepare(
            config, ids[:, t : t + 1], ragged_mask[:, t : t + 1], next_position=cache.next_position
        )
        outputs, cache = model.extend(inputs, cache)
        real = ragged_mask[:, t].astype(bool)
        tolerance = 1e-12 if dtype == "float64" else 0.25
        spread = np.abs(full[real, t]).max()
        np.testing.assert_allclose(
            outputs.logits[real, 0] / spread, full[real, t] / spread, rtol=0, atol=tolerance
        )


def test_nothing_given_is_changed(config, weights, ids, ragged_mask):
    before = {name: weights.read(name).copy() for name in weights.names()}
    inputs = ModelInputs.prepare(config, ids, ragged_mask)
    copies = inputs.input_ids.copy(), inputs.attention_mask.copy(), inputs.position_ids.copy()
    build(config, weights).forward(inputs)
    for name, value in before.items():
        np.testing.assert_array_equal(weights.read(name), value)
    for array, copy in zip(
        (inputs.input_ids, inputs.attention_mask, inputs.position_ids), copies, strict=True
    ):
        np.testing.assert_array_equal(array, copy)
