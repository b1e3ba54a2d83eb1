"""A call that is wrong gets the same error from the classes of both frameworks."""

from typing import Any

import numpy as np
import pytest

from gemma_hub.errors import CapacityError, InputError

BATCH, LENGTH, VOCABULARY, LABELS, WIDTH = 3, 11, 61, 3, 40
IDS = np.random.default_rng(5).integers(6, VOCABULARY, (BATCH, LENGTH))
EMBEDS = np.zeros((BATCH, LENGTH, WIDTH), np.float32)
ONES = np.ones_like(IDS)


def changed(array: np.ndarray, value: int) -> np.ndarray:
    array = array.copy()
    array[1, 5] = value
    return array


# {what is wrong: (arguments, part of the message)}; each is an InputError for every class.
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "neither input": ({}, "Got neither of"),
    "both inputs": ({"input_ids": IDS, "inputs_embeds": EMBEDS}, "Got both of"),
    "ids of one axis": ({"input_ids": IDS[0]}, "expected integers of shape"),
    "ids of three axes": ({"input_ids": IDS[None]}, "expected integers of shape"),
    "ids that are no integers": ({"input_ids": IDS.astype(np.float32)}, "expected integers"),
    "ids that are bool": ({"input_ids": IDS > 9}, "expected integers"),
    "no tokens": ({"input_ids": IDS[:, :0]}, "both at least 1"),
    "no rows": ({"input_ids": IDS[:0]}, "both at least 1"),
    "an id below 0": ({"input_ids": changed(IDS, -1)}, "from -1 to .* expected 0 to 60"),
    "an id past the vocabulary": ({"input_ids": changed(IDS, 61)}, "to 61; expected 0 to 60"),
    "embeddings of another width": ({"inputs_embeds": EMBEDS[..., 1:]}, "tokens, 40"),
    "embeddings of two axes": ({"inputs_embeds": EMBEDS[0]}, "tokens, 40"),
    "embeddings of no token": ({"inputs_embeds": EMBEDS[:, :0]}, "all at least 1"),
    "a mask of other tokens": ({"input_ids": IDS, "attention_mask": ONES[:, 1:]}, r"\(3, 11\)"),
    "a mask of other rows": ({"input_ids": IDS, "attention_mask": ONES[1:]}, r"\(3, 11\)"),
    "a mask of one axis": ({"input_ids": IDS, "attention_mask": ONES[0]}, r"\(3, 11\)"),
    "positions of other tokens": ({"input_ids": IDS, "position_ids": ONES[:, 1:]}, r"\(3, 11\)"),
    "positions of other rows": ({"input_ids": IDS, "position_ids": ONES[1:]}, r"\(3, 11\)"),
    "positions that are no integers": (
        {"input_ids": IDS, "position_ids": ONES.astype(np.float32)},
        "expected integers",
    ),
}


@pytest.mark.parametrize("task", ["base", "sequence_classification"])
@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_argument(written: Any, models: Any, case: str, task: str) -> None:
    arguments, message = CALLS[case]
    model = models.read(task, written(task)[1])
    with pytest.raises(InputError, match=message):
        models.call(model, **arguments)


@pytest.mark.parametrize("position", [-1, 64])
def test_a_position_that_the_model_does_not_have(written: Any, models: Any, position: int) -> None:
    model = models.read("base", written("base")[1])
    positions = changed(ONES, position)
    with pytest.raises(CapacityError, match=r"position_ids go from .*max_position_embeddings=64"):
        models.call(model, input_ids=IDS, position_ids=positions)
    # At padding any position will do.
    models.call(model, input_ids=IDS, position_ids=positions, attention_mask=changed(ONES, 0))


FLOATS = np.zeros(IDS.shape, np.float32)
TOKEN_LABELS: dict[str, tuple[np.ndarray, str]] = {
    "below 0": (changed(ONES, -1), "labels go from -1 to 1"),
    "past the last": (changed(ONES, VOCABULARY), "to 61; expected 0 to"),
    "of fewer tokens": (ONES[:, 1:], r"shape \(3, 10\); expected integers of shape \(3, 11\)"),
    "of fewer rows": (ONES[1:], r"expected integers of shape \(3, 11\)"),
    "of one axis": (ONES[0], r"expected integers of shape \(3, 11\)"),
    "no integers": (FLOATS, r"float32.*expected integers"),
    "bool": (FLOATS == 0, r"bool.*expected integers"),
}


@pytest.mark.parametrize("task", ["causal_lm", "token_classification"])
@pytest.mark.parametrize("case", TOKEN_LABELS)
def test_wrong_labels_of_tokens(written: Any, models: Any, case: str, task: str) -> None:
    labels, message = TOKEN_LABELS[case]
    model = models.read(task, written(task)[1])
    with pytest.raises(InputError, match=message):
        models.call(model, input_ids=IDS, labels=labels)


def test_the_last_label_is_in_range_and_the_next_is_not(written: Any, models: Any) -> None:
    for task, count in {"causal_lm": VOCABULARY, "token_classification": LABELS}.items():
        model = models.read(task, written(task)[1])
        loss = models.call(model, input_ids=IDS, labels=changed(ONES, count - 1)).loss
        assert np.isfinite(loss)
        with pytest.raises(InputError, match=f"expected 0 to {count - 1}"):
            models.call(model, input_ids=IDS, labels=changed(ONES, count))


# {what is wrong: (problem type in the config, number of labels, labels, part of the message)}
SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
SEQUENCE_LABELS: dict[str, tuple[str | None, int, Any, str]] = {
    "below 0": (None, 3, [0, -1, 2], "from -1 to 2; expected 0 to 2"),
    "past the last": (None, 3, [0, 3, 2], "to 3; expected 0 to 2"),
    "past the last, in a column": (None, 3, [[0], [3], [2]], "to 3; expected 0 to 2"),
    "of fewer rows": (None, 3, [0, 1], "2 rows; expected 3"),
    "of one row": (None, 3, [0], "1 rows; expected 3"),
    "a scalar": (None, 3, 1, "expected"),
    "a choice for each token": (None, 3, ONES, "expected"),
    "no choices": (SINGLE, 3, [0.0, 1.0, 2.0], "must be integers"),
    "several, of other width": (None, 3, [[0.0, 1.0]] * 3, r"expected \(batch, 3\)"),
    "several, of fewer rows": (None, 3, [[0.0, 1.0, 1.0]] * 2, "2 rows; expected 3"),
    "several, one a row": (MULTI, 3, [0.0, 1.0, 1.0], r"expected \(batch, 3\)"),
    "numbers, one a row": (REGRESSION, 3, [0.5, 1.0, 1.0], r"expected \(batch, 3\)"),
    "one number, of fewer rows": (None, 1, [0.5, 1.0], "2 rows; expected 3"),
    "one number, of two columns": (None, 1, [[0.5, 1.0]] * 3, r"\(batch,\) or \(batch, 1\)"),
}


@pytest.mark.parametrize("case", SEQUENCE_LABELS)
def test_wrong_labels_of_sequences(written: Any, models: Any, case: str) -> None:
    kind, count, labels, message = SEQUENCE_LABELS[case]
    labels = np.array(labels)
    labels = labels.astype(np.float32) if labels.dtype.kind == "f" else labels
    stated = {"problem_type": kind} if kind else {}
    _, path = written("sequence_classification", num_labels=count, **stated)
    model = models.read("sequence_classification", path)
    with pytest.raises(InputError, match=message):
        models.call(model, input_ids=IDS, labels=labels)


def test_a_cache_that_does_not_fit_the_call(written: Any, models: Any) -> None:
    model = models.read("base", written("base")[1])
    past = models.call(model, input_ids=IDS).past_key_values
    with pytest.raises(InputError, match="have 2 rows and the cache 3"):
        models.call(model, input_ids=IDS[1:], past_key_values=past)
    for width in (LENGTH - 1, LENGTH, LENGTH + 5):
        with pytest.raises(InputError, match=r"expected \(3, 4\), or with the tokens in the cache"):
            models.call(
                model,
                input_ids=IDS[:, :4],
                attention_mask=np.ones((BATCH, width), np.int64),
                past_key_values=past,
            )


def test_positions_end_where_the_model_ends(written: Any, models: Any) -> None:
    model = models.read("base", written("base")[1])
    past = models.call(model, input_ids=IDS, position_ids=ONES.cumsum(1) + 52).past_key_values
    with pytest.raises(CapacityError, match="from 64 to 64; this model has 0 to 63"):
        models.call(model, input_ids=IDS[:, :1], past_key_values=past)
