"""A prefix: read once, continued often, with the tokens of the joined prompts."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_hub import Gemma
from gemma_hub.errors import CapacityError, InputError, TokenizerError
from gemma_hub.generation.context import can_edit
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.tasks.causal_lm import CausalLM

FIRST = [2, 9, 4, 30, 11, 7]
SETTINGS = GenerationSettings(max_new_tokens=6, eos_token_id=())
TEXT = "the king and the queen"


def ids(model, prompts, settings=SETTINGS, prefix=None):
    found = generate_ids(model, model.config, prompts, settings, prefix=prefix)
    return [(row.token_ids, row.finish_reason) for row in found]


def num_tokens(calls):
    """Real tokens that a model was given."""
    return sum(int(call.attention_mask.sum()) for call in calls)


@pytest.fixture
def lm(request, text_model, tokenizer):
    return CausalLM(
        text_model,
        text_model.config,
        backend=SimpleNamespace(name="fake"),
        dtype="float32",
        tokenizer=tokenizer,
    )


# -- the tokens ------------------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_joined_prompts(any_model):
    random = np.random.default_rng(1)
    for _ in range(25):
        first = random.integers(0, 48, random.integers(1, 12)).tolist()
        tails = [
            random.integers(0, 48, random.integers(0, 9)).tolist()
            for _ in range(random.integers(1, 5))
        ]
        sampled = {"temperature": 0.9, "top_p": 0.9, "seed": int(random.integers(1 << 40))}
        settings = GenerationSettings(
            max_new_tokens=int(random.integers(1, 12)),
            eos_token_id=random.integers(0, 48, 3).tolist(),
            **(sampled | {"num_return_sequences": 2} if random.random() < 0.6 else {}),
        )
        joined = [first + tail for tail in tails]
        prefix = Prefix(any_model, any_model.config, first)
        expected = ids(any_model, joined, settings)
        assert ids(any_model, joined, settings, prefix) == expected
        assert ids(any_model, joined, settings, prefix) == expected  # nothing is used up


@pytest.mark.parametrize("backend", ["numpy", "torch", "flax"])
def test_every_backend_continues_a_prefix(backend):
    lm = Gemma.load("tiny", backend=backend, dtype="float32")
    prefix = lm.prefix("Once upon a time there was a king.")
    texts = ["", " He had a dog", " One day"]
    tails = [lm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    settings = {"max_new_tokens": 8, "temperature": 0.9, "seed": 3, "num_return_sequences": 2}
    joined = lm.generate(input_ids=[[*prefix.token_ids, *tail] for tail in tails], **settings)
    assert lm.generate(texts, prefix=prefix, **settings) == joined


# -- the work --------------------------------------------------------------------------------------


def test_the_prefix_is_read_once(rows_model):
    prefix = Prefix(rows_model, rows_model.config, FIRST)
    assert num_tokens(rows_model.calls) == len(FIRST) - 1
    rows_model.calls.clear()
    one = dataclasses.replace(SETTINGS, max_new_tokens=1)
    ids(rows_model, [[*FIRST, 5, 6], FIRST], one, prefix)
    # Each prompt reads its own tokens and the prefix's last, which gives the logits.
    assert num_tokens(rows_model.calls) == 3 + 1


def test_a_backend_that_cannot_repeat_rows_reads_it_again(fake_model):
    assert not can_edit(fake_model)
    prefix = Prefix(fake_model, fake_model.config, FIRST)
    assert (fake_model.calls, prefix.context) == ([], None)
    ids(fake_model, [[*FIRST, 5]], dataclasses.replace(SETTINGS, max_new_tokens=1), prefix)
    assert num_tokens(fake_model.calls) == len(FIRST) + 1


def test_the_memory_is_free_when_the_prefix_is_gone(rows_model):
    prefix = Prefix(rows_model, rows_model.config, FIRST)
    arrays = weakref.ref(prefix.context._cache.arrays)
    ids(rows_model, [[*FIRST, 5]], SETTINGS, prefix)
    assert arrays() is not None
    del prefix
    gc.collect()
    assert arrays() is None


# -- texts -----------------------------------------------------------------------------------------


def test_a_text_after_a_prefix_gets_no_bos(lm, tokenizer):
    prefix = lm.prefix(TEXT)
    assert prefix.token_ids == tuple(tokenizer.encode(TEXT))
    made = lm.generate([" ran", ""], prefix=prefix, max_new_tokens=5)
    tail = tokenizer.encode(" ran", add_special_tokens=False)
    assert made[0].prompt_token_ids == (*prefix.token_ids, *tail)
    assert made[1].prompt_token_ids == prefix.token_ids
    rows = [made[0].prompt_token_ids, made[1].prompt_token_ids]
    assert made == lm.generate(input_ids=rows, max_new_tokens=5)


def test_every_call_takes_a_prefix(lm):
    prefix = lm.prefix(input_ids=np.array([2, 5, 9]))
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 4}
    (expected,) = lm.generate(input_ids=[[2, 5, 9]], **settings)
    assert lm.generate(prefix=prefix, **settings) == expected
    assert lm.generate("", prefix=prefix, **settings) == expected
    assert lm.generate(input_ids=[[]], prefix=prefix, **settings) == [expected]
    assert list(lm.generate_many([""], prefix=prefix, **settings)) == [expected]
    for prompt in ("", None):
        pieces = lm.stream(prompt, prefix=prefix, **settings)
        assert "".join(piece.text for piece in pieces) == expected.text
    both = lm.generate(prefix=prefix, num_return_sequences=2, **settings)
    assert both[0] == expected


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"text": ["a"]}, InputError, "A prefix is one text; got list"),
        ({}, InputError, "neither of a prompt and input_ids"),
        ({"text": "a", "input_ids": [2]}, InputError, "both of a prompt and input_ids"),
        ({"input_ids": []}, InputError, "The prefix has no tokens"),
        ({"input_ids": [[2]]}, InputError, r"int64 of shape \(1, 1\)"),
        ({"input_ids": [2, 99999]}, InputError, "The prefix has the id 99999 at place 1"),
        ({"input_ids": [2] * 65}, CapacityError, "65 tokens and this model has 64 positions"),
    ],
)
def test_a_wrong_prefix_is_an_error_before_any_work(lm, arguments, error, words):
    with pytest.raises(error, match=words):
        lm.prefix(**arguments)
    assert lm.contract.calls == []


def test_a_prefix_of_another_model_is_an_error(any_model):
    other = type(any_model)(any_model.config)
    prefix = Prefix(other, other.config, FIRST)
    with pytest.raises(InputError, match="read by another model"):
        generate_ids(any_model, any_model.config, [FIRST], SETTINGS, prefix=prefix)


def test_a_prompt_that_begins_otherwise_is_an_error(any_model):
    prefix = Prefix(any_model, any_model.config, FIRST)
    with pytest.raises(InputError, match="Prompt 1 does not begin with the ids of its prefix"):
        generate_ids(any_model, any_model.config, [FIRST, FIRST[:-1]], SETTINGS, prefix=prefix)


def test_no_room_after_a_prefix_says_how_long_it_is(lm):
    prefix = lm.prefix(input_ids=[2] * 60)
    for call in (lm.generate, lm.stream):
        with pytest.raises(CapacityError, match=r"62 tokens \(60 of them its prefix\).*at most 3"):
            call(lm.tokenizer.decode([5, 5]), prefix=prefix, max_new_tokens=4)


def test_what_is_no_prefix_is_an_error(lm):
    for call in (lm.generate, lm.stream, lambda *a, **k: lm.generate_many([*a], **k)):
        with pytest.raises(InputError, match="prefix is str; expected what the model's prefix"):
            call("a", prefix="the king")


def test_a_text_needs_a_tokenizer_and_ids_do_not(lm):
    lm.tokenizer = None
    with pytest.raises(TokenizerError, match="no tokenizer"):
        lm.prefix("the king")
    assert lm.prefix(input_ids=[2, 5]).token_ids == (2, 5)


# -- a prefix that goes on from another ------------------------------------------------------------


def test_what_an_earlier_prefix_has_read_is_not_read_again(any_model):
    random = np.random.default_rng(2)
    for _ in range(25):
        earlier = random.integers(0, 48, random.integers(1, 12)).tolist()
        shared = int(random.integers(0, len(earlier) + 1))
        later = earlier[:shared] + random.integers(0, 48, random.integers(1, 9)).tolist()
        known = Prefix(any_model, any_model.config, earlier)
        prefix = Prefix(any_model, any_model.config, later, known)
        tail = random.integers(0, 48, random.integers(0, 5)).tolist()
        expected = ids(any_model, [later + tail])
        assert ids(any_model, [later + tail], prefix=prefix) == expected, (earlier, later, tail)
        again = ids(any_model, [earlier + tail], prefix=known)
        assert again == ids(any_model, [earlier + tail]), "the earlier one is as it was"


def test_only_the_new_tokens_are_read(rows_model):
    known = Prefix(rows_model, rows_model.config, FIRST)
    rows_model.calls.clear()
    longer = Prefix(rows_model, rows_model.config, [*FIRST, 5, 6], known)
    assert num_tokens(rows_model.calls) == 2
    rows_model.calls.clear()
    Prefix(rows_model, rows_model.config, [*FIRST[:3], 8, 9, 10], longer)
    assert num_tokens(rows_model.calls) == 2


def test_an_earlier_prefix_must_be_the_same_model_s(lm, rows_model):
    known = lm.prefix(TEXT)
    with pytest.raises(InputError, match="read by another model"):
        Prefix(rows_model, rows_model.config, FIRST, known)
    with pytest.raises(InputError, match="prefix is str"):
        lm.prefix(TEXT, known=TEXT)
    assert lm.prefix(TEXT + " ran", known=known).token_ids[:3] == known.token_ids[:3]
