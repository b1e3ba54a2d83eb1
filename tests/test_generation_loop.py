"""The loop over a model: stops, limits, and rows that do not see one another."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.errors import CapacityError, GemmaHubError, InputError
from gemma_hub.generation.context import can_edit
from gemma_hub.generation.loop import generate_ids, stream_ids
from gemma_hub.generation.random import uniform
from gemma_hub.generation.sampling import choose, log_probabilities
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs

PROMPTS = [[2, 5, 9, 11], [2], [2, 7, 7, 7, 7, 3, 30], [2, 9, 5]]
GREEDY = GenerationSettings(max_new_tokens=12)
SAMPLED = GenerationSettings(max_new_tokens=12, temperature=1.0, top_k=20, top_p=0.95, seed=7)


@pytest.fixture(params=["cached", "uncached"])
def model(request, fake_model, uncached_model):
    return fake_model if request.param == "cached" else uncached_model


def ids(model, prompts, settings):
    return [row.token_ids for row in generate_ids(model, model.config, prompts, settings)]


def by_hand(model, prompt, settings, row=0):
    """One row at a time, one whole forward pass a token, nothing padded."""
    tokens = list(prompt)
    for step in range(settings.max_new_tokens):
        outputs = model.forward(ModelInputs.prepare(model.config, [tokens]))
        draw = None if settings.seed is None else uniform(settings.seed, np.array([row]), step)
        tokens.append(int(choose(outputs.logits[:, -1], settings, draw)[0]))
        if tokens[-1] in (settings.eos_token_ids or ()):
            break
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_gives_what_each_row_gives_by_hand(model, uncached_model, settings):
    expected = [by_hand(uncached_model, p, settings, row) for row, p in enumerate(PROMPTS)]
    assert ids(model, PROMPTS, settings) == expected
    assert len(set(expected)) == len(PROMPTS)


def test_a_rows_samples_depend_on_its_index_and_not_on_the_other_rows(model):
    first = ids(model, PROMPTS, SAMPLED)
    assert ids(model, [PROMPTS[0]], SAMPLED) == first[:1]
    others = [[4] * 20, PROMPTS[1], [6], PROMPTS[3], [8, 8]]
    assert [ids(model, others, SAMPLED)[row] for row in (1, 3)] == [first[1], first[3]]
    assert len(set(ids(model, [PROMPTS[0]] * 4, SAMPLED))) == 4


def test_equal_seeds_give_equal_samples_and_others_do_not(model):
    def sample(seed):
        return ids(model, PROMPTS, GenerationSettings(temperature=1.0, max_new_tokens=8, seed=seed))

    assert sample(3) == sample(3)
    assert len({tuple(sample(seed)) for seed in (3, 4, 3 + 2**32)}) == 3


def test_more_new_tokens_do_not_change_the_first_ones(model):
    longer = GenerationSettings(max_new_tokens=30, temperature=1.0, top_k=20, top_p=0.95, seed=7)
    assert [row[:12] for row in ids(model, PROMPTS, longer)] == ids(model, PROMPTS, SAMPLED)


def test_the_record_says_why_a_row_ended(model):
    free = ids(model, PROMPTS, GREEDY)
    stop = free[0][3]
    settings = GenerationSettings(max_new_tokens=12, eos_token_id=stop)
    for row, without in zip(
        generate_ids(model, model.config, PROMPTS, settings), free, strict=True
    ):
        if stop in without:
            end = without.index(stop) + 1
            assert (row.token_ids, row.finish_reason) == (without[:end], "stop")
        else:
            assert (row.token_ids, row.finish_reason) == (without, "length")
    reasons = {r.finish_reason for r in generate_ids(model, model.config, PROMPTS, settings)}
    assert reasons == {"stop", "length"}  # otherwise this test has shown nothing


def test_a_stop_at_the_last_possible_token_is_a_stop(model):
    (free,) = ids(model, PROMPTS[:1], GREEDY)
    last = free.index(free[-1]) + 1
    settings = GenerationSettings(max_new_tokens=last, eos_token_id=free[last - 1])
    (row,) = generate_ids(model, model.config, PROMPTS[:1], settings)
    assert (row.finish_reason, len(row.token_ids)) == ("stop", last)


def test_stop_ids_in_the_prompt_do_not_stop(model):
    settings = GenerationSettings(max_new_tokens=5, eos_token_id=[2, 7])
    free = ids(model, [PROMPTS[2]], GenerationSettings(max_new_tokens=5))
    assert not {2, 7} & set(free[0])  # otherwise the next line would show nothing
    assert ids(model, [PROMPTS[2]], settings) == free


def test_the_configs_stop_ids_apply_unless_the_settings_have_some(fake_model, fake_config):
    (free,) = ids(fake_model, PROMPTS[:1], GREEDY)
    config = dataclasses.replace(fake_config, eos_token_id=(40, free[1]))
    (stopped,) = generate_ids(fake_model, config, PROMPTS[:1], GREEDY)
    assert stopped.token_ids == free[: free.index(free[1]) + 1]
    never = GenerationSettings(max_new_tokens=12, eos_token_id=())
    assert generate_ids(fake_model, config, PROMPTS[:1], never)[0].token_ids == free


def test_finished_rows_are_masked_and_dropped_once_they_are_half(model):
    free = ids(model, PROMPTS, GREEDY)
    settings = GenerationSettings(max_new_tokens=12, eos_token_id={row[1] for row in free[:2]})
    model.calls.clear()
    rows = generate_ids(model, model.config, PROMPTS, settings)
    lengths = np.array([len(row.token_ids) for row in rows])
    assert lengths.min() < lengths.max()
    for step, call in enumerate(model.calls[1:], start=1):
        if can_edit(model) and 2 * np.sum(lengths > step) <= len(lengths):
            lengths = lengths[lengths > step]
        np.testing.assert_array_equal(call.attention_mask[:, -1], lengths > step)


def test_the_loop_ends_with_its_last_row(model):
    free = ids(model, PROMPTS, GREEDY)
    settings = GenerationSettings(max_new_tokens=12, eos_token_id={row[2] for row in free})
    model.calls.clear()
    rows = generate_ids(model, model.config, PROMPTS, settings)
    assert len(model.calls) == max(len(row.token_ids) for row in rows) <= 3


def test_prompts_are_padded_on_the_left_and_only_the_last_logits_are_computed(fake_model):
    ids(fake_model, [[5, 6, 7], [8]], GenerationSettings(max_new_tokens=2))
    prefill, decode = fake_model.calls
    assert prefill.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert prefill.attention_mask.tolist() == [[True, True, True], [False, False, True]]
    assert prefill.logits_to_keep == decode.logits_to_keep == 1
    assert decode.shape == (2, 1)
    assert decode.position_ids.tolist() == [[3], [1]]


def test_the_cache_has_exactly_the_slots_that_are_needed(fake_model, monkeypatch):
    asked = []
    make = fake_model.init_cache

    def recorded(batch_size, max_length):
        asked.append((batch_size, max_length))
        return make(batch_size, max_length)

    monkeypatch.setattr(fake_model, "init_cache", recorded)
    ids(fake_model, PROMPTS, GREEDY)
    assert asked == [(4, 7 + 12 - 1)]


def test_log_probabilities_are_those_before_temperature_and_filters(model, uncached_model):
    settings = GenerationSettings(max_new_tokens=5, temperature=0.7, top_k=3, seed=1, logprobs=True)
    (row,) = generate_ids(model, model.config, [PROMPTS[0]], settings)
    everything = [PROMPTS[0] + list(row.token_ids)]
    logits = uncached_model.forward(ModelInputs.prepare(model.config, everything)).logits[0]
    expected = log_probabilities(logits[3:-1], np.array(row.token_ids))
    np.testing.assert_allclose(row.logprobs, expected, rtol=1e-5)
    assert generate_ids(model, model.config, PROMPTS, GREEDY)[0].logprobs is None


def test_the_stream_yields_the_same_tokens_step_by_step(model):
    settings = GenerationSettings(max_new_tokens=6, eos_token_id=ids(model, PROMPTS, GREEDY)[0][2])
    tokens = list(stream_ids(model, model.config, PROMPTS, settings))
    for index, row in enumerate(generate_ids(model, model.config, PROMPTS, settings)):
        own = [token for token in tokens if token.row == index]
        assert tuple(token.token_id for token in own) == row.token_ids
        assert [t.finish_reason for t in own] == [None] * (len(own) - 1) + [row.finish_reason]
    assert [token.row for token in tokens[:4]] == [0, 1, 2, 3]


def test_a_stream_that_is_left_early_harms_nothing(model):
    expected = ids(model, PROMPTS, SAMPLED)
    tokens = stream_ids(model, model.config, PROMPTS, SAMPLED)
    next(tokens)
    tokens.close()
    assert ids(model, PROMPTS, SAMPLED) == expected


def test_two_streams_at_once_do_not_mix(model):
    settings = GenerationSettings(max_new_tokens=6)
    first, second = (stream_ids(model, model.config, [p], settings) for p in PROMPTS[:2])
    pairs = list(zip(first, second, strict=True))
    assert tuple(a.token_id for a, _ in pairs) == ids(model, PROMPTS[:1], settings)[0]
    assert tuple(b.token_id for _, b in pairs) == ids(model, PROMPTS[1:2], settings)[0]


def test_no_prompts_give_no_rows(model):
    assert generate_ids(model, model.config, [], GREEDY) == []
    assert model.calls == []


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ([[2], []], InputError, "Prompt 1 has no tokens"),
        ([[2, 48]], InputError, "Prompt 0 has the id 48 at place 1; expected 0 to 47"),
        ([[2, -1]], InputError, "has the id -1 at place 1"),
        ([[2.0, 3.0]], InputError, "Prompt 0 is float64"),
        ([[[2, 3]]], InputError, r"Prompt 0 is int64 of shape \(1, 2\)"),
        ([[2], [3] * 60], CapacityError, "needs 71 positions.*has 64.*at most 5 new tokens"),
        ([[3] * 65], CapacityError, "Shorten the prompt"),
    ],
)
def test_a_wrong_prompt_is_an_error_before_any_work(model, prompts, error, words):
    with pytest.raises(error, match=words):
        stream_ids(model, model.config, prompts, GREEDY)
    assert model.calls == []


def test_the_last_position_can_be_used(model):
    settings = GenerationSettings(max_new_tokens=5)
    assert len(ids(model, [[3] * 60], settings)[0]) == 5
    with pytest.raises(CapacityError, match=r"needs 65 positions.*at most 4 new tokens"):
        stream_ids(model, model.config, [[3] * 61], settings)


def test_a_stop_id_outside_the_vocabulary_is_an_error(model):
    settings = GenerationSettings(max_new_tokens=12, eos_token_id=[1, 48])
    with pytest.raises(InputError, match="eos_token_id 48 is not in the vocabulary"):
        stream_ids(model, model.config, PROMPTS, settings)


def test_broken_logits_are_an_error_that_names_row_and_step(model):
    model.embeddings[ids(model, PROMPTS, GREEDY)[3][1]] = np.nan
    with pytest.raises(GemmaHubError, match="row 3 at step 2 hold NaN"):
        ids(model, [[2], [2], [2], PROMPTS[3]], GenerationSettings(max_new_tokens=8))


def test_broken_logits_of_a_finished_row_are_nobodys_business(model, monkeypatch):
    free = ids(model, PROMPTS, GREEDY)
    settings = GenerationSettings(max_new_tokens=12, eos_token_id=free[0][0])
    make = model._outputs

    def broken(features, inputs, start, valid):
        outputs = make(features, inputs, start, valid)
        finished = ~inputs.attention_mask[:, -1]
        outputs.logits[finished] = np.nan
        return outputs

    monkeypatch.setattr(model, "_outputs", broken)
    assert len(ids(model, PROMPTS, settings)[0]) == 1
