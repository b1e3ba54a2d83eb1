"""IncrementalDecoder: the pieces add up to the whole, and no piece ends inside a character."""

import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, IncrementalDecoder

SIZE = 300


def _tokenizer() -> GemmaTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a king had a son and a daughter"] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["<end_of_turn>", "\n"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return GemmaTokenizer(model.getvalue())


TOKENIZER = _tokenizer()
BYTES = [TOKENIZER.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
any_id = st.one_of(st.integers(0, TOKENIZER.vocab_size - 1), st.sampled_from(BYTES[0x80:]))


def pieces(ids: list[int], **options) -> list[str]:
    decoder = IncrementalDecoder(TOKENIZER, **options)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(any_id, max_size=25), skip=st.booleans())
def test_pieces_add_up_to_the_whole(ids, skip):
    whole = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(ids, skip_special_tokens=skip)) == whole


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20))
def test_a_character_comes_whole_and_with_its_last_token(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False, allow_special=False)
    decoder = IncrementalDecoder(TOKENIZER)
    so_far = ""
    for count, token_id in enumerate(ids, start=1):
        so_far += decoder.push(token_id)
        # All that the ids so far spell, less an unfinished character.
        certain = TOKENIZER.decode(ids[:count])
        while not text.startswith(certain):
            assert certain.endswith("\ufffd")
            certain = certain[:-1]
        if "\ufffd" not in text:
            assert so_far == certain
    assert so_far == text
    assert decoder.finish() == ""


def test_a_wizard_comes_with_his_fourth_byte():
    wizard = [BYTES[byte] for byte in "🧙".encode()]
    assert pieces(wizard) == ["", "", "", "🧙", ""]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xe2\x82", ["", "", "\ufffd\ufffd"]),
        (b"\xff\xe2\x82\xac", ["\ufffd", "", "", "€", ""]),
        (b"\xe2\xe2\x82\xac", ["", "\ufffd", "", "€", ""]),
        (b"\x80a", ["\ufffd", "a", ""]),
        (b"\xc0\x80", ["\ufffd", "\ufffd", ""]),
        # A surrogate: Python's decoder waits for its third byte before it says no.
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd", ""]),
    ],
)
def test_bytes_that_make_no_character_come_out_as_soon_as_that_is_certain(data, expected):
    assert pieces([BYTES[byte] for byte in data]) == expected


def test_an_unfinished_character_gives_way_to_what_follows():
    letter = TOKENIZER.token_to_id("a")
    assert pieces([BYTES[0xE2], BYTES[0x82], letter]) == ["", "", "\ufffd\ufffda", ""]


def test_special_tokens_are_spelled_or_skipped():
    ids = [2, *TOKENIZER.encode("a<end_of_turn>\n", add_special_tokens=False)]
    assert pieces(ids) == ["<s>", "a", "<end_of_turn>", "\n", ""]
    assert pieces(ids, skip_special_tokens=True) == ["", "a", "", "\n", ""]


def test_finish_leaves_a_fresh_decoder():
    decoder = IncrementalDecoder(TOKENIZER)
    assert decoder.push(BYTES[0xE2]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(TOKENIZER.token_to_id("a")) == "a"
    assert decoder.finish() == ""


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="no token 99999"):
        IncrementalDecoder(TOKENIZER).push(99_999)
