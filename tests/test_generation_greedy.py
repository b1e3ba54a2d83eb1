"""Steps that the model takes by itself: the tokens, their order and the errors of plain steps."""

import numpy as np
import pytest

from gemma_hub.backend import Cache, SupportsGreedySteps
from gemma_hub.errors import CapacityError, GemmaHubError
from gemma_hub.generation import greedy
from gemma_hub.generation.beams import beam_search
from gemma_hub.generation.loop import generate_ids, stream_ids
from gemma_hub.generation.many import generate_many_ids
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs

PROMPTS = [[2, 5, 9, 11], [2], [2, 7, 7, 7, 7, 3, 30], [2, 9, 5]]
GREEDY = GenerationSettings(max_new_tokens=12)


class Clock:
    """Stands still but for what `tick` adds."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def stepping(kind):
    """The fake model `kind` with the feature.

    Attributes of a model: `asked`, the steps of each call; `rows`, the rows of each call; `most`, a
    limit of its own; `seconds`, that each step takes by `clock`.
    """

    class Stepping(kind):
        most, seconds = 99, 0.0

        def __init__(self, config):
            super().__init__(config)
            self.asked, self.rows, self.clock = [], [], Clock()

        def greedy_steps(self, token_ids, running, cache, num_steps, stops):
            assert token_ids.dtype == np.int64
            self.asked.append(num_steps)
            self.rows.append(len(running))
            cache.stepped(running, num_steps, None)
            chosen, ids = [], token_ids
            for _ in range(min(num_steps, self.most)):
                inputs = ModelInputs.prepare(
                    self.config,
                    ids[:, None],
                    running[:, None],
                    logits_to_keep=1,
                    next_position=cache.next_position,
                )
                outputs, after = self.extend(inputs, cache)
                self.clock.now += self.seconds
                logits = outputs.logits[:, -1]
                if not np.isfinite(logits[running].max(axis=1)).all():
                    break
                ids, cache = np.where(running, logits.argmax(axis=1), token_ids), after
                chosen.append(np.where(running, ids, -1))
                if np.isin(ids[running], stops).any():
                    break
            return np.array(chosen, np.int64).reshape(-1, len(running)).T, cache

    return Stepping


@pytest.fixture(params=["rows", "no rows"])
def pair(request, rows_model, fake_model, fake_config):
    """A model with the feature, and its like without."""
    plain = rows_model if request.param == "rows" else fake_model
    return stepping(type(plain))(fake_config), plain


@pytest.fixture
def model(rows_model, fake_config):
    return stepping(type(rows_model))(fake_config)


@pytest.fixture
def clock(model, monkeypatch):
    monkeypatch.setattr(greedy, "perf_counter", model.clock)
    return model.clock


def streamed(model, settings, prompts=PROMPTS, ends=None, prefix=None):
    return list(stream_ids(model, model.config, prompts, settings, ends, prefix))


def test_the_stream_is_that_of_plain_steps_to_the_order(pair):
    model, plain = pair
    assert isinstance(model, SupportsGreedySteps)
    assert not isinstance(plain, SupportsGreedySteps)
    rng = np.random.default_rng(5)
    stopped = 0
    for _ in range(60):
        prompts = [
            rng.integers(0, 48, rng.integers(1, 12)).tolist() for _ in range(rng.integers(1, 7))
        ]
        settings = GenerationSettings(
            max_new_tokens=int(rng.integers(1, 30)), eos_token_id=rng.integers(0, 48, 3).tolist()
        )
        model.most = int(rng.integers(1, 9))
        expected = streamed(plain, settings, prompts)
        assert streamed(model, settings, prompts) == expected
        stopped += len({token.finish_reason for token in expected}) == 3
    assert stopped > 20
    assert max(model.asked) > 8


def test_steps_double_and_are_never_more_than_the_rows_need(model, clock):
    tokens = streamed(model, GenerationSettings(max_new_tokens=58), PROMPTS[:1])
    assert len(tokens) == 58
    assert model.asked == [1, 2, 4, 8, 16, 26]
    model.asked.clear()
    streamed(model, GenerationSettings(max_new_tokens=1))
    assert model.asked == []
    streamed(model, GenerationSettings(max_new_tokens=2))
    assert model.asked == [1]


@pytest.mark.parametrize(
    ("seconds", "asked"),
    [(1.0, [1] * 11), (0.04, [1, 2, 2, 2, 2, 2]), (0.02, [1, 2, 4, 4]), (0.001, [1, 2, 4, 4])],
)
def test_a_call_takes_about_a_tenth_of_a_second_at_most(model, clock, seconds, asked):
    model.seconds = seconds
    streamed(model, GREEDY)
    assert model.asked == asked


def test_a_first_call_that_compiles_does_not_slow_the_others(model, clock, monkeypatch):
    extend = model.extend

    def compiling(inputs, cache):
        clock.now += 5.0 if len(model.asked) == 1 else 0.001
        return extend(inputs, cache)

    monkeypatch.setattr(model, "extend", compiling)
    streamed(model, GREEDY)
    assert model.asked == [1, 1, 2, 4, 3]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "seed": 3},
        {"logprobs": True},
        {"repetition_penalty": 1.2},
        {"min_new_tokens": 2},
        {"prompt_lookup": 2},
        {"num_beams": 2},
    ],
    ids=lambda each: next(iter(each)),
)
def test_only_plain_greedy_requests_go_ahead(model, settings):
    settings = GenerationSettings(max_new_tokens=6, **settings)
    if settings.num_beams == 1:
        assert len(streamed(model, settings)) == 24
    else:
        beam_search(model, model.config, PROMPTS, settings)
    assert model.asked == []


# -- rows that end in the middle -------------------------------------------------------------------


class Ends:
    """Ends row 1 at its fourth token, and notes what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, row, token_id):
        self.asked.append((row, token_id))
        return row == 1 and sum(each == 1 for each, _ in self.asked) == 4


def test_a_row_that_a_text_ends_is_ignored_from_there_on(pair):
    model, plain = pair
    ends, others = Ends(), Ends()
    expected = streamed(plain, GREEDY, ends=others)
    assert streamed(model, GREEDY, ends=ends) == expected
    assert ends.asked == others.asked
    assert sum(token.row == 1 for token in expected) == 4
    assert 4 in model.asked  # of which it needed but one


def test_rows_are_dropped_between_calls_only(model, clock):
    ended = {0: 5, 2: 5, 3: 6}  # within the call of 4 steps, which gives the tokens 4 to 7
    seen = []

    def ends(row, token_id):
        seen.append(row)
        return seen.count(row) == ended.get(row)

    tokens = streamed(model, GREEDY, ends=ends)
    assert [sum(token.row == row for token in tokens) for row in range(4)] == [5, 12, 5, 6]
    assert (model.asked, model.rows) == ([1, 2, 4, 4], [4, 4, 4, 1])


def test_a_call_ends_where_a_row_stops_so_that_it_leaves_at_once(model):
    free = [row.token_ids for row in generate_ids(model, model.config, PROMPTS, GREEDY)]
    model.rows.clear()
    stops = {free[row][4] for row in (0, 1, 2)}
    rows = generate_ids(
        model,
        model.config,
        PROMPTS,
        GenerationSettings(max_new_tokens=12, eos_token_id=stops),
    )
    lengths = sorted(len(row.token_ids) for row in rows)
    assert lengths[-1] > lengths[1]
    assert model.rows[0] == 4
    assert model.rows[-1] < 4


# -- errors ----------------------------------------------------------------------------------------


def breaking(model, monkeypatch, is_bad, value):
    """From now on the logits of the rows that `is_bad(inputs)` names, (B,) bool, hold `value`."""
    make = model._outputs

    def broken(features, inputs, start, valid):
        outputs = make(features, inputs, start, valid)
        outputs.logits[is_bad(inputs)] = value
        return outputs

    monkeypatch.setattr(model, "_outputs", broken)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_the_error_of_plain_steps_after_the_same_tokens(pair, value, monkeypatch):
    free = [row.token_ids for row in generate_ids(pair[1], pair[1].config, PROMPTS, GREEDY)]
    said = []
    for each in pair:
        breaking(each, monkeypatch, lambda inputs: inputs.input_ids[:, -1] == free[3][5], value)
        tokens = []
        with pytest.raises(GemmaHubError, match="at step") as caught:
            tokens.extend(stream_ids(each, each.config, PROMPTS, GREEDY))
        said.append((str(caught.value), tokens))
    assert said[0] == said[1]
    assert len(said[0][1]) >= 12


def test_broken_logits_of_an_ended_row_are_nobodys_business(model, monkeypatch):
    expected = streamed(model, GREEDY, ends=Ends())
    # Those after its fourth token, its last: within a call that goes on to the seventh.
    breaking(model, monkeypatch, lambda inputs: inputs.position_ids[:, -1] * [0, 1, 0, 0] == 4,
             np.nan)  # fmt: skip
    assert streamed(model, GREEDY, ends=Ends()) == expected
    with pytest.raises(GemmaHubError, match="row 1 at step 4 hold NaN"):
        streamed(model, GREEDY)


def test_an_error_of_the_model_comes_through_and_harms_nothing(model, monkeypatch):
    expected = streamed(model, GREEDY)
    with monkeypatch.context() as patch:
        steps = model.greedy_steps

        def interrupted(*arguments):
            if arguments[3] == 4:
                raise KeyboardInterrupt
            return steps(*arguments)

        patch.setattr(model, "greedy_steps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            streamed(model, GREEDY)
    assert streamed(model, GREEDY) == expected


def test_a_stream_that_is_left_within_a_call_harms_nothing(model):
    expected = streamed(model, GREEDY)
    tokens = stream_ids(model, model.config, PROMPTS, GREEDY)
    for _ in range(18):
        next(tokens)
    tokens.close()
    assert streamed(model, GREEDY) == expected


# -- many prompts, prefixes ------------------------------------------------------------------------


def third_rows(cut):
    """Ends every third row at its token number `cut`."""
    seen = []

    def ends(row, token_id):
        seen.append(row)
        return row % 3 == 0 and seen.count(row) == cut

    return ends


def test_many_prompts_get_the_tokens_of_plain_steps(pair):
    model, plain = pair
    rng = np.random.default_rng(8)
    for _ in range(30):
        prompts = [
            rng.integers(0, 48, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 14))
        ]
        settings = GenerationSettings(
            max_new_tokens=int(rng.integers(1, 20)), eos_token_id=rng.integers(0, 48, 3).tolist()
        )
        cut = int(rng.integers(2, 9))

        size = int(rng.integers(1, 6))
        found = []
        for each in (model, plain):
            rows = generate_many_ids(
                each, each.config, prompts, settings, batch_size=size, ends=third_rows(cut)
            )
            found.append([(row.row, row.result) for row in rows])
        assert found[0] == found[1]
    assert max(model.asked) > 4


def test_a_new_prompt_takes_a_place_as_soon_as_it_would(model, rows_model):
    """A stop ends a call, so that the next prompt is read after as many steps as without."""
    free = generate_ids(model, model.config, PROMPTS, GREEDY)
    settings = GenerationSettings(max_new_tokens=12, eos_token_id=free[1].token_ids[3])
    shapes = []
    for each in (model, rows_model):
        each.calls.clear()
        list(generate_many_ids(each, each.config, PROMPTS, settings, batch_size=2))
        shapes.append([call.shape for call in each.calls])
    assert shapes[0] == shapes[1]


def test_a_prefix_can_be_gone_on_from(pair):
    found = []
    for each in pair:
        prefix = Prefix(each, each.config, [2, 5, 9])
        prompts = [[2, 5, 9, 4], [2, 5, 9, 11, 30]]
        found.append(streamed(each, GREEDY, prompts, prefix=prefix))
    assert found[0] == found[1]
    assert pair[0].asked


# -- the book --------------------------------------------------------------------------------------


def test_the_book_of_steps_is_that_of_as_many_calls(fake_config):
    rng = np.random.default_rng(2)
    for _ in range(50):
        rows, steps = int(rng.integers(1, 5)), int(rng.integers(0, 6))
        mask = rng.random((rows, 4)) < 0.7
        cache = Cache.empty("arrays", rows, 10)
        prompt = ModelInputs.prepare(fake_config, np.ones((rows, 4), int), mask)
        cache = expected = cache.advanced(prompt, "old")
        running = rng.random(rows) < 0.6
        for _ in range(steps):
            inputs = ModelInputs.prepare(
                fake_config,
                np.ones((rows, 1), int),
                running[:, None],
                next_position=expected.next_position,
            )
            expected = expected.advanced(inputs, "new")
        before = cache.valid.copy()
        found = cache.stepped(running, steps, "new")
        assert (found.arrays, found.length) == ("new", expected.length)
        np.testing.assert_array_equal(found.valid, expected.valid)
        np.testing.assert_array_equal(found.next_position, expected.next_position)
        np.testing.assert_array_equal(cache.valid, before)
    with pytest.raises(CapacityError, match="holds 4 of 10 tokens and 7 more do not fit"):
        cache.stepped(running, 7, None)
