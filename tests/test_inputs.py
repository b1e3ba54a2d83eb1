"""ModelInputs.prepare: what backends may rely on, and errors that name the value and its place."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, GemmaHubError, InputError
from gemma_hub.inputs import ModelInputs

CONFIG = GemmaConfig(
    vocab_size=50,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    max_position_embeddings=8,
)


def prepare(*args, **kwargs) -> ModelInputs:
    return ModelInputs.prepare(CONFIG, *args, **kwargs)


# -- what comes out --------------------------------------------------------------------------------


def test_nested_lists():
    inputs = prepare([[2, 5, 9], [2, 6, 7]])
    assert inputs.input_ids.tolist() == [[2, 5, 9], [2, 6, 7]]
    assert inputs.attention_mask.tolist() == [[True] * 3] * 2
    assert inputs.position_ids.tolist() == [[0, 1, 2]] * 2
    assert inputs.inputs_embeds is None
    assert inputs.shape == (2, 3)
    types = (inputs.input_ids.dtype, inputs.attention_mask.dtype, inputs.position_ids.dtype)
    assert types == (np.int32, np.bool_, np.int32)
    assert (inputs.output_hidden_states, inputs.logits_to_keep) == (False, 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_every_type_of_integer(dtype):
    ids = np.array([[2, 49]], dtype)
    inputs = prepare(ids, np.array([[0, 1]], dtype), np.array([[0, 7]], dtype))
    assert inputs.input_ids.tolist() == [[2, 49]]
    assert inputs.attention_mask.tolist() == [[False, True]]
    assert inputs.position_ids.tolist() == [[0, 7]]


def test_arrays_of_another_framework():
    class Foreign:
        def __array__(self, dtype=None, copy=None):
            return np.array([[2, 3]])

    assert prepare(Foreign()).input_ids.tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [0, 0, 0, 1]),
        ([1, 1, 0, 0], [0, 1, 0, 0]),
        ([0, 1, 1, 0], [0, 0, 1, 0]),
        ([1, 0, 0, 1], [0, 0, 0, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
    ids=["none", "left", "right", "both", "middle", "all"],
)
def test_positions_count_real_tokens_only(mask, positions):
    ids = [[9, 9, 9, 9], [1, 2, 3, 4]]
    inputs = prepare(ids, [[1, 1, 1, 1], mask])
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3], positions]


def test_positions_go_on_from_a_cache():
    inputs = prepare([[1, 2, 3], [1, 2, 3]], [[1, 1, 1], [0, 1, 1]], next_position=np.array([4, 0]))
    assert inputs.position_ids.tolist() == [[4, 5, 6], [0, 0, 1]]


def test_given_positions_are_kept_and_padding_is_zero():
    inputs = prepare([[1, 2, 3], [4, 5, 6]], [[0, 1, 1], [1, 1, 1]], [[-1, 3, 4], [5, 0, 0]])
    assert inputs.position_ids.tolist() == [[0, 3, 4], [5, 0, 0]]


def test_one_row_of_positions_is_for_all_rows():
    inputs = prepare([[1, 2], [3, 4]], [[1, 1], [0, 1]], [[5, 6]])
    assert inputs.position_ids.tolist() == [[5, 6], [0, 6]]


@pytest.mark.parametrize("mask", [[[True, False]], [[1.0, 0.0]], [[1, 0]]])
def test_every_type_of_mask(mask):
    assert prepare([[1, 2]], mask).attention_mask.tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_embeddings_instead_of_ids(dtype):
    embeds = np.ones((2, 3, 4), dtype)
    inputs = prepare(inputs_embeds=embeds, attention_mask=[[0, 1, 1], [1, 1, 1]])
    assert inputs.input_ids is None
    assert inputs.inputs_embeds.dtype == dtype
    assert inputs.shape == (2, 3)
    assert inputs.position_ids.tolist() == [[0, 0, 1], [0, 1, 2]]


def test_options_are_passed_on():
    inputs = prepare([[1, 2]], output_hidden_states=True, logits_to_keep=1)
    assert (inputs.output_hidden_states, inputs.logits_to_keep) == (True, 1)


def test_the_callers_arrays_are_not_shared():
    ids, mask = np.array([[1, 2]], np.int32), np.array([[True, True]])
    inputs = prepare(ids, mask)
    ids[:], mask[:] = 7, False
    assert inputs.input_ids.tolist() == [[1, 2]]
    assert inputs.attention_mask.all()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 8))))
def test_positions_of_any_mask(mask):
    inputs = prepare(np.ones(mask.shape, int), mask)
    for row, positions in zip(mask, inputs.position_ids, strict=True):
        assert positions[row].tolist() == list(range(row.sum()))
        assert not positions[~row].any()


# -- what is refused -------------------------------------------------------------------------------


def test_exactly_one_of_ids_and_embeddings():
    with pytest.raises(
        InputError, match="neither of input_ids and inputs_embeds; give exactly one"
    ):
        prepare()
    with pytest.raises(InputError, match="both of input_ids and inputs_embeds"):
        prepare([[1]], inputs_embeds=np.ones((1, 1, 4), np.float32))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3, 50]], r"input_ids\[1, 1\] is 50; expected 0 to 49"),
        ([[1, -1]], r"input_ids\[0, 1\] is -1; expected 0 to 49"),
        ([[2**40]], r"input_ids\[0, 0\] is 1099511627776"),
        (np.array([[2**63]], np.uint64), r"input_ids\[0, 0\] is 9223372036854775808"),
        ([1, 2], r"input_ids has shape \(2,\); expected \(batch, tokens\)"),
        (3, r"input_ids has shape \(\)"),
        ([[[1]]], r"input_ids has shape \(1, 1, 1\)"),
        (np.ones((0, 3), int), r"input_ids has shape \(0, 3\); .*both at least 1"),
        (np.ones((2, 0), int), r"input_ids has shape \(2, 0\); .*both at least 1"),
        ([[1.0, 2.0]], "input_ids holds float64; expected integers"),
        ([[True]], "input_ids holds bool; expected integers"),
        ([["a"]], "input_ids holds .*; expected integers"),
        ([[1, 2], [3]], "input_ids cannot become an array .*need padding and an attention_mask"),
        ([[2**70]], "input_ids holds object; expected integers"),
    ],
)
def test_ids(ids, message):
    with pytest.raises(InputError, match=message):
        prepare(ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1]], r"attention_mask has shape \(1, 1\); expected \(1, 2\)"),
        ([1, 1], r"attention_mask has shape \(2,\); expected \(1, 2\)"),
        ([[1, 2]], r"attention_mask\[0, 1\] is 2; expected 1 at a real token and 0 at padding"),
        ([[-1.0, 0.0]], r"attention_mask\[0, 0\] is -1\.0"),
        ([[1.0, float("nan")]], r"attention_mask\[0, 1\] is nan"),
        ([["1", "0"]], "attention_mask holds .*; expected 0 and 1"),
        ([[1, 0], [1]], "attention_mask cannot become an array"),
    ],
)
def test_mask(mask, message):
    with pytest.raises(InputError, match=message):
        prepare([[1, 2]], mask)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0]], r"position_ids has shape \(1, 1\); expected \(2, 2\)"),
        ([0, 1], r"position_ids has shape \(2,\); expected \(2, 2\)"),
        ([[0.0, 1.0]], "position_ids holds float64; expected integers"),
        ([[0, 1], [0]], "position_ids cannot become an array"),
    ],
)
def test_positions(positions, message):
    with pytest.raises(InputError, match=message):
        prepare([[1, 2], [3, 4]], position_ids=positions)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1], [0, 8]], r"position_ids\[1, 1\] is 8; this model has positions 0 to 7"),
        ([[0, -1], [0, 1]], r"position_ids\[0, 1\] is -1"),
        ([[0, 2**32], [0, 1]], r"position_ids\[0, 1\] is 4294967296"),
        (np.array([[0, 2**64 - 1]], np.uint64), r"position_ids\[0, 1\] is 18446744073709551615"),
    ],
)
def test_positions_past_the_limit(positions, message):
    with pytest.raises(CapacityError, match=message):
        prepare([[1, 2], [3, 4]], position_ids=positions)


def test_more_tokens_than_positions():
    assert prepare([[1] * 8]).position_ids.max() == 7
    with pytest.raises(
        CapacityError, match=r"position_ids\[0, 8\] is 8.*max_position_embeddings=8"
    ):
        prepare([[1] * 9])
    with pytest.raises(CapacityError, match=r"position_ids\[0, 1\] is 8"):
        prepare([[1, 2]], next_position=np.array([7]))


def test_padding_takes_no_position():
    mask = [[0] * 5 + [1] * 8]
    assert prepare([[1] * 13], mask).position_ids.max() == 7


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (np.ones((2, 3, 5), np.float32), r"shape \(2, 3, 5\); expected \(batch, tokens, 4\)"),
        (np.ones((2, 4), np.float32), r"inputs_embeds has shape \(2, 4\)"),
        (np.ones((0, 3, 4), np.float32), r"inputs_embeds has shape \(0, 3, 4\)"),
        (
            np.ones((1, 3, 4), np.int32),
            "inputs_embeds holds int32; expected floating-point numbers",
        ),
        (np.ones((1, 3, 4), np.complex64), "inputs_embeds holds complex64"),
        (np.full((1, 3, 4), "a"), "inputs_embeds holds <U1"),
    ],
)
def test_embeddings(embeds, message):
    with pytest.raises(InputError, match=message):
        prepare(inputs_embeds=embeds)


@pytest.mark.parametrize("cause", [TypeError, RuntimeError])
def test_array_that_numpy_cannot_take(cause):
    class OnDevice:
        def __array__(self, dtype=None, copy=None):
            raise cause("it is on the device")

    with pytest.raises(
        InputError, match=r"input_ids cannot become a NumPy array \(it is on the dev"
    ):
        prepare(OnDevice())


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, None])
def test_logits_to_keep(value):
    with pytest.raises(InputError, match=r"logits_to_keep is .*; expected an integer from 0 up"):
        prepare([[1, 2]], logits_to_keep=value)


def test_errors_are_value_errors():
    with pytest.raises(ValueError, match="input_ids"):
        prepare([[99]])
    assert issubclass(CapacityError, InputError)
    assert issubclass(InputError, GemmaHubError)
