"""Labels and pooling: the forms that are taken, the rules, and what is refused."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.errors import InputError
from gemma_hub.inputs import ModelInputs
from gemma_hub.problem import meaning_of_logits, problem_type

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
IDS = np.array([[2, 5, 9], [2, 7, 8]])


@pytest.fixture
def config(fake_config):
    return fake_config.with_labels(3)


def prepare(config, task, labels=None, ids=IDS, **options):
    return ModelInputs.prepare(config, ids, task=task, labels=labels, **options)


# -- the problem type ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_labels", "stated", "shape", "integers", "expected"),
    [
        (1, None, (4,), True, REGRESSION),
        (1, None, (4,), False, REGRESSION),
        (1, None, (4, 1), False, REGRESSION),
        (3, None, (4,), True, SINGLE),
        (3, None, (4, 1), True, SINGLE),
        (3, None, (4, 3), False, MULTI),
        (3, REGRESSION, (4, 3), False, REGRESSION),
        (3, REGRESSION, (4, 3), True, REGRESSION),
        (3, MULTI, (4, 3), True, MULTI),
        (1, MULTI, (4, 1), False, MULTI),
        (3, SINGLE, (4,), True, SINGLE),
    ],
)
def test_problem_type(config, num_labels, stated, shape, integers, expected):
    config = dataclasses.replace(config.with_labels(num_labels), problem_type=stated)
    assert problem_type(config, shape, integers) == expected
    assert config.problem_type == stated


def test_the_problem_type_is_inferred_anew_at_each_call(config):
    assert problem_type(config, (4,), True) == SINGLE
    assert problem_type(config, (4, 3), False) == MULTI
    assert problem_type(config, (4,), True) == SINGLE


@pytest.mark.parametrize(
    ("stated", "num_labels", "expected"),
    [(None, 1, REGRESSION), (None, 2, SINGLE), (MULTI, 2, MULTI), (REGRESSION, 2, REGRESSION)],
)
def test_what_logits_mean_without_labels(config, stated, num_labels, expected):
    config = dataclasses.replace(config.with_labels(num_labels), problem_type=stated)
    assert meaning_of_logits(config) == expected


@pytest.mark.parametrize(
    ("stated", "num_labels", "labels", "words"),
    [
        (None, 3, [0.0, 1.0], r"shape \(2,\); expected \(batch, 3\).*'multi_label.*labels' type"),
        (None, 3, [[0, 1, 0], [1, 0, 0]], r"shape \(2, 3\); expected \(batch,\).*'single_label"),
        (SINGLE, 3, [0.0, 1.0], "must be integers for problem_type 'single_label"),
        (SINGLE, 3, [True, False], "must be integers"),
        (REGRESSION, 3, [0.5, 1.0], r"expected \(batch, 3\).*'regression' \(as the config says\)"),
        (None, 1, [[0.5, 1.0]] * 2, r"expected \(batch,\) or \(batch, 1\).*'regression'"),
        (None, 3, [0, 1, 2], "labels has 3 rows; expected 2"),
        (None, 3, [0, 3], r"labels\[1\] is 3; expected 0 to 2 \(num_labels=3\)"),
        (None, 3, [-100, 0], r"labels\[0\] is -100"),
        (None, 3, [[0, 1, 2.0], [0, 0, 1]], r"labels\[0, 2\] is 2.0; expected 0 to 1"),
        (None, 3, [[0, 1, -0.5], [0, 0, 1]], r"labels\[0, 2\] is -0.5"),
        (None, 1, [0.5, np.nan], r"labels\[1\] is nan; expected a finite number"),
        (None, 3, ["a", "b"], "labels holds <U1; expected numbers"),
        (None, 3, 1, r"shape \(\); expected \(batch,\)"),
    ],
)
def test_labels_of_sequences_that_are_refused(config, stated, num_labels, labels, words):
    config = dataclasses.replace(config.with_labels(num_labels), problem_type=stated)
    with pytest.raises(InputError, match=words):
        prepare(config, "sequence_classification", labels)


@pytest.mark.parametrize(
    ("stated", "num_labels", "labels", "expected", "dtype"),
    [
        (None, 3, [2, 0], [2, 0], np.int32),
        (None, 3, [[2], [0]], [2, 0], np.int32),
        (None, 3, np.array([2, 0], np.uint8), [2, 0], np.int32),
        (None, 3, [[0, 1.0, 1], [0, 0, 0.5]], [[0, 1, 1], [0, 0, 0.5]], np.float64),
        (None, 3, np.array([[0, 1, 1]] * 2, bool), [[0, 1, 1]] * 2, np.float32),
        (MULTI, 3, [[0, 1, 1]] * 2, [[0, 1, 1]] * 2, np.float32),
        (None, 1, [3, -4], [3, -4], np.float32),
        (None, 1, np.array([[0.5], [-4]], np.float32), [0.5, -4], np.float32),
        (REGRESSION, 2, [[0.5, 1], [2, 3]], [[0.5, 1], [2, 3]], np.float64),
    ],
)
def test_labels_of_sequences_in_one_form(config, stated, num_labels, labels, expected, dtype):
    config = dataclasses.replace(config.with_labels(num_labels), problem_type=stated)
    got = prepare(config, "sequence_classification", labels).labels
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.asarray(expected))
    assert got.shape == np.shape(expected)


# -- labels of tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "last"), [("causal_lm", 47), ("token_classification", 2)])
def test_labels_of_tokens(config, task, last):
    labels = np.array([[0, last, -100], [1, 2, 0]], np.int64)
    got = prepare(config, task, labels).labels
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, labels)
    for bad in (last + 1, -1, 2**40):
        labels[1, 2] = bad
        with pytest.raises(
            InputError, match=rf"labels\[1, 2\] is {bad}; expected 0 to {last} .*or -100"
        ):
            prepare(config, task, labels)


@pytest.mark.parametrize("task", ["causal_lm", "token_classification"])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[0, 1], [0, 1]], r"labels has shape \(2, 2\); expected \(2, 3\)"),
        ([0, 1], r"labels has shape \(2,\)"),
        ([[0.0] * 3] * 2, "labels holds float64; expected integers, one for each token"),
        ([[True] * 3] * 2, "labels holds bool"),
        ([[-100] * 3] * 2, "No label counts"),
    ],
)
def test_labels_of_tokens_that_are_refused(config, task, labels, words):
    with pytest.raises(InputError, match=words):
        prepare(config, task, labels)


def test_nothing_predicts_the_first_token(config):
    labels = [[5, -100, -100], [7, -100, -100]]
    with pytest.raises(InputError, match="a row's first, which nothing predicts"):
        prepare(config, "causal_lm", labels)
    # A part of a larger batch may have none; its sum is 0.
    assert prepare(config, "causal_lm", labels, num_items_in_batch=4).num_items_in_batch == 4
    prepare(config, "token_classification", [[1, -100, -100]] * 2)


def test_unsigned_labels(config):
    got = prepare(config, "causal_lm", np.array([[1, 2, 3]] * 2, np.uint8)).labels
    np.testing.assert_array_equal(got, [[1, 2, 3]] * 2)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "4"])
def test_a_number_of_items_that_is_no_number(config, count):
    with pytest.raises(InputError, match=r"num_items_in_batch is .*; expected an integer from 1"):
        prepare(config, "causal_lm", IDS, num_items_in_batch=count)


def test_a_number_of_items_without_a_sum_over_tokens(config):
    with pytest.raises(InputError, match="no labels were given"):
        prepare(config, "causal_lm", num_items_in_batch=3)
    with pytest.raises(InputError, match="this loss is a mean over rows"):
        prepare(config, "sequence_classification", [0, 1], num_items_in_batch=3)


def test_logits_to_keep_is_a_causal_lms_without_labels(config):
    assert prepare(config, "causal_lm", logits_to_keep=2).logits_to_keep == 2
    with pytest.raises(InputError, match="labels were given; a loss needs them all"):
        prepare(config, "causal_lm", IDS, logits_to_keep=1)
    for task in ("base", "sequence_classification", "token_classification"):
        with pytest.raises(InputError, match=f"the task '{task}' has no such choice"):
            prepare(config, task, logits_to_keep=1)


def test_a_base_model_has_no_loss(config):
    with pytest.raises(InputError, match="task 'base' has no loss"):
        prepare(config, "base", IDS)


# -- pooling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "mask", "pad", "expected"),
    [
        # By the mask, whatever the ids say: padding on either side, both, none, and in between.
        ([[5, 6, 0], [0, 5, 6]], [[1, 1, 0], [0, 1, 1]], 0, [1, 2]),
        ([[0, 5, 6, 0]], [[0, 1, 1, 0]], 0, [2]),
        ([[5, 6, 7]], [[1, 1, 1]], 0, [2]),
        ([[5, 6, 7]], [[1, 0, 1]], 0, [2]),
        ([[5, 0, 0]], [[1, 1, 0]], 0, [1]),  # a real token that has the padding id
        ([[5, 6, 7], [5, 6, 7]], [[0, 0, 0], [1, 0, 0]], 0, [0, 0]),
        ([[5, 6, 7], [5, 6, 7]], [[1, 1, 0], [1, 0, 0]], None, [1, 0]),
        # By the ids where there is no mask.
        ([[5, 6, 0], [0, 5, 6]], None, 0, [1, 2]),
        ([[0, 5, 0, 6, 0]], None, 0, [3]),
        ([[0, 0, 0], [1, 1, 1]], None, 0, [0, 2]),
        ([[5, 6, 1]], None, 1, [1]),
        ([[5, 6, 0]], None, None, [2]),
    ],
)
def test_pooled_positions(config, ids, mask, pad, expected):
    config = dataclasses.replace(config, pad_token_id=pad)
    inputs = prepare(config, "sequence_classification", ids=ids, attention_mask=mask)
    assert inputs.pooled_positions.dtype == np.int32
    np.testing.assert_array_equal(inputs.pooled_positions, expected)


def test_pooled_positions_of_embeddings(config):
    embeds = np.zeros((2, 3, 8), np.float32)
    inputs = prepare(config, "sequence_classification", ids=None, inputs_embeds=embeds)
    np.testing.assert_array_equal(inputs.pooled_positions, [2, 2])
    mask = [[1, 1, 0], [0, 1, 1]]
    inputs = prepare(
        config, "sequence_classification", ids=None, inputs_embeds=embeds, attention_mask=mask
    )
    np.testing.assert_array_equal(inputs.pooled_positions, [1, 2])


def test_rows_without_an_end(config):
    config = dataclasses.replace(config, pad_token_id=None)
    with pytest.raises(InputError, match="2 rows, and neither an attention_mask nor pad_token_id"):
        prepare(config, "sequence_classification")
    prepare(config, "sequence_classification", attention_mask=[[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize("task", ["base", "causal_lm", "token_classification"])
def test_only_a_sequence_classifier_pools(config, task):
    assert prepare(dataclasses.replace(config, pad_token_id=None), task).pooled_positions is None
