"""Outputs, losses and gradients of the model classes equal those of transformers.

The checkpoints are those that transformers writes; the largest logit is near 10 and the bound on
values is 1e-4, on gradients 1e-4 of their norm.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.plugins.registry import plugin_registry

SHAPES = ("mqa", "gqa", "mha")
TASKS = ("base", "causal_lm", "sequence_classification", "token_classification")
BATCH, LENGTH, PAD, VOCABULARY, LABELS = 3, 11, 3, 61, 3
REGRESSION = "regression"
SINGLE = "single_label_classification"
MULTI = "multi_label_classification"


def padded_batch(padding: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask, and the positions that count real tokens only."""
    ids = np.random.default_rng(5).integers(6, VOCABULARY, (BATCH, LENGTH))
    mask = np.ones_like(ids)
    if padding == "left":
        mask[1, :4], mask[2, :1] = 0, 0
    elif padding == "right":
        mask[1, 6:], mask[2, 10:] = 0, 0
    ids[mask == 0] = PAD
    if padding == "in the text":  # the pad id as a real token
        ids[1, 2:4] = PAD
    return ids, mask, np.where(mask == 1, np.cumsum(mask, 1) - 1, 0)


def in_transformers(model: Any, ids: Any, mask: Any, positions: Any, **arguments: Any) -> Any:
    """A call with the positions written out: those that transformers takes count padding."""
    return model(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions),
        **arguments,
    )


def token_labels(task: str, mask: np.ndarray) -> np.ndarray:
    count = VOCABULARY if task == "causal_lm" else LABELS
    labels = np.random.default_rng(7).integers(0, count, mask.shape)
    labels[mask == 0] = -100
    labels[0, 3:5] = -100
    return labels


def assert_near(ours: Any, theirs: Any, where: Any = ...) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours[where], theirs[where], rtol=0, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs(written: Any, models: Any, shape: str, task: str, padding: str) -> None:
    theirs, path = written(task, shape)
    ids, mask, positions = padded_batch(padding)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected = in_transformers(theirs, ids, mask, positions, **wanted)
    got = models.call(models.read(task, path), input_ids=ids, attention_mask=mask, **wanted)
    real = mask == 1
    if task == "base":
        assert_near(got.last_hidden_state, expected.last_hidden_state, real)
    elif task == "sequence_classification":
        assert_near(got.logits, expected.logits)
    else:
        assert_near(got.logits, expected.logits, real)
    if task != "base":
        assert 5 < np.abs(got.logits).max() < 20
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_near(mine, other, real)
    assert len(got.attentions) == len(expected.attentions) == 2
    for mine, other in zip(got.attentions, expected.attentions, strict=True):
        # Axes B T N S, so that the mask of the queries selects.
        assert_near(mine.swapaxes(1, 2), other.swapaxes(1, 2), real)


@pytest.mark.parametrize("task", TASKS)
def test_fields_are_those_of_transformers_in_its_order(
    written: Any, models: Any, task: str
) -> None:
    theirs, path = written(task)
    ids, mask, positions = padded_batch("none")
    expected = in_transformers(theirs, ids, mask, positions)
    got = models.call(models.read(task, path), input_ids=ids)
    fields = [field.name for field in dataclasses.fields(expected)]
    if task == "token_classification":  # its record has no place for the cache
        fields.insert(2, "past_key_values")
    assert list(got._fields) == fields
    assert got.past_key_values is not None
    assert got.hidden_states is None
    assert got.attentions is None
    assert models.call(models.read(task, path), input_ids=ids, use_cache=False)[2] is None


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("task", ["causal_lm", "token_classification"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_over_tokens(written: Any, models: Any, shape: str, task: str, padding: str) -> None:
    theirs, path = written(task, shape)
    ids, mask, positions = padded_batch(padding)
    labels = token_labels(task, mask)
    expected = in_transformers(theirs, ids, mask, positions, labels=torch.tensor(labels)).loss
    call = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model = models.read(task, path)
    got = models.call(model, **call)
    assert got.loss > 1
    assert_near(got.loss, expected)
    # transformers' token classifier takes no num_items_in_batch; what it would mean is plain.
    counted = (labels[:, 1:] if task == "causal_lm" else labels) != -100
    expected = expected * counted.sum() / 40
    if task == "causal_lm":
        again = in_transformers(
            theirs, ids, mask, positions, labels=torch.tensor(labels), num_items_in_batch=40
        ).loss
        assert torch.allclose(again, expected)
    assert_near(models.call(model, **call, num_items_in_batch=40).loss, expected)


# The config's problem type, its number of labels, and labels for BATCH rows.
SEQUENCE_LABELS: dict[str, tuple[str | None, int, Any]] = {
    "single": (SINGLE, 3, [2, 0, 1]),
    "single, inferred": (None, 3, [2, 0, 1]),
    "single, in a column": (SINGLE, 3, [[2], [0], [1]]),
    "single, with one ignored": (SINGLE, 3, [2, -100, 1]),
    "multi": (MULTI, 3, [[1.0, 0, 1], [0, 0, 0], [0.25, 1, 1]]),
    "multi, inferred": (None, 3, [[1.0, 0, 1], [0, 0, 0], [0.25, 1, 1]]),
    "regression": (REGRESSION, 3, [[1.5, -2, 0], [0, 3, 1], [4, 0, -1]]),
    "regression of one": (REGRESSION, 1, [1.5, -2, 0.5]),
    "regression of one, inferred": (None, 1, [1.5, -2, 0.5]),
    "regression of one, in a column": (None, 1, [[1.5], [-2], [0.5]]),
}


def sequence_case(written: Any, shape: str, case: str) -> tuple[Any, Any, np.ndarray]:
    """transformers' model, the checkpoint and the labels of one entry of the table."""
    kind, count, labels = SEQUENCE_LABELS[case]
    array = np.array(labels)
    array = array.astype(np.float32) if array.dtype.kind == "f" else array
    theirs, path = written(
        "sequence_classification",
        shape,
        num_labels=count,
        **({"problem_type": kind} if kind else {}),
    )
    return theirs, path, array


@pytest.mark.parametrize("case", SEQUENCE_LABELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_over_sequences(written: Any, models: Any, shape: str, case: str) -> None:
    theirs, path, labels = sequence_case(written, shape, case)
    ids, mask, positions = padded_batch("right")
    model = models.read("sequence_classification", path)
    assert model.config.problem_type == SEQUENCE_LABELS[case][0]
    expected = in_transformers(theirs, ids, mask, positions, labels=torch.tensor(labels)).loss
    got = models.call(model, input_ids=ids, attention_mask=mask, labels=labels)
    assert got.loss > 0.1
    np.testing.assert_allclose(got.loss, expected.item(), rtol=2e-5, atol=1e-4)
    assert model.config.problem_type == SEQUENCE_LABELS[case][0]


def test_the_meaning_of_labels_is_inferred_anew_at_each_call(written: Any, models: Any) -> None:
    _, path = written("sequence_classification")
    model = models.read("sequence_classification", path)
    ids, _, _ = padded_batch("none")
    single = models.call(model, input_ids=ids, labels=np.array([2, 0, 1]))
    several = models.call(model, input_ids=ids, labels=np.eye(3, dtype=np.float32)[[2, 0, 1]])
    again = models.call(model, input_ids=ids, labels=np.array([2, 0, 1]))
    assert single.loss == again.loss != several.loss


def test_flax_takes_arrays_of_numpy(written: Any, both: Any) -> None:
    models = both[1]
    _, path = written("causal_lm")
    ids, mask, _ = padded_batch("left")
    labels = token_labels("causal_lm", mask)
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model = models.read("causal_lm", path)
    expected, got = model(**models.arrays(arguments)), model(**arguments)
    assert np.array_equal(got.logits, expected.logits)
    assert got.loss == expected.loss
    with pytest.raises(InputError, match="expected 0 to 60"):
        model(ids + VOCABULARY)


def test_torch_takes_narrow_integers(written: Any, both: Any) -> None:
    models = both[0]
    ids, _, _ = padded_batch("none")
    cases = {"causal_lm": ids % LABELS, "sequence_classification": np.array([2, 0, 1])}
    for task, labels in {**cases, "token_classification": ids % LABELS}.items():
        model = models.read(task, written(task)[1])
        wide, narrow = (
            model(torch.tensor(ids, dtype=dtype), labels=torch.tensor(labels, dtype=dtype)).loss
            for dtype in (torch.int64, torch.int32)
        )
        assert wide == narrow


# -- gradients -------------------------------------------------------------------------------------


def gradient_labels(task: str, padding: str, mask: np.ndarray) -> np.ndarray:
    """Labels of the batch; none that is predicted from padding.

    With padding on the left, the first real token is predicted from the padding before it, which
    sees nothing. The loss of such a row is that of transformers, but its gradient is not defined by
    the function: it depends on how the implementation fills a row without a visible key.
    """
    if task == "sequence_classification":
        return np.array([2, 0, 1])
    labels = token_labels(task, mask)
    if padding == "left":
        labels[np.arange(BATCH), mask.argmax(1)] = -100
    return labels


def assert_near_gradients(ours: dict[str, np.ndarray], theirs: Any) -> None:
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert sorted(ours) == sorted(expected)
    for name, gradient in expected.items():
        norm = np.linalg.norm(gradient)
        assert ours[name].shape == gradient.shape, name
        assert norm > 1e-3, name
        assert np.linalg.norm(ours[name] - gradient) < 1e-4 * norm, name


# The pad id is looked up without a gradient, as in transformers, also where it is a real token.
PADDINGS = ["none", "left", "right", "in the text"]
# Flax compiles for a few seconds per entry: there, every shape and every head, not every pair.
PAIRS = [(shape, task) for shape in SHAPES for task in TASKS[1:]]
IN_FLAX = [
    ("mqa", "causal_lm"),
    ("gqa", "causal_lm"),
    ("mha", "causal_lm"),
    ("gqa", "sequence_classification"),
    ("mha", "token_classification"),
]
THROUGH_FLAX = [
    ("gqa", "causal_lm"),
    ("mha", "sequence_classification"),
    ("mqa", "token_classification"),
]


def entries(in_flax: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [("torch", *pair) for pair in PAIRS] + [("flax", *pair) for pair in in_flax]


def gradient_case(
    written: Any, shape: str, task: str, padding: str
) -> tuple[dict[str, Any], float, Any, Any]:
    """Arguments of a call, transformers' loss, its model with gradients, and the checkpoint."""
    theirs, path = written(task, shape)
    ids, mask, positions = padded_batch(padding)
    labels = gradient_labels(task, padding, mask)
    loss = in_transformers(theirs, ids, mask, positions, labels=torch.tensor(labels)).loss
    loss.backward()
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return arguments, loss.item(), theirs, path


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("models", "shape", "task"), entries(IN_FLAX), indirect=["models"])
def test_gradients_of_the_classes(
    written: Any, models: Any, shape: str, task: str, padding: str
) -> None:
    arguments, expected, theirs, path = gradient_case(written, shape, task, padding)
    model = models.read(task, path)
    loss, gradients = models.framework.gradients(model, models.arrays(arguments))
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_near_gradients(gradients, theirs)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("models", "shape", "task"), entries(THROUGH_FLAX), indirect=["models"])
def test_gradients_of_the_backends(
    written: Any, models: Any, shape: str, task: str, padding: str
) -> None:
    arguments, expected, theirs, path = gradient_case(written, shape, task, padding)
    model = through_the_contract(models.name, task, path)
    inputs = ModelInputs.prepare(model.native.config, task=task, **arguments)
    loss, gradients = model.loss_and_gradients(inputs)
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_near_gradients({name: model.to_numpy(g) for name, g in gradients.items()}, theirs)


def through_the_contract(backend: str, task: str, path: Any) -> Any:
    checkpoint = open_checkpoint(path, task)
    return (
        plugin_registry()
        .load(backend)
        .backend.build(
            checkpoint.config,
            TaskSpec(task),
            checkpoint.weights,
            BuildOptions(dtype="float32", device="cpu"),
        )
    )


def test_gradients_of_a_module_in_training_with_frozen_parameters(written: Any) -> None:
    arguments, expected, theirs, path = gradient_case(
        written, "mqa", "token_classification", "right"
    )
    model = through_the_contract("torch", "token_classification", path)
    model.native.train().model.requires_grad_(False)
    inputs = ModelInputs.prepare(model.native.config, task="token_classification", **arguments)
    with torch.no_grad():
        loss, gradients = model.loss_and_gradients(inputs)
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_near_gradients({name: model.to_numpy(g) for name, g in gradients.items()}, theirs)
    assert model.native.training
    assert model.native.model.layers[0].training
    trained = [name for name, p in model.native.named_parameters() if p.requires_grad]
    assert trained == ["score.weight", "score.bias"]


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_no_gradients_without_a_loss(written: Any, backend: str) -> None:
    ids, _, _ = padded_batch("none")
    for task, error, match in [
        ("base", UnsupportedFeature, "without a head has no loss"),
        ("causal_lm", InputError, "no labels"),
    ]:
        model = through_the_contract(backend, task, written(task)[1])
        inputs = ModelInputs.prepare(model.native.config, ids, task=task)
        with pytest.raises(error, match=match):
            model.loss_and_gradients(inputs)


@pytest.mark.parametrize("models", ["torch", "flax"], indirect=True)
def test_gradient_checkpointing_changes_no_gradient(written: Any, models: Any) -> None:
    arguments, expected, theirs, path = gradient_case(written, "gqa", "causal_lm", "left")
    model = models.framework.kind("causal_lm").from_pretrained(path)
    model.model.gradient_checkpointing = True
    loss, gradients = models.framework.gradients(model, models.arrays(arguments))
    assert loss == pytest.approx(expected, abs=1e-4)
    assert_near_gradients(gradients, theirs)
