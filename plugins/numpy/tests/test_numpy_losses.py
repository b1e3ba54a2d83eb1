"""Losses and pooling against numbers worked out by other means, and where they are rounded."""

import math

import numpy as np
import pytest

from gemma_hub.inputs import ModelInputs
from gemma_hub_numpy.model import Reference, Witness


@pytest.fixture
def make_model(make_config, make_weights):
    def make(task, **changes):
        config = make_config(num_hidden_layers=1, **changes)
        return Reference(config, make_weights(config, task=task), task)

    return make


def surprise(logits, label):
    """-log of the probability of one label, by the definition."""
    return -math.log(math.exp(logits[label]) / sum(map(math.exp, logits)))


def test_a_causal_loss_counts_what_follows(make_model):
    logits = np.random.default_rng(0).normal(size=(2, 4, 3))
    labels = np.array([[2, -100, 1, 0], [-100, -100, -100, 2]])
    terms = [surprise(logits[0, 1], 1), surprise(logits[0, 2], 0), surprise(logits[1, 2], 2)]
    model = make_model("causal_lm")
    assert model.causal_loss(logits, labels, None) == pytest.approx(sum(terms) / 3, rel=1e-14)
    assert model.causal_loss(logits, labels, 7) == pytest.approx(sum(terms) / 7, rel=1e-14)


def test_a_token_loss_counts_each_place(make_model):
    logits = np.random.default_rng(0).normal(size=(2, 2, 3))
    labels = np.array([[2, -100], [-100, 1]])
    terms = [surprise(logits[0, 0], 2), surprise(logits[1, 1], 1)]
    model = make_model("token_classification", num_labels=3)
    assert model.token_loss(logits, labels, None) == pytest.approx(sum(terms) / 2, rel=1e-14)
    assert model.token_loss(logits, labels, 5) == pytest.approx(sum(terms) / 5, rel=1e-14)


def test_nothing_that_counts_is_a_loss_of_zero(make_model, ids):
    model = make_model("causal_lm")
    labels = np.full(ids.shape, -100)
    inputs = ModelInputs.prepare(model.config, ids, labels=labels, num_items_in_batch=4)
    loss, gradients = model.loss_and_gradients(inputs)
    assert loss == 0
    assert not any(each.any() for each in gradients.values())
    one = ModelInputs.prepare(model.config, ids[:, :1], labels=labels[:, :1], num_items_in_batch=4)
    assert model.run(one).loss == 0


@pytest.mark.parametrize("size", [1.0, 300.0, 1e4])
def test_losses_of_large_logits_are_finite(size, make_model):
    logits = np.array([[size, -size], [0.0, size]])
    model = make_model("sequence_classification")
    assert model.sequence_loss(logits, np.array([1, 1])) == pytest.approx(
        (math.log1p(math.exp(-2 * size)) + 2 * size + math.log1p(math.exp(-size))) / 2, rel=1e-14
    )
    labels = np.array([[1.0, 0.0], [0.5, 0.0]])
    expected = (2 * math.log1p(math.exp(-size)) + math.log(2) + np.logaddexp(0, size)) / 4
    assert model.sequence_loss(logits, labels) == pytest.approx(expected, rel=1e-14)
    for target in (np.array([1, 1]), labels):
        assert np.isfinite(model.sequence_loss_backward(logits, target)).all()


def test_a_regression(make_model):
    values = np.array([[1.0], [-2.0]])
    one = make_model("sequence_classification", num_labels=1)
    assert one.sequence_loss(values, np.array([3.0, -2.5])) == (4 + 0.25) / 2
    two = make_model("sequence_classification", problem_type="regression")
    labels = np.array([[0.0, 1.0], [2.0, 2.0]])
    assert two.sequence_loss(np.array([[1.0, 1.0], [4.0, -1.0]]), labels) == (1 + 0 + 4 + 9) / 4


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_the_logits_of_a_row_are_those_of_its_last_real_token(side, make_model, ids):
    model = make_model("sequence_classification", num_labels=4)
    alone = ModelInputs.prepare(model.config, ids[:1, :9], task=model.task)
    expected = model.run(alone).logits[0]
    start = {"left": 4, "right": 0, "both": 2}[side]
    padded, mask = np.full((2, 13), 3), np.zeros((2, 13), int)
    padded[:, start : start + 9], mask[:, start : start + 9] = ids[0, :9], 1
    inputs = ModelInputs.prepare(model.config, padded, mask, task=model.task)
    np.testing.assert_allclose(model.run(inputs).logits, [expected] * 2, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"num_labels": 3}, [2, 0, 1]),
        ({"num_labels": 2}, [[1.0, 0.0], [0.0, 1.0], [0.1, 0.0]]),
        ({"num_labels": 1}, [0.1, 2.0, -3.0]),
    ],
    ids=["choice", "choices", "value"],
)
def test_a_witness_computes_the_loss_in_float32(
    dtype, changes, labels, make_config, make_weights, ids
):
    task = "sequence_classification"
    config = make_config(**changes)
    weights = make_weights(config, task=task)
    inputs = ModelInputs.prepare(config, ids, task=task, labels=np.array(labels))
    outputs = Witness(config, weights, dtype, 0, task).run(inputs)
    exact = Reference(config, weights, task).sequence_loss(outputs.logits, inputs.labels)
    assert outputs.loss == np.float32(outputs.loss)
    assert outputs.loss == pytest.approx(float(exact), rel=8 * 2.0**-24)
