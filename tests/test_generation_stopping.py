"""Stop texts: found across the borders of tokens, wherever the tokenizer put them."""

import random

import pytest

from gemma_hub.generation.stopping import StoppedText
from gemma_hub.tokenizers import IncrementalDecoder

TEXTS = ["the king\n\nand the queen", "a small dog ran, a small dog sat", "§ one §§ two §", "aaab"]


@pytest.fixture
def pieces(tokenizer):
    """A text as tokens, cut at random places, so that no border is where training put it."""

    def cut(text, seed):
        draw, ids, rest = random.Random(seed), [], text
        while rest:
            size = draw.randint(1, min(6, len(rest)))
            ids += tokenizer.encode(rest[:size], add_special_tokens=False)
            rest = rest[size:]
        return ids

    return cut


def run(tokenizer, ids, stops):
    """The text, whether it stopped, the number of tokens read and the pieces given."""
    text = StoppedText(IncrementalDecoder(tokenizer, skip_special_tokens=True), stops)
    given = []
    for count, token_id in enumerate(ids, 1):
        given.append(text.push(token_id))
        if text.is_stopped:
            return text.text, True, count, given
    given.append(text.finish())
    return text.text, text.is_stopped, len(ids), given


def expected(text, stops):
    """Before the stop text that is complete first, and of those the longest."""
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "stops", [["\n\n"], ["dog", "small dog ran"], ["§§", "§ t"], ["aab", "ab"], ["queens"], ["z"]]
)
def test_where_a_text_stops_does_not_depend_on_its_tokens(tokenizer, pieces, text, stops):
    for seed in range(20):
        found, stopped, _, given = run(tokenizer, pieces(text, seed), stops)
        assert found == expected(text, stops) == "".join(given)
        assert stopped == any(stop in text for stop in stops)


def test_nothing_that_may_begin_a_stop_text_is_given_early(tokenizer, pieces):
    text = "one END two EN three END. four"
    for seed in range(20):
        said = ""
        *_, given = run(tokenizer, pieces(text, seed), ["END."])
        for piece in given:
            said += piece
            assert not said.endswith("END")
        assert said == "one END two EN three "


def test_no_token_after_the_stop_text_is_read(tokenizer):
    ids = [i for c in "abc.def" for i in tokenizer.encode(c, add_special_tokens=False)]
    text, stopped, count, _ = run(tokenizer, ids, ["c."])
    assert (text, stopped) == ("ab", True)
    assert count == len([i for c in "abc." for i in tokenizer.encode(c, add_special_tokens=False)])


def test_a_begun_stop_text_comes_at_the_end(tokenizer, pieces):
    assert run(tokenizer, pieces("so be it EN", 0), ["END"])[:2] == ("so be it EN", False)
