"""Many prompts: in order, lazily, each with the tokens that a list of all prompts gives."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_hub import Gemma
from gemma_hub.errors import CapacityError, InputError, TokenizerError
from gemma_hub.generation import prompts as reading
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.many import LOOK_AHEAD, generate_many_ids
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.tasks.causal_lm import CausalLM

FREE = GenerationSettings(max_new_tokens=6, eos_token_id=())
TEXTS = ["the king", "a small dog", "", "the queen ran", "the"]


def many(model, prompts, settings=FREE, batch_size=3, prefix=None):
    return generate_many_ids(
        model, model.config, prompts, settings, batch_size=batch_size, prefix=prefix
    )


def drawn(random):
    """Prompts and settings with which rows end at different steps."""
    prompts = [
        random.integers(0, 48, random.integers(1, 14)).tolist()
        for _ in range(random.integers(1, 15))
    ]
    sampled = {"temperature": 0.9, "top_p": 0.9, "seed": int(random.integers(1 << 40))}
    sampled["num_return_sequences"] = int(random.integers(1, 4))
    settings = GenerationSettings(
        max_new_tokens=int(random.integers(1, 16)),
        eos_token_id=random.integers(0, 48, 4).tolist(),
        logprobs=True,
        **(sampled if random.random() < 0.7 else {}),
    )
    return prompts, settings


@pytest.fixture
def lm(text_model, tokenizer):
    return CausalLM(
        text_model,
        text_model.config,
        backend=SimpleNamespace(name="fake"),
        dtype="float32",
        tokenizer=tokenizer,
    )


# -- the tokens ------------------------------------------------------------------------------------


def test_the_results_are_those_of_a_list_in_its_order(any_model, monkeypatch):
    random = np.random.default_rng(2)
    for _ in range(25):
        prompts, settings = drawn(random)
        prefix = None
        if random.random() < 0.3:
            prefix = Prefix(any_model, any_model.config, [2, 9, 5])
            prompts = [[2, 9, 5, *prompt] for prompt in prompts]
        monkeypatch.setattr(reading, "CALL_COST", int(random.choice([0, 5, 256])))
        expected = generate_ids(any_model, any_model.config, prompts, settings)
        found = list(many(any_model, iter(prompts), settings, int(random.integers(1, 6)), prefix))
        assert [each.row for each in found] == list(range(len(expected)))
        copies = settings.num_return_sequences
        for each, other in zip(found, expected, strict=True):
            assert each.prompt.tolist() == prompts[each.row // copies]
            assert each.result.token_ids == other.token_ids
            assert each.result.finish_reason == other.finish_reason
            np.testing.assert_allclose(each.result.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["numpy", "torch", "flax"])
def test_every_backend_gives_them(backend):
    lm = Gemma.load("tiny", backend=backend, dtype="float32")
    texts = ["Once upon a time", "One day", "The king had", "She", "He said that"]
    settings = {"max_new_tokens": 9, "temperature": 0.9, "seed": 5, "stop": [" a", "."]}
    expected = lm.generate(texts, **settings)
    assert len({len(each.token_ids) for each in expected}) > 1  # else no place is taken over
    assert list(lm.generate_many(texts, batch_size=2, **settings)) == expected


def test_texts_and_ids_may_be_mixed(lm, tokenizer):
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, "stop": ["a", "e"]}
    expected = lm.generate(TEXTS, **settings)
    assert {each.finish_reason for each in expected} == {"stop", "length"}
    mixed = [tokenizer.encode(text) if i % 2 else text for i, text in enumerate(TEXTS)]
    assert list(lm.generate_many(mixed, batch_size=2, **settings)) == expected
    assert list(lm.generate_many([], **settings)) == []


# -- how far it reads, and what it runs ------------------------------------------------------------


def test_an_endless_iterable_is_read_as_far_as_needed(any_model):
    taken = itertools.count()
    prompts = ([2, 5 + next(taken) % 40] for _ in itertools.count())
    found = many(any_model, prompts, batch_size=3)
    assert (next(taken), any_model.calls) == (0, [])  # nothing before the first result
    for row in range(10):
        assert next(found).row == row
    assert next(taken) - 2 <= 10 + LOOK_AHEAD * 3
    found.close()


def test_a_long_row_holds_back_a_bounded_number_of_others(rows_model):
    taken = []

    def prompts():
        for number in itertools.count():
            taken.append(number)
            yield [2, 5 + number % 40]

    settings = GenerationSettings(
        max_new_tokens=40,
        eos_token_id=[40],
        allowed_tokens=lambda row, ids: [7] if row == 0 else [40],
    )
    found = many(rows_model, prompts(), settings, batch_size=4)
    assert len(next(found).result.token_ids) == 40
    assert max(taken) + 1 == LOOK_AHEAD * 4
    assert [next(found).row for _ in range(20)] == list(range(1, 21))


def test_the_next_prompt_takes_the_place_of_an_ended_row(rows_model, fake_model):
    # Row 0 of each three is long; run batch after batch, every batch takes as long as it does.
    settings = GenerationSettings(
        max_new_tokens=12,
        eos_token_id=[40],
        allowed_tokens=lambda row, ids: [7] if row % 3 == 0 else [40],
    )
    prompts = [[2, 5 + row] for row in range(18)]
    calls = {}
    for model in (rows_model, fake_model):
        assert len(list(many(model, prompts, settings))) == 18
        calls[model] = sum(call.shape[1] == 1 for call in model.calls)
    assert calls[fake_model] == 6 * 11
    assert calls[rows_model] < calls[fake_model] / 2


def test_the_sizes_are_few(rows_model, monkeypatch):
    sizes = set()
    gather = rows_model.gather_rows

    def recorded(caches, rows, max_length):
        sizes.add((len(rows), max_length))
        return gather(caches, rows, max_length)

    monkeypatch.setattr(rows_model, "gather_rows", recorded)
    random = np.random.default_rng(4)
    prompts = [random.integers(0, 48, random.integers(1, 30)).tolist() for _ in range(60)]
    settings = GenerationSettings(max_new_tokens=9, temperature=1.0, seed=1, eos_token_id=[5, 6])
    list(many(rows_model, prompts, settings, batch_size=4))
    assert {length for _, length in sizes} <= {16, 32, 64}


# -- progress --------------------------------------------------------------------------------------


class OnlyByName:
    """What a wrapper of an iterator is: it has the method for a length, and no length."""

    def __iter__(self):
        return iter(TEXTS)

    def __len__(self):
        raise TypeError("the iterator has no length")


@pytest.mark.parametrize(
    ("prompts", "copies", "total"),
    [
        (list(TEXTS), 1, 5),
        (list(TEXTS), 3, 15),
        (np.array([[2, 5], [2, 6]]), 2, 4),
        (iter(TEXTS), 1, None),
        (OnlyByName(), 2, None),
    ],
)
def test_the_progress_is_told_of_each_result(lm, prompts, copies, total):
    told, seen = [], []
    settings = {"temperature": 1.0, "seed": 3, "num_return_sequences": copies}
    results = lm.generate_many(
        prompts, batch_size=2, max_new_tokens=3, progress=lambda *now: told.append(now), **settings
    )
    assert told == []
    for result in results:
        seen.append(result)
        assert told[-1] == (len(seen), total)
    assert [done for done, _ in told] == list(range(1, len(seen) + 1))
    assert len(seen) == total or total is None


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ([2] * 70, CapacityError, "Prompt 4 has 70 tokens"),
        ([2, 99999], InputError, "Prompt 4 has the id 99999"),
        ([], InputError, "Prompt 4 has no tokens"),
        ([2.5], InputError, r"prompts\[4\] is float64"),
        (7, InputError, r"prompts\[4\] is int64 of shape \(\)"),
    ],
)
def test_a_wrong_prompt_is_an_error_in_its_place(lm, bad, error, words):
    prompts = [*TEXTS[:4], bad, "never read"]
    made = lm.generate_many(prompts, batch_size=3, max_new_tokens=4)
    assert list(itertools.islice(made, 4)) == lm.generate(TEXTS[:4], max_new_tokens=4)
    with pytest.raises(error, match=words):
        next(made)


def test_an_error_of_the_iterable_comes_through(any_model):
    def prompts():
        yield [2]
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        list(many(any_model, prompts()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": "the king"}, "The prompts are str; expected several"),
        ({"prompts": 5}, "The prompts are int"),
        ({"batch_size": 0}, "batch_size is 0; expected an integer from 1 up"),
        ({"batch_size": True}, "batch_size is True"),
        ({"eos_token_id": 99999}, "eos_token_id 99999 is not in the vocabulary"),
        ({"num_beams": 2}, "num_beams, draft and prompt_lookup are no settings of many prompts"),
        ({"prompt_lookup": 2}, "num_beams, draft and prompt_lookup"),
        ({"temprature": 1}, "no generation setting 'temprature'"),
    ],
)
def test_a_wrong_argument_is_an_error_in_the_call(lm, arguments, words):
    prompts = arguments.pop("prompts", TEXTS)
    with pytest.raises(InputError, match=words):
        lm.generate_many(prompts, **arguments)


def test_a_text_without_a_tokenizer_is_an_error_and_ids_are_not(lm):
    lm.tokenizer = None
    assert len(list(lm.generate_many([[2, 5]], max_new_tokens=2))) == 1
    with pytest.raises(TokenizerError, match="no tokenizer"):
        list(lm.generate_many(["the king"]))
