"""Each rule against the class of transformers that does the same, on random rows."""

import numpy as np
import pytest
import torch

from gemma_hub.errors import InputError
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.rules import Row, apply_rules, check_ids
from gemma_hub.generation.sampling import kept_weights
from gemma_hub.generation.settings import GenerationSettings

theirs = pytest.importorskip("transformers.generation.logits_process")

ROWS, VOCABULARY, PROMPT, NEW = 10_000, 41, 7, 6
STOPS = (1, 4)
WORDS = [[5], [6, 7], [8, 8, 9], [10, 3]]
BIAS = {3: 2.5, 17: -4.0, 20: float("-inf")}


@pytest.fixture(scope="module")
def rows():
    """Ids of few values, so that sequences repeat."""
    drawn = np.random.default_rng(0).integers(2, 12, (ROWS, PROMPT + NEW))
    return [Row(i, ids[:PROMPT], ids[PROMPT:].tolist()) for i, ids in enumerate(drawn)]


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(1).normal(scale=3.0, size=(ROWS, VOCABULARY))


RULES = {
    "logit_bias": (
        BIAS,
        lambda: theirs.SequenceBiasLogitsProcessor({(i,): b for i, b in BIAS.items()}),
    ),
    "repetition_penalty": (1.7, lambda: theirs.RepetitionPenaltyLogitsProcessor(1.7)),
    "no_repeat_ngram_size": (2, lambda: theirs.NoRepeatNGramLogitsProcessor(2)),
    "bad_words": (WORDS, lambda: theirs.NoBadWordsLogitsProcessor(WORDS)),
    "min_new_tokens": (
        NEW + 1,
        lambda: theirs.MinNewTokensLengthLogitsProcessor(PROMPT, NEW + 1, [*STOPS], device="cpu"),
    ),
}


def expected(names, rows, logits):
    """What transformers makes of the rows, its processors in the order of `names`."""
    ids, scores = np.stack([row.token_ids for row in rows]), torch.from_numpy(logits.copy())
    for name in names:
        scores = RULES[name][1]()(torch.from_numpy(ids), scores)
    return scores.numpy()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_that_of_transformers(name, rows, logits):
    found = apply_rules(logits, rows, GenerationSettings(**{name: RULES[name][0]}), STOPS)
    np.testing.assert_array_equal(found, expected([name], rows, logits))
    assert (found != logits).any(axis=1).mean() > 0.2


@pytest.mark.parametrize("size", [1, 3, PROMPT + NEW, PROMPT + NEW + 1])
def test_sequences_of_any_size_do_not_repeat(size, rows, logits):
    settings = GenerationSettings(no_repeat_ngram_size=size)
    ids = torch.from_numpy(np.stack([row.token_ids for row in rows[:500]]))
    process = theirs.NoRepeatNGramLogitsProcessor(size)
    found = apply_rules(logits[:500], rows[:500], settings, STOPS)
    np.testing.assert_array_equal(found, process(ids, torch.from_numpy(logits[:500])).numpy())


def test_all_rules_together_in_their_order(rows, logits):
    settings = GenerationSettings(**{name: value for name, (value, _) in RULES.items()})
    found = apply_rules(logits, rows, settings, STOPS)
    np.testing.assert_array_equal(found, expected(RULES, rows, logits))


@pytest.mark.parametrize("value", [0.02, 0.3, 1.0])
def test_min_p_is_that_of_transformers(value, logits):
    kept = kept_weights(logits, GenerationSettings(temperature=1.0, min_p=value, seed=0)) > 0
    scores = theirs.MinPLogitsWarper(value)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(kept, scores > -np.inf)


@pytest.mark.parametrize("value", [0.2, 0.6, 0.95])
def test_typical_p_is_that_of_transformers(value, logits):
    kept = kept_weights(logits, GenerationSettings(temperature=1.0, typical_p=value, seed=0)) > 0
    scores = theirs.TypicalLogitsWarper(value)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(kept, scores > -np.inf)


def test_the_filters_come_one_after_the_other(logits):
    settings = GenerationSettings(
        temperature=0.7, top_k=20, top_p=0.95, min_p=0.01, typical_p=0.9, seed=0
    )
    scores = torch.from_numpy(logits)
    for warp in (
        theirs.TemperatureLogitsWarper(0.7),
        theirs.TopKLogitsWarper(20),
        theirs.TopPLogitsWarper(0.95),
        theirs.MinPLogitsWarper(0.01),
        theirs.TypicalLogitsWarper(0.9),
    ):
        scores = warp(None, scores)
    kept = kept_weights(logits, settings)
    shares = torch.softmax(scores, dim=-1).numpy()
    np.testing.assert_allclose(kept / kept.sum(axis=1, keepdims=True), shares, atol=1e-12)


def test_equal_probabilities_keep_the_lower_ids():
    flat = np.zeros((1, 8))
    for settings in ({"typical_p": 0.5}, {"top_p": 0.5}):
        kept = kept_weights(flat, GenerationSettings(temperature=1.0, seed=0, **settings))
        assert np.flatnonzero(kept[0]).tolist() == [0, 1, 2, 3]


# -- functions of the user -------------------------------------------------------------------------


def one(settings, *, logits=None, row=None):
    row = Row(0, np.array([2, 5]), [7]) if row is None else row
    return apply_rules(np.zeros((1, 9)) if logits is None else logits, [row], settings, STOPS)[0]


def test_only_allowed_tokens_are_left():
    seen = []

    def allowed(index, ids):
        seen.append((index, ids.tolist()))
        return {3, 8}

    scores = one(GenerationSettings(allowed_tokens=allowed))
    assert np.flatnonzero(scores > -np.inf).tolist() == [3, 8]
    assert seen == [(0, [2, 5, 7])]


def test_processors_run_last_and_in_order():
    def double(_, ids, scores):
        return scores * 2

    def add(_, ids, scores):
        return scores + len(ids)

    settings = GenerationSettings(logit_bias={4: 1.0}, processors=[double, add])
    assert one(settings).tolist() == [3, 3, 3, 3, 5, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([], "returned no id"),
        ([1.5], "returned float64 of shape"),
        ([9], "returned ids from 9 to 9; expected 0 to 8"),
        ([-1, 3], "returned ids from -1 to 3"),
    ],
)
def test_wrong_allowed_tokens_are_refused(returned, message):
    with pytest.raises(InputError, match=f"allowed_tokens of row 0 at step 1 {message}"):
        one(GenerationSettings(allowed_tokens=lambda index, ids: returned))


@pytest.mark.parametrize("returned", [np.zeros(8), np.zeros(9, np.int64), None])
def test_a_processor_that_returns_no_logits_is_refused(returned):
    with pytest.raises(InputError, match=r"A processor returned .* for row 0 at step 1"):
        one(GenerationSettings(processors=[lambda index, ids, scores: returned]))


def test_rules_that_leave_nothing_are_refused():
    settings = GenerationSettings(bad_words=[[token] for token in range(9)])
    with pytest.raises(InputError, match="leave row 0 no token at step 1"):
        one(settings)


@pytest.mark.parametrize(
    "settings", [{"logit_bias": {9: 1.0}}, {"bad_words": [[3, 9]]}, {"eos_token_id": 9}]
)
def test_ids_past_the_vocabulary_are_refused(settings):
    (name,) = settings
    with pytest.raises(InputError, match=f"{name} 9 is not in the vocabulary; expected 0 to 8"):
        check_ids(GenerationSettings(**settings), 9)


# -- in the loop -----------------------------------------------------------------------------------


def ids(model, prompts, **settings):
    chosen = GenerationSettings(max_new_tokens=16, **settings)
    return [row.token_ids for row in generate_ids(model, model.config, prompts, chosen)]


def test_rules_see_the_tokens_of_their_own_row(fake_model):
    prompts = [[2, 5, 9, 5, 9], [2], [2, 7, 7, 7]]
    batch = ids(fake_model, prompts, no_repeat_ngram_size=1)
    for prompt, row in zip(prompts, batch, strict=True):
        assert len({*prompt, *row}) == len(set(prompt)) + len(row)
        assert ids(fake_model, [prompt], no_repeat_ngram_size=1) == [row]


def test_no_stop_before_the_least_number_of_tokens(fake_model):
    (free,) = ids(fake_model, [[2, 5, 9]])
    stop = free[2]
    (least,) = ids(fake_model, [[2, 5, 9]], eos_token_id=stop, min_new_tokens=9)
    assert ids(fake_model, [[2, 5, 9]], eos_token_id=stop) == [free[: free.index(stop) + 1]]
    assert len(least) >= 9
    assert stop not in least[:8]


def test_several_continuations_of_each_prompt(fake_model):
    prompts = [[2, 5, 9], [2, 7]]
    found = ids(fake_model, prompts, num_return_sequences=3, temperature=1.0, seed=4)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    assert found == ids(fake_model, repeated, temperature=1.0, seed=4)
    assert len(set(found)) == 6


def test_an_error_in_a_function_leaves_the_model_usable(fake_model):
    def broken(index, token_ids):
        raise KeyError("mine")

    before = ids(fake_model, [[2, 5]])
    with pytest.raises(KeyError, match="mine"):
        ids(fake_model, [[2, 5]], allowed_tokens=broken)
    assert ids(fake_model, [[2, 5]]) == before
