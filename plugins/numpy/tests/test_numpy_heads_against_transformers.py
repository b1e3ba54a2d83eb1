"""Heads, losses, attentions and gradients against Hugging Face transformers, in float64."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.inputs import ModelInputs
from gemma_hub_numpy.model import Reference, Witness

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PAD = 3
SHORT = {"num_hidden_layers": 2, "pad_token_id": PAD}
VARIANTS = {
    "gqa": {},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
    "mha, untied": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": False,
    },
    "bias, linear rope": {
        "attention_bias": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.5},
    },
}
LABELS = {
    "choice": ({"num_labels": 4}, [2, 0, 3]),
    "choices": ({"num_labels": 3}, [[1.0, 0, 1], [0, 0, 0], [0, 0.25, 1]]),
    "value": ({"num_labels": 1}, [[0.5], [-2.0], [7.25]]),
    "values": (
        {"num_labels": 2, "problem_type": "regression"},
        [[0.5, 1.0], [-2.0, 0.1], [7.25, -3.0]],
    ),
    "choice of two, stated": (
        {"num_labels": 2, "problem_type": "single_label_classification"},
        [1, 0, 1],
    ),
    "choices of two, stated": (
        {"num_labels": 2, "problem_type": "multi_label_classification"},
        [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]],
    ),
}


@pytest.fixture
def padded(ids, ragged_mask):
    """(3, 23) ids with the padding id where the mask is 0, and once inside a row."""
    ids = np.where(ids == PAD, PAD + 1, ids)
    ids[0, 6] = PAD
    return np.where(ragged_mask, ids, PAD)


def token_labels(ids, mask, count):
    """Labels for real tokens, some ignored, and none for what a padding token would predict."""
    labels = np.where(mask == 1, ids % count, -100)
    labels[:, 10] = -100
    labels[1, :10] = -100
    return labels


def assert_close(actual, expected, tolerance=1e-12):
    """The error of a whole array relative to its length."""
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def assert_same_gradients(model, gradients, tolerance=1e-11):
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert theirs.keys() == gradients.keys()
    for name, expected in theirs.items():
        assert np.linalg.norm(gradients[name]) > 0, name
        assert_close(gradients[name], expected, tolerance)


@pytest.mark.parametrize("num_items", [None, 57], ids=["mean", "num_items_in_batch"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.usefixtures("double_precision")
def test_causal_lm(
    changes, num_items, make_config, make_weights, make_transformers, run_transformers, padded,
    ragged_mask,
):  # fmt: skip
    config = make_config(**SHORT, **changes)
    weights = make_weights(config)
    labels = token_labels(padded, ragged_mask, config.vocab_size)
    inputs = ModelInputs.prepare(
        config, padded, ragged_mask, labels=labels, num_items_in_batch=num_items
    )
    model = make_transformers(config, weights)
    expected = run_transformers(model, inputs)
    expected.loss.backward()
    loss, gradients = Reference(config, weights).loss_and_gradients(inputs)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-12)
    assert_same_gradients(model, gradients)


@pytest.mark.usefixtures("double_precision")
def test_token_classification(
    make_config, make_weights, make_transformers, run_transformers, padded, ragged_mask
):
    task = "token_classification"
    config = make_config(**SHORT, num_labels=5)
    weights = make_weights(config, task=task)
    labels = token_labels(padded, ragged_mask, 5)
    inputs = ModelInputs.prepare(config, padded, ragged_mask, task=task, labels=labels)
    model = make_transformers(config, weights, task)
    expected = run_transformers(model, inputs)
    expected.loss.backward()
    reference = Reference(config, weights, task)
    outputs = reference.run(inputs)
    assert_close(outputs.logits[inputs.attention_mask], expected.logits[inputs.attention_mask])
    loss, gradients = reference.loss_and_gradients(inputs)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-12)
    assert_same_gradients(model, gradients)
    # Transformers' own token classifier ignores num_items_in_batch; here it is as in a causal LM.
    part = dataclasses.replace(inputs, num_items_in_batch=57)
    share = (labels != -100).sum() / 57
    assert reference.run(part).loss == pytest.approx(loss * share, rel=1e-12)


@pytest.mark.parametrize(("changes", "labels"), LABELS.values(), ids=LABELS.keys())
@pytest.mark.usefixtures("double_precision")
def test_sequence_classification(
    changes, labels, make_config, make_weights, make_transformers, run_transformers, padded,
    ragged_mask,
):  # fmt: skip
    task = "sequence_classification"
    config = make_config(**SHORT, **changes)
    weights = make_weights(config, task=task)
    labels = np.array(labels)
    inputs = ModelInputs.prepare(config, padded, ragged_mask, task=task, labels=labels)
    assert inputs.pooled_positions.tolist() == [22, 22, 16]
    model = make_transformers(config, weights, task)
    expected = run_transformers(model, inputs)
    expected.loss.backward()
    reference = Reference(config, weights, task)
    assert_close(reference.run(inputs).logits, expected.logits)
    loss, gradients = reference.loss_and_gradients(inputs)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-12)
    assert_same_gradients(model, gradients)


@pytest.mark.usefixtures("double_precision")
def test_the_base_model_and_attentions(
    config, make_weights, make_transformers, run_transformers, padded, ragged_mask
):
    weights = make_weights(config, task="base")
    inputs = ModelInputs.prepare(config, padded, ragged_mask, task="base", output_attentions=True)
    expected = run_transformers(make_transformers(config, weights, "base"), inputs)
    outputs = Reference(config, weights, "base").run(inputs)
    real = inputs.attention_mask
    assert (outputs.logits, outputs.loss) == (None, None)
    assert_close(outputs.last_hidden_state[real], expected.last_hidden_state[real])
    assert len(outputs.attentions) == len(expected.attentions) == 3
    for mine, theirs in zip(outputs.attentions, expected.attentions, strict=True):
        rows, tokens = np.nonzero(real)
        assert_close(mine[rows, :, tokens], theirs[rows, :, tokens])


def test_a_gradient_of_a_witness_is_as_far_off_as_transformers_in_float32(
    make_config, make_weights, make_transformers, run_transformers, padded, ragged_mask
):
    padded[:, 4] = 8  # not the row that is nearly zero: one amplified error would stand for all
    config = make_config(**SHORT)
    weights = make_weights(config)
    labels = token_labels(padded, ragged_mask, config.vocab_size)
    inputs = ModelInputs.prepare(config, padded, ragged_mask, labels=labels)
    _, exact = Reference(config, weights).loss_and_gradients(inputs)
    drawn = [Witness(config, weights, "float32", s).loss_and_gradients(inputs)[1] for s in range(4)]
    model = make_transformers(config, weights, dtype="float32")
    run_transformers(model, inputs).loss.backward()
    ratios = []
    for name, parameter in model.named_parameters():
        theirs = np.linalg.norm(parameter.grad.numpy() - exact[name])
        floor = np.median([np.linalg.norm(each[name] - exact[name]) for each in drawn])
        ratios.append(theirs / floor)
    assert min(ratios) > 0.5, ratios
    assert max(ratios) < 1.5, ratios
