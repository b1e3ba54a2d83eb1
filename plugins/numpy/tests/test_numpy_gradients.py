"""Gradients against the derivative of the reference's own forward pass, and their conventions."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.errors import InputError
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import DTYPES, ArrayWeights
from gemma_hub_numpy.model import Reference, Witness

STEP = 1e-30
CAPS = {
    "layer_types": ("sliding_attention", "full_attention"),
    "sliding_window": 4,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
VARIANTS = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "mha, no pad id": {"num_key_value_heads": 6, "pad_token_id": None},
    "bias, offset": {"attention_bias": True, "rms_norm_offset": 0.0},
    "untied, linear rope": {
        "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "linear", "factor": 2.5},
    },
    "windows and caps": CAPS,
}
HEADS = {
    "tokens": ("token_classification", {"num_labels": 5}, None),
    "choice": ("sequence_classification", {"num_labels": 4}, [2, 0, 3]),
    "choices": ("sequence_classification", {"num_labels": 2}, [[1.0, 0], [0, 0], [0.25, 1]]),
    "value": ("sequence_classification", {"num_labels": 1}, [0.5, -2.0, 7.25]),
    "values": (
        "sequence_classification",
        {"num_labels": 2, "problem_type": "regression"},
        [[0.5, 1.0], [-2.0, 0.1], [7.25, -3.0]],
    ),
}


class Moved(Reference):
    """The reference with one parameter moved by an imaginary step.

    The imaginary part of an analytic function at x + i h is h times its derivative, without the
    cancellation of a finite difference: it is exact to rounding. Every operation of the forward
    pass is analytic and written so that complex numbers pass through it.
    """

    def move(self, name, direction):
        self.moved, self.direction = name, direction

    def parameter(self, name):
        value = super().parameter(name)
        return value + 1j * STEP * self.direction if name == self.moved else value

    def embed(self, ids):
        rows = super().embed(ids)
        is_pad = ids == self.config.pad_token_id  # by convention not a use of the parameter
        return np.where(is_pad[..., None], rows.real, rows)

    def contract(self, subscripts, a, b):
        return np.einsum(subscripts, a, b)  # without BLAS, whose threads take longer to start

    def derivative(self, inputs):
        return self.run(inputs).loss.imag / STEP


def assert_gradients(config, weights, inputs, task="causal_lm"):
    """Every parameter's gradient agrees along a random direction, to rounding."""
    loss, gradients = Reference(config, weights, task).loss_and_gradients(inputs)
    model = Moved(config, weights, task)
    assert gradients.keys() == set(weights.names())
    random = np.random.default_rng(2)
    for name, gradient in gradients.items():
        direction = random.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        model.move(name, direction)
        scale = np.linalg.norm(gradient)
        assert scale > 0, name
        # A random direction sees about 1 / sqrt(size) of a gradient.
        tolerance = 1e-11 * scale / np.sqrt(gradient.size)
        assert abs((gradient * direction).sum() - model.derivative(inputs)) < tolerance, name
    assert loss == Reference(config, weights, task).run(inputs).loss


@pytest.fixture
def small_ids(ids):
    ids = ids[:, :11].copy()
    ids[0, 5] = ids[2, 2] = 3  # the padding id, at real tokens
    return ids


@pytest.fixture
def small_mask():
    """(3, 11): nothing padded, 4 on the left, 3 on the right."""
    mask = np.ones((3, 11), np.int64)
    mask[1, :4] = mask[2, 8:] = 0
    return mask


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_causal_lm(changes, make_config, make_weights, small_ids, small_mask):
    config = make_config(num_hidden_layers=2, **changes)
    # Padding is not ignored, so that rows that see nothing are in the loss as well.
    labels = small_ids.copy()
    labels[0, 3:6] = -100
    inputs = ModelInputs.prepare(config, small_ids, small_mask, labels=labels)
    assert_gradients(config, make_weights(config), inputs)


@pytest.mark.parametrize(("task", "changes", "labels"), HEADS.values(), ids=HEADS.keys())
def test_heads(task, changes, labels, make_config, make_weights, small_ids, small_mask):
    config = make_config(num_hidden_layers=1, **changes)
    if labels is None:
        labels = np.where(small_mask == 1, small_ids % 5, -100)
    inputs = ModelInputs.prepare(config, small_ids, small_mask, task=task, labels=np.array(labels))
    assert_gradients(config, make_weights(config, task=task), inputs, task)


def test_a_finite_difference(config, weights, small_ids):
    """The same without complex numbers, which no line of the reference was written for."""
    small_ids[small_ids == 7] = 8  # nearly zero: the norm bends too much there
    inputs = ModelInputs.prepare(
        dataclasses.replace(config, pad_token_id=None), small_ids, labels=small_ids
    )
    config = dataclasses.replace(config, pad_token_id=None)
    _, gradients = Reference(config, weights).loss_and_gradients(inputs)
    random = np.random.default_rng(2)
    direction = {name: random.normal(size=g.shape) for name, g in gradients.items()}

    def loss(step):
        moved = {name: weights.read(name) + step * direction[name] for name in gradients}
        return Reference(config, ArrayWeights(moved)).run(inputs).loss

    h = 1e-5  # errors of order h**4
    difference = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    expected = sum((gradients[name] * direction[name]).sum() for name in gradients)
    assert difference == pytest.approx(expected, rel=1e-7)


def test_the_pad_row_gets_its_gradient_from_the_head_only(make_config, make_weights):
    ids = np.array([[5, 3, 9, 3, 3]])
    rows = {}
    for tied in (True, False):
        config = make_config(tie_word_embeddings=tied)
        inputs = ModelInputs.prepare(config, ids, labels=ids)
        _, gradients = Reference(config, make_weights(config)).loss_and_gradients(inputs)
        rows[tied] = gradients["model.embed_tokens.weight"]
    assert np.abs(rows[True][3]).max() > 0
    assert (np.abs(rows[False]).max(axis=1) > 0).nonzero()[0].tolist() == [5, 9]


def test_what_the_loss_does_not_depend_on_has_zeros(make_config, make_weights, small_ids):
    config = make_config(tie_word_embeddings=False)
    weights = make_weights(config)
    embeddings = weights.read("model.embed_tokens.weight")[small_ids]
    inputs = ModelInputs.prepare(config, inputs_embeds=embeddings, labels=small_ids)
    _, gradients = Reference(config, weights).loss_and_gradients(inputs)
    assert set(gradients) == set(weights.names())
    assert not gradients["model.embed_tokens.weight"].any()
    assert gradients["lm_head.weight"].any()


def test_padding_changes_no_gradient(config, weights, small_ids, small_mask):
    model = Reference(config, weights)
    padded = np.where(small_mask, small_ids, 3)
    labels = np.where(small_mask, small_ids, -100)
    labels[1, 4] = -100  # the row's first token, which only a padding token would predict
    count = int((labels[:, 1:] != -100).sum())
    _, together = model.loss_and_gradients(
        ModelInputs.prepare(config, padded, small_mask, labels=labels)
    )
    alone = [
        model.loss_and_gradients(
            ModelInputs.prepare(
                config, small_ids[[row]][:, real], labels=labels[[row]][:, real],
                num_items_in_batch=count,
            )
        )[1]
        for row, real in enumerate(small_mask.astype(bool))
    ]  # fmt: skip
    for name, expected in together.items():
        total = sum(each[name] for each in alone)
        assert np.linalg.norm(total - expected) <= 1e-12 * np.linalg.norm(expected), name


def test_a_head_in_blocks_has_the_same_gradients(config, weights, small_ids, monkeypatch):
    inputs = ModelInputs.prepare(config, small_ids, labels=small_ids)
    _, expected = Reference(config, weights).loss_and_gradients(inputs)
    monkeypatch.setattr("gemma_hub_numpy.heads._VOCABULARY_BLOCK", 50)
    _, actual = Reference(config, weights).loss_and_gradients(inputs)
    for name, gradient in expected.items():
        error = np.linalg.norm(actual[name] - gradient)
        assert error <= 1e-12 * np.linalg.norm(gradient), name


def test_labels_are_needed(config, weights, small_ids):
    inputs = ModelInputs.prepare(config, small_ids)
    with pytest.raises(InputError, match="no labels; gradients are those of a loss"):
        Reference(config, weights).loss_and_gradients(inputs)


class HeadGetsNothing(Reference):
    """A mutant: the tied embedding forgets what it does in the head."""

    def head_backward(self, d, x, logits, into):
        return super().head_backward(d, x, logits, {})


def test_a_backward_is_overridden_like_any_operation(config, weights, small_ids):
    inputs = ModelInputs.prepare(config, small_ids, labels=small_ids)
    _, right = Reference(config, weights).loss_and_gradients(inputs)
    _, wrong = HeadGetsNothing(config, weights).loss_and_gradients(inputs)
    changed = [name for name in right if not np.array_equal(right[name], wrong[name])]
    assert changed == ["model.embed_tokens.weight"]


# -- witnesses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_witnesses_scatter_around_the_reference(dtype, config, weights, small_ids, small_mask):
    small_ids[small_ids == 7] = 8  # or the errors of one row, nearly zero, would be all there is
    held = ArrayWeights({n: weights.read(n).astype(DTYPES[dtype]) for n in weights.names()})
    inputs = ModelInputs.prepare(config, small_ids, small_mask, labels=small_ids)
    loss, exact = Reference(config, held).loss_and_gradients(inputs)
    drawn = [Witness(config, held, dtype, seed).loss_and_gradients(inputs) for seed in range(12)]
    unit = 2.0**-24 if dtype == "float32" else 2.0**-8
    assert all(abs(each / loss - 1) < 8 * unit for each, _ in drawn)
    for name, expected in exact.items():
        errors = [np.linalg.norm(each[name] - expected) for _, each in drawn]
        assert min(errors) > 0.5 * unit * np.linalg.norm(expected), name
        assert max(errors) < 3 * min(errors), name  # one distribution, not a lucky draw
        middle = np.mean([each[name] for _, each in drawn], axis=0)
        assert np.linalg.norm(middle - expected) < 0.6 * np.median(errors), name  # 0.29 expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_seed_is_one_gradient_that_fits_the_type(dtype, config, weights, small_ids):
    inputs = ModelInputs.prepare(config, small_ids, labels=small_ids)
    model = Witness(config, weights, dtype, 3)
    (loss, first), (again, second) = (model.loss_and_gradients(inputs) for _ in range(2))
    assert loss == again == np.float32(loss)
    for name, gradient in first.items():
        np.testing.assert_array_equal(gradient, second[name])
        np.testing.assert_array_equal(gradient, gradient.astype(DTYPES[dtype]).astype(np.float64))
