"""GenerationSettings: what is accepted, what is refused and what is filled in."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.errors import InputError
from gemma_hub.generation.settings import GenerationSettings


def test_defaults_are_greedy():
    chosen = GenerationSettings()
    assert (chosen.max_new_tokens, chosen.temperature) == (64, 0.0)
    assert (chosen.top_k, chosen.top_p, chosen.seed, chosen.eos_token_ids) == (None,) * 4
    assert chosen.logprobs is False
    assert chosen == GenerationSettings()


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationSettings().top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 3.0),
        ("max_new_tokens", True),
        ("max_new_tokens", None),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.5"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0),
        ("top_p", 1.0001),
        ("top_p", float("nan")),
        ("top_p", "0.9"),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("eos_token_id", -1),
        ("eos_token_id", "1"),
        ("eos_token_id", [1, None]),
        ("logprobs", 1),
        ("min_new_tokens", 0),
        ("min_p", 0),
        ("min_p", 1.5),
        ("typical_p", 2),
        ("logit_bias", 3),
        ("logit_bias", {-1: 2.0}),
        ("repetition_penalty", 0),
        ("repetition_penalty", None),
        ("no_repeat_ngram_size", 0),
        ("bad_words", "one text"),
        ("bad_words", [""]),
        ("bad_words", [[3, -1]]),
        ("allowed_tokens", [1, 2]),
        ("processors", max),
        ("processors", [3]),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 7),
        ("num_return_sequences", 0),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"^{name}.* is "):
        GenerationSettings(**{name: value})


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), "1"])
def test_a_bias_is_finite_or_forbids(bias):
    with pytest.raises(InputError, match=r"logit_bias.*-inf to forbid"):
        GenerationSettings(logit_bias={3: bias})
    assert GenerationSettings(logit_bias={3: float("-inf")}).biases == ((3, float("-inf")),)


def test_settings_that_contradict_one_another_are_refused():
    with pytest.raises(InputError, match="min_new_tokens is 9 and max_new_tokens is 8"):
        GenerationSettings(min_new_tokens=9, max_new_tokens=8)
    with pytest.raises(InputError, match="num_return_sequences is 2 and temperature is 0"):
        GenerationSettings(num_return_sequences=2)


def test_a_text_among_the_bad_words_needs_a_tokenizer():
    assert GenerationSettings(bad_words=[[3, 4], (5,)]).bad_word_ids == ((3, 4), (5,))
    with pytest.raises(InputError, match="bad_words has the text 'no'; without a tokenizer"):
        _ = GenerationSettings(bad_words=["no"]).bad_word_ids


def test_numpy_numbers_become_plain_ones():
    chosen = GenerationSettings(
        temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**63), eos_token_id=(1, 2)
    )
    assert [type(v) for v in (chosen.temperature, chosen.top_k, chosen.seed)] == [float, int, int]
    assert chosen.seed == 2**63


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (7, (7,)), ([1, 107], (1, 107)), ((), ()), (np.array([3, 4]), (3, 4))],
    ids=str,
)
def test_stop_ids_become_a_tuple(given, expected):
    assert GenerationSettings(eos_token_id=given).eos_token_ids == expected


def test_a_seed_is_drawn_once_where_sampling_has_none():
    drawn = GenerationSettings(temperature=1.0)
    assert drawn.seed is not None
    assert 0 <= drawn.seed < 2**64
    assert dataclasses.replace(drawn, top_k=3).seed == drawn.seed
    assert GenerationSettings(temperature=1.0).seed != drawn.seed


def test_an_unknown_setting_names_the_nearest_and_all_known():
    with pytest.raises(InputError, match=r"'temprature'. Did you mean 'temperature'\?") as caught:
        GenerationSettings.from_dict({"max_new_tokens": 3, "temprature": 1.0})
    for field in dataclasses.fields(GenerationSettings):
        assert field.name in str(caught.value).partition("This version knows")[2]


@pytest.mark.parametrize("name", ["num_beam_groups", "diversity_penalty", "penalty_alpha"])
def test_settings_of_later_versions_are_refused(name):
    with pytest.raises(InputError, match=f"no generation setting '{name}'.*This version knows"):
        GenerationSettings.from_dict({name: 1})


def test_known_settings_pass_through():
    chosen = GenerationSettings.from_dict({"temperature": 0.8, "top_p": 0.95, "seed": 7})
    assert chosen == GenerationSettings(temperature=0.8, top_p=0.95, seed=7)
