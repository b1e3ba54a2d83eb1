"""Speculation: the tokens of the plain loop, from fewer calls of the model."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_hub import Gemma
from gemma_hub.backend import SupportsCache
from gemma_hub.errors import CapacityError, GemmaHubError, InputError
from gemma_hub.generation import loop
from gemma_hub.generation.choosing import Chooser
from gemma_hub.generation.context import can_edit
from gemma_hub.generation.drafting import DraftModel, PromptLookup, matching
from gemma_hub.generation.loop import generate_ids, stream_ids
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.rules import Row
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import DraftCounts

PROMPTS = [[2, 5, 9, 11], [2], [2, 7, 7, 7, 7, 3, 30], [2, 9, 5]]


def as_draft(model):
    return SimpleNamespace(task="causal_lm", contract=model, config=model.config)


def copied(model, noise):
    """A model with like logits: the nearer, the less noise."""
    copy = type(model)(model.config)
    copy.head = model.head + noise * np.random.default_rng(5).normal(size=model.head.shape)
    return copy


@pytest.fixture(params=["cached", "uncached"])
def model(request, rows_model, uncached_model):
    return rows_model if request.param == "cached" else uncached_model


def drawn_settings(random, vocabulary):
    """Settings of any kind, and prompts whose tokens repeat."""
    prompts = [
        random.integers(2, 12, random.integers(1, 9)).tolist() for _ in range(random.integers(1, 6))
    ]
    settings = {
        "max_new_tokens": int(random.integers(1, 28)),
        "eos_token_id": random.integers(0, vocabulary, random.integers(0, 4)).tolist(),
        "logprobs": True,
        "draft_tokens": int(random.integers(1, 9)),
    }
    if random.random() < 0.6:
        settings |= {"temperature": 0.9, "seed": int(random.integers(1 << 60)), "top_p": 0.9}
        settings["num_return_sequences"] = int(random.integers(1, 4))
    for name, value in {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 1 + settings["max_new_tokens"] // 2,
        "bad_words": [[3], [5, 6]],
        "logit_bias": {7: 2.0, 8: float("-inf")},
    }.items():
        if random.random() < 0.25:
            settings[name] = value
    return prompts, settings


def recorded(model, prompts, settings, **drafts):
    """The results, and what functions of the user were called with, row by row."""
    calls = {}

    def note(kind, row, ids, *more):
        calls.setdefault((kind, row), []).append((tuple(np.atleast_1d(ids).tolist()), *more))

    def allowed(row, ids):
        note("allowed", row, ids)
        return range(model.config.vocab_size // (2 if len(ids) % 4 == 0 else 1))

    def process(row, ids, scores):
        note("process", row, ids, scores.argmax())
        return np.roll(scores, 1) if len(ids) % 5 == 0 else scores

    def ends(row, token_id):
        note("ends", row, token_id)
        return len(calls["ends", row]) > 9 and token_id % 5 == 0

    chosen = GenerationSettings(**settings, **drafts, allowed_tokens=allowed, processors=[process])
    return generate_ids(model, model.config, prompts, chosen, ends), calls


def without_counts(results):
    return [
        dataclasses.replace(row, drafts=None, logprobs=np.round(row.logprobs, 5).tolist())
        for row in results
    ]


@pytest.mark.parametrize("kind", ["equal", "near", "wrong", "lookup"])
def test_any_settings_give_what_they_give_without_drafts(model, kind):
    noise = {"equal": 0.0, "near": 0.3, "wrong": 9.0, "lookup": 0.0}[kind]
    draft = as_draft(copied(model, noise))
    random = np.random.default_rng(list(kind.encode()))
    proposed = accepted = 0
    for trial in range(12):
        prompts, settings = drawn_settings(random, model.config.vocab_size)
        drafts = {"prompt_lookup": 1 + trial % 2} if kind == "lookup" else {"draft": draft}
        found, found_calls = recorded(model, prompts, settings, **drafts)
        expected, calls = recorded(model, prompts, settings)
        assert without_counts(found) == without_counts(expected)
        assert found_calls == calls
        assert all(row.drafts is None for row in expected)
        proposed += sum(row.drafts.proposed for row in found)
        accepted += sum(row.drafts.accepted for row in found)
    assert 0 < accepted < proposed


def test_an_equal_draft_is_always_right(model):
    for sampling in ({}, {"temperature": 1.0, "top_k": 20, "seed": 7}):
        settings = GenerationSettings(max_new_tokens=21, draft_tokens=4, **sampling)
        expected = generate_ids(model, model.config, PROMPTS, settings)
        draft = as_draft(copied(model, 0.0))
        model.calls.clear()
        found = generate_ids(
            model, model.config, PROMPTS, dataclasses.replace(settings, draft=draft)
        )
        assert [row.token_ids for row in found] == [row.token_ids for row in expected]
        assert {row.drafts for row in found} == {DraftCounts(16, 16)}
        # The prompts, whose call gives a token; and then five tokens a call.
        assert len(model.calls) == 1 + 20 // 5
        assert len(draft.contract.calls) == 1 + 4 * 4


def test_a_wrong_draft_costs_no_call_of_the_model_and_few_of_its_own(model):
    settings = GenerationSettings(max_new_tokens=41, draft_tokens=6)
    (expected,) = generate_ids(model, model.config, PROMPTS[:1], settings)
    calls = len(model.calls)
    draft = as_draft(copied(model, 0.0))
    draft.contract.head = -model.head
    model.calls.clear()
    chosen = dataclasses.replace(settings, draft=draft)
    (found,) = generate_ids(model, model.config, PROMPTS[:1], chosen)
    assert found.token_ids == expected.token_ids
    assert len(model.calls) == calls == 41
    # Six wrong ones, and then one each time: at once, and after 1, 3, 7, 7 and 7 other calls.
    assert found.drafts == DraftCounts(6 + 6, 0)
    assert len(draft.contract.calls) == 1 + 6 + 6
    if isinstance(model, SupportsCache):
        widths = [call.shape[1] for call in model.calls[1:]]
        assert widths == [7, 2, 1, 2, *[1] * 3, 2, *[1] * 7, 2, *[1] * 7, 2, *[1] * 7, 2, *[1] * 8]


def test_after_right_proposals_there_are_more(model, monkeypatch):
    """Counts of proposals by how many were right the time before."""
    truth = generate_ids(model, model.config, [[2]], GenerationSettings(max_new_tokens=40))[0]
    right = iter([8, 3, 0, 1, 2, 8, 0, 0, 8, 8, 8])
    asked = []

    class Drafter:
        def propose(self, rows, counts):
            asked.append(counts[0])
            start = len(rows[0].new)
            guess = list(truth.token_ids[start : start + counts[0]])
            if counts[0] and (known := next(right)) < counts[0]:
                guess[known] = (guess[known] + 1) % model.config.vocab_size
            return [guess]

    monkeypatch.setattr(loop, "open_drafter", lambda *arguments: Drafter())
    settings = GenerationSettings(max_new_tokens=40, prompt_lookup=1, draft_tokens=8)
    assert generate_ids(model, model.config, [[2]], settings)[0].token_ids == truth.token_ids
    assert asked == [8, 8, 7, 1, 3, 5, 8, 1, 0, 1, 3, 4]
    assert next(right, None) is None


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 8}])
def test_proposals_are_what_the_draft_would_choose(model, uncached_model, sampling, monkeypatch):
    """Whatever was refused before: nothing of it is left in what the draft has read."""
    draft = as_draft(copied(model, 0.5))
    reference = copied(uncached_model, 0.0)
    reference.head = draft.contract.head
    settings = GenerationSettings(max_new_tokens=40, eos_token_id=[4, 9], **sampling)
    propose, seen = DraftModel.propose, []

    def checked(self, rows, counts):
        proposals = propose(self, rows, counts)
        for row, count, proposal in zip(rows, counts, proposals, strict=True):
            assert len(proposal) == count
            guess = Row(row.index, row.prompt, list(row.new))
            for token_id in proposal:
                inputs = ModelInputs.prepare(model.config, [guess.token_ids])
                logits = reference.forward(inputs).logits[:, -1]
                choice = Chooser.of(settings, model.config).choose(logits, [guess])
                assert choice.token_ids.tolist() == [token_id]
                guess.new.append(token_id)
                seen.append(row.index)
        return proposals

    monkeypatch.setattr(DraftModel, "propose", checked)
    generate_ids(model, model.config, PROMPTS, dataclasses.replace(settings, draft=draft))
    assert set(seen) == {0, 1, 2, 3}


def test_a_text_that_repeats_is_copied(rows_model, monkeypatch):
    """A model that always goes from one token to a certain other one, in a circle of 3."""
    following = np.zeros(48, np.int64)
    following[[2, 5, 9, 11]] = 5, 9, 11, 5

    def outputs(features, inputs, start, valid):
        logits = 9.0 * (np.arange(48) == following[inputs.input_ids][..., None])
        return SimpleNamespace(logits=logits[:, -inputs.logits_to_keep :])

    monkeypatch.setattr(rows_model, "_outputs", outputs)
    settings = GenerationSettings(max_new_tokens=31, prompt_lookup=2, draft_tokens=9)
    (row,) = generate_ids(rows_model, rows_model.config, [[2]], settings)
    assert row.token_ids == (5, 9, 11) * 10 + (5,)
    # The first five come one by one; then ten at a time, and at the end as many as are left.
    assert row.drafts.accepted == row.drafts.proposed == 9 + 9 + 5
    assert [call.shape[1] for call in rows_model.calls] == [1] * 5 + [10, 10, 8]


def test_a_lookup_takes_the_latest_place_and_repeats_it():
    lookup = PromptLookup(2)

    def propose(ids, count):
        return lookup.propose([Row(0, np.array(ids[:1]), ids[1:])], [count])[0]

    assert propose([1, 2, 3, 1, 2, 4, 5, 1, 2], 3) == [4, 5, 1]
    assert propose([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert propose([7, 7, 7], 4) == [7, 7, 7, 7]
    assert propose([1, 2, 3, 1, 2], 0) == propose([1, 2], 3) == propose([1, 2, 2, 1], 3) == []


def test_matching_counts_what_both_begin_with():
    assert [matching([1, 2, 3], row) for row in ([], [1], [1, 2, 4], [1, 2, 3, 4])] == [0, 1, 2, 3]


def test_a_long_batch_of_rows_that_drift_apart_fits_its_cache(rows_model):
    """Rows accept different numbers, so that slots stay empty and the context is made anew."""
    config = dataclasses.replace(rows_model.config, max_position_embeddings=204)
    draft = as_draft(copied(rows_model, 0.5))
    draft.config = config
    settings = GenerationSettings(max_new_tokens=198, temperature=0.5, seed=3, eos_token_id=())
    gathered = []

    gather_rows = rows_model.gather_rows

    def counted(*arguments):
        gathered.append(arguments[2])
        return gather_rows(*arguments)

    rows_model.gather_rows = counted
    expected = generate_ids(rows_model, config, PROMPTS, settings)
    gathered.clear()
    speculative = dataclasses.replace(settings, draft=draft, draft_tokens=3)
    found = generate_ids(rows_model, config, PROMPTS, speculative)
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]
    assert len({row.drafts.accepted for row in found}) > 1
    assert 2 < len(gathered) < 198 / 4
    assert set(gathered) == {7 + 198 + 8 * 4}


def test_slots_of_one_row_are_used_again(rows_model):
    """What is refused is overwritten, so that its context is never made anew."""
    config = dataclasses.replace(rows_model.config, max_position_embeddings=204)
    draft = as_draft(copied(rows_model, 0.5))
    draft.config = config
    gathered = []
    for model in (rows_model, draft.contract):
        model.gather_rows = lambda *arguments: gathered.append(arguments)
    settings = GenerationSettings(
        max_new_tokens=190, temperature=1.5, seed=1, draft=draft, draft_tokens=3
    )
    (row,) = generate_ids(rows_model, config, [PROMPTS[0]], settings)
    assert row.drafts.proposed - row.drafts.accepted > 8 * 4  # more than there are spare slots
    assert gathered == []


def test_few_shapes_are_fed(rows_model):
    draft = as_draft(copied(rows_model, 0.5))
    settings = GenerationSettings(
        max_new_tokens=50, temperature=0.7, seed=1, draft=draft, draft_tokens=6
    )
    generate_ids(rows_model, rows_model.config, [PROMPTS[0]], settings)
    assert {call.shape[1] for call in rows_model.calls[1:]} <= {1, 2, 4, 7}
    assert {call.shape[1] for call in draft.contract.calls[1:]} <= {1, 2, 4, 8}


def test_no_more_logits_are_asked_for_than_there_are_tokens(uncached_model):
    """Five tokens are padded to eight, more than the row has."""
    plain = GenerationSettings(max_new_tokens=6)
    expected = generate_ids(uncached_model, uncached_model.config, [[2]], plain)
    uncached_model.calls.clear()
    draft = as_draft(copied(uncached_model, 0.0))
    settings = dataclasses.replace(plain, draft=draft, draft_tokens=8)
    found = generate_ids(uncached_model, uncached_model.config, [[2]], settings)
    assert found[0].token_ids == expected[0].token_ids
    sizes = [(call.logits_to_keep, call.shape[1]) for call in uncached_model.calls]
    assert sizes == [(1, 1), (6, 6)]


def test_a_prefix_goes_with_a_draft(model):
    settings = GenerationSettings(max_new_tokens=20, temperature=1.0, seed=2)
    prompts = [[2, 7, 9, 4], [2, 7, 9, 4, 6, 6]]
    expected = generate_ids(model, model.config, prompts, settings)
    prefix = Prefix(model, model.config, [2, 7, 9])
    speculative = dataclasses.replace(settings, draft=as_draft(copied(model, 0.3)))
    model.calls.clear()
    found = generate_ids(model, model.config, prompts, speculative, prefix=prefix)
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]
    assert found[0].drafts.accepted > 0
    # The prefix is not read again: what is left of the prompts is 2 and 4 tokens.
    if isinstance(model, SupportsCache):
        assert model.calls[0].shape == (2, 4)


def test_rows_that_have_ended_are_dropped_once_they_are_half(rows_model):
    settings = GenerationSettings(max_new_tokens=30)
    free = generate_ids(rows_model, rows_model.config, PROMPTS, settings)
    draft = as_draft(copied(rows_model, 0.3))
    rows_model.calls.clear()
    chosen = dataclasses.replace(
        settings, draft=draft, eos_token_id={row.token_ids[2] for row in free[:2]}
    )
    rows = generate_ids(rows_model, rows_model.config, PROMPTS, chosen)
    assert sorted(len(row.token_ids) == 30 for row in rows) == [False, False, True, True]
    for calls in (rows_model.calls, draft.contract.calls):
        sizes = [call.shape[0] for call in calls]
        assert sizes == sorted(sizes, reverse=True)
        assert {4, 2} <= set(sizes)


def test_the_last_position_can_be_used(model):
    draft = as_draft(copied(model, 0.0))
    draft.config = dataclasses.replace(model.config, max_position_embeddings=63)
    settings = GenerationSettings(max_new_tokens=15, draft=draft)
    plain = GenerationSettings(max_new_tokens=15)
    expected = generate_ids(model, model.config, [[3] * 50], plain)
    found = generate_ids(model, model.config, [[3] * 50], settings)
    assert found[0].token_ids == expected[0].token_ids
    draft.config = dataclasses.replace(model.config, max_position_embeddings=62)
    with pytest.raises(CapacityError, match=r"needs 63 positions of the draft model, which has 62"):
        stream_ids(model, model.config, [[2], [3] * 50], settings)


def test_the_plain_loop_runs_where_rows_cannot_be_edited(fake_model, uncached_model):
    assert not can_edit(fake_model)
    settings = GenerationSettings(max_new_tokens=12)
    expected = generate_ids(fake_model, fake_model.config, PROMPTS, settings)
    for model, drafts in (
        (fake_model, {"draft": as_draft(uncached_model)}),
        (uncached_model, {"draft": as_draft(fake_model)}),
        (fake_model, {"prompt_lookup": 1}),
    ):
        chosen = dataclasses.replace(settings, **drafts)
        assert generate_ids(model, model.config, PROMPTS, chosen) == expected


def test_a_draft_that_fails_says_that_it_is_the_draft(model):
    draft = as_draft(copied(model, 0.0))
    draft.contract.head[:] = np.nan
    settings = GenerationSettings(max_new_tokens=5, draft=draft)
    with pytest.raises(GemmaHubError, match=r"The draft model fails. The logits of row 0 .* NaN"):
        generate_ids(model, model.config, PROMPTS, settings)


def test_rules_that_leave_a_guess_nothing_are_no_error(model):
    """The right row ends before it runs out of tokens; a guess would go on."""
    vocabulary = model.config.vocab_size
    few = [[token] for token in range(vocabulary) if token not in {20, 21, 22, 23}]
    settings = GenerationSettings(
        max_new_tokens=12, no_repeat_ngram_size=1, bad_words=few, eos_token_id=(), draft_tokens=8
    )

    def ends(row, token_id):
        return token_id in ended

    ended = set(range(vocabulary))
    first = generate_ids(model, model.config, [[2]], settings, ends)[0].token_ids
    ended -= set(first)
    expected = generate_ids(model, model.config, [[2]], settings, ends)
    draft = as_draft(copied(model, 0.0))
    chosen = dataclasses.replace(settings, draft=draft)
    found = generate_ids(model, model.config, [[2]], chosen, ends)
    assert found[0].token_ids == expected[0].token_ids
    assert len(found[0].token_ids) == 2


def test_a_stream_can_be_left_between_the_tokens_of_one_call(model):
    settings = GenerationSettings(max_new_tokens=20, draft=as_draft(copied(model, 0.0)))
    expected = generate_ids(model, model.config, PROMPTS[:1], settings)[0].token_ids
    model.calls.clear()
    tokens = stream_ids(model, model.config, PROMPTS[:1], settings)
    assert [next(tokens).token_id for _ in range(4)] == list(expected[:4])
    tokens.close()
    assert len(model.calls) == 2
    assert generate_ids(model, model.config, PROMPTS[:1], settings)[0].token_ids == expected


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": "tiny"}, "draft is str; expected a causal language model, as gemma_hub.Gemma"),
        ({"draft": SimpleNamespace(task="base")}, "draft is a model for base; expected a causal"),
        ({"prompt_lookup": 0}, "prompt_lookup is 0; expected an integer from 1 up"),
        ({"draft_tokens": 0}, "draft_tokens is 0; expected an integer from 1 up"),
        ({"draft_tokens": 65}, "draft_tokens is 65; expected at most 64"),
        ({"prompt_lookup": 2, "num_beams": 2}, "num_beams is 2; a beam search takes no drafts"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GenerationSettings(**settings)


def test_a_draft_and_a_lookup_exclude_each_other(fake_model):
    with pytest.raises(InputError, match="Both draft and prompt_lookup are given; give one"):
        GenerationSettings(draft=as_draft(fake_model), prompt_lookup=2)


# -- a real model, and texts -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["numpy", "torch", "flax"])
def lm(request):
    return Gemma.load("tiny", backend=request.param, dtype="float32")


TEXTS = ["one two three one two three one two three one", "The fox"]
SAMPLED = {"temperature": 0.3, "seed": 5}


def assert_alike(found, expected):
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    as_found = {"logprobs": found.logprobs, "drafts": found.drafts}
    assert found == dataclasses.replace(expected, **as_found)


@pytest.mark.parametrize("drafts", ["model", "lookup"])
def test_every_backend_gives_the_same_texts(lm, drafts):
    settings = {"max_new_tokens": 20, "logprobs": True, "stop": ["; the other"], **SAMPLED}
    drafter = {"draft": lm} if drafts == "model" else {"prompt_lookup": 2}
    texts = TEXTS[:1] if lm.backend.name == "flax" else TEXTS  # it compiles for each size
    expected = lm.generate(texts, **settings)
    found = lm.generate(texts, draft_tokens=3, **drafter, **settings)
    for one, other in zip(found, expected, strict=True):
        assert_alike(one, other)
    assert [one.finish_reason for one in found] == ["stop", "length"][: len(texts)]
    assert all(one.drafts.accepted >= 10 for one in found if drafts == "model")
    assert found[0].drafts.accepted >= 4


@pytest.mark.parametrize("lm", ["torch"], indirect=True)
def test_a_stream_gives_the_same_pieces(lm):
    settings = {"max_new_tokens": 20, "draft_tokens": 3, **SAMPLED}
    expected = list(lm.stream(TEXTS[0], **settings))
    assert list(lm.stream(TEXTS[0], prompt_lookup=2, **settings)) == expected


@pytest.mark.parametrize("lm", ["torch"], indirect=True)
def test_a_draft_must_have_the_same_vocabulary(lm, tokenizer, fake_config):
    def other(vocab_size, tokenizer):
        config = dataclasses.replace(fake_config, vocab_size=vocab_size)
        return SimpleNamespace(task="causal_lm", contract=None, config=config, tokenizer=tokenizer)

    with pytest.raises(InputError, match=r"vocabulary of 300 tokens and this model one of \d+;"):
        lm.generate("One", draft=other(300, tokenizer))
    with pytest.raises(InputError, match=r"The id \d+ is '.*' in this model's vocabulary and"):
        lm.generate("One", draft=other(lm.config.vocab_size, tokenizer))
