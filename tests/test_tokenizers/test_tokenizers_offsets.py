"""encode_with_offsets: the ids of encode, and spans in characters."""

import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer


def pieces(tokenizer, text, **options):
    ids, spans = tokenizer.encode_with_offsets(text, **options)
    return [(tokenizer.id_to_token(i), span) for i, span in zip(ids, spans, strict=True)]


def test_spans_count_characters(tokenizer):
    assert pieces(tokenizer, "é😀 the") == [
        ("<s>", (0, 0)),
        ("<0xC3>", (0, 1)),
        ("<0xA9>", (0, 1)),
        *((f"<0x{byte:02X}>", (1, 2)) for byte in "😀".encode()),
        ("▁the", (2, 6)),
    ]


def test_a_special_token_has_the_span_of_its_spelling(tokenizer):
    spelled = "the<end_of_turn>the"
    assert pieces(tokenizer, spelled)[1:] == [
        ("the", (0, 3)),
        ("<end_of_turn>", (3, 16)),
        ("the", (16, 19)),
    ]
    plain = pieces(tokenizer, spelled, allow_special=False, add_special_tokens=False)
    assert "<end_of_turn>" not in dict(plain)
    assert "".join(spelled[slice(*span)] for _, span in plain) == spelled


def test_a_literal_mark_of_a_space_is_one_character(tokenizer):
    assert pieces(tokenizer, "k▁k")[1:] == [("k", (0, 1)), ("▁k", (1, 3))]
    plain = pieces(tokenizer, "k▁k", allow_special=False)[1:]
    assert plain == [
        ("k", (0, 1)),
        *((f"<0x{byte:02X}>", (1, 2)) for byte in "▁".encode()),
        ("k", (2, 3)),
    ]


def test_empty_text(tokenizer):
    assert tokenizer.encode_with_offsets("") == ([tokenizer.bos_token_id], [(0, 0)])
    assert tokenizer.encode_with_offsets("", add_special_tokens=False) == ([], [])


WORDS = ["the ", "king", "▁", " ", "é", "日本", "😀", "<end_of_turn>", "<s>", "\n", "e\u0301"]
TEXTS = st.text(max_size=30) | st.lists(st.sampled_from(WORDS)).map("".join)


@pytest.mark.parametrize("allow_special", [False, True])
def test_spans_cover_every_text_in_order(tokenizer, allow_special):
    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text):
        options = {"allow_special": allow_special}
        ids, spans = tokenizer.encode_with_offsets(text, **options)
        assert ids == tokenizer.encode(text, **options)
        place = 0
        for i, (token_id, (start, end)) in enumerate(zip(ids[1:], spans[1:], strict=True), 1):
            # The next character, or the same one where both tokens are bytes of it.
            assert start == place or (start, end) == spans[i - 1]
            assert start < end
            token = tokenizer.id_to_token(token_id)
            if len(token) == 6 and token.startswith("<0x"):
                assert int(token[3:5], 16) in text[start:end].encode()
            else:
                assert tokenizer.decode([token_id]) == text[start:end].replace("▁", " ")
            place = end
        assert place == len(text)

    check()


def train(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the king and the queen ran to a small dog"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        minloglevel=2,
        **({"remove_extra_whitespaces": False, "normalization_rule_name": "identity"} | options),
    )
    return GemmaTokenizer(model.getvalue())


def test_unknown_text_has_its_span():
    tokenizer = train()
    text = "the 😀é x king"
    ids, spans = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.unk_token_id in ids
    assert "".join(text[slice(*span)] for span in spans) == text


@pytest.mark.parametrize(
    ("text", "surfaces"),
    [
        ("the ﬁne", ["the", " ", "ﬁ", "n", "e"]),
        ("the  king", ["the", "  king"]),
        ("Ａ king ", ["Ａ", " king"]),
    ],
)
def test_spans_are_of_the_text_before_the_vocabulary_changed_it(text, surfaces):
    tokenizer = train(remove_extra_whitespaces=True, normalization_rule_name="nfkc")
    _, spans = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    joined = "".join(text[slice(*span)] for span in dict.fromkeys(spans))
    assert joined == text.rstrip()
    assert all(surface in joined for surface in surfaces)


@pytest.mark.parametrize(("text", "words"), [(b"the", "is a bytes"), ("a\ud800", "lone surrogate")])
def test_what_is_no_text(tokenizer, text, words):
    with pytest.raises(TokenizerError, match=words):
        tokenizer.encode_with_offsets(text)
