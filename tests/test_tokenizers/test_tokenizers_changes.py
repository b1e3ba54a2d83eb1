"""What changes a tokenizer: added tokens and settings; copies of it, and threads."""

import copy
import pickle
import sys
import threading

import pytest

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast

A, B = "a king had a son", "the old woman"


@pytest.fixture(scope="module", params=[GemmaTokenizer, GemmaTokenizerFast])
def kind(request):
    return request.param


@pytest.fixture
def tok(kind, model):
    return kind(model)


def words(tok, ids):
    return tok.convert_ids_to_tokens(ids)


# -- added tokens and settings ---------------------------------------------------------------------


def test_added_tokens_are_found_anywhere(tok):
    assert tok.add_tokens(["newword", "a king"]) == 2
    assert tok.add_tokens("newword") == 0
    assert (len(tok), tok.vocab_size) == (422, 420)
    ids, spans = tok.encode_with_offsets("xnewwordx a king", add_special_tokens=False)
    assert words(tok, ids) == ["<0x78>", "newword", "<0x78>", "▁", "a king"]
    assert spans == [(0, 1), (1, 8), (8, 9), (9, 10), (10, 16)]
    assert tok.decode(ids) == tok.decode(ids, skip_special_tokens=True) == "xnewwordx a king"
    plain = tok.encode("newword", allow_special=False)
    assert plain == [2, 420]
    assert tok.vocab["newword"] == tok.token_to_id("newword") == 420


def test_a_piece_that_is_added_keeps_its_id_and_is_cut_out(tok):
    king = tok.token_to_id("▁king")
    assert tok.add_tokens(["▁king", "<end_of_turn>"]) == 0
    assert words(tok, tok.encode("a▁kings", add_special_tokens=False)) == ["a", "▁king", "s"]
    assert tok.token_to_id("▁king") == king
    assert tok.token_to_id("<end_of_turn>") in tok.special_token_ids


def test_added_tokens_of_the_tokenizers_package_say_what_they_are(tok):
    tokenizers = pytest.importorskip("tokenizers")
    special = tokenizers.AddedToken("<one>", special=True)
    assert tok.add_tokens([special, "<two>", {"content": "<three>", "special": True}]) == 3
    assert tok.add_tokens(tokenizers.AddedToken("<four>")) == tok.add_tokens({"content": "x4"}) == 1
    assert {420, 422} <= tok.special_token_ids
    assert not {421, 423, 424} & tok.special_token_ids
    assert tok.convert_ids_to_tokens(range(420, 425)) == [
        "<one>",
        "<two>",
        "<three>",
        "<four>",
        "x4",
    ]


def test_special_added_tokens_mark_structure(tok):
    assert tok.add_special_tokens({"additional_special_tokens": ["<tag>", "<unused0>"]}) == 1
    assert tok.additional_special_tokens == ("<tag>", "<unused0>")
    ids = tok.encode("a<tag>b")
    assert tok.decode(ids, skip_special_tokens=True) == "ab"
    assert 420 in tok.special_token_ids
    assert 420 in tok.all_special_ids
    plain = tok.encode("a<tag>b", allow_special=False)
    assert 420 not in plain
    assert tok.decode(plain[1:]) == "a<tag>b"
    assert tok.add_special_tokens({"pad_token": "<fill>"}) == 1
    assert (tok.pad_token, tok.pad_token_id) == ("<fill>", 421)
    assert tok([A, B], padding=True).input_ids[1][0] == 421


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([""], "is empty"), ([7], "is a int; expected a str"), (["a\ud800"], "lone surrogate"),
     ([None], "is a NoneType"), ([["x"]], "is a list"),
     ([{"content": "x", "lstrip": True}], "asks for lstrip")],
)  # fmt: skip
def test_tokens_that_cannot_be_added_are_named_and_nothing_changes(tok, tokens, message):
    with pytest.raises(TokenizerError, match=message):
        tok.add_tokens(["fine", *tokens])
    assert len(tok) == 420


def test_unknown_special_tokens_and_settings_are_named(tok, kind, model):
    with pytest.raises(TokenizerError, match=r"no special token 'bos_tokn'.*Did you mean"):
        tok.add_special_tokens({"bos_tokn": "<bos>"})
    with pytest.raises(TokenizerError, match=r"no tokenizer setting 'padding'.*'padding_side'"):
        kind(model, padding="left")
    with pytest.raises(TokenizerError, match="padding_side is 'up'; expected 'left' or 'right'"):
        tok.padding_side = "up"
    with pytest.raises(TokenizerError, match="eos_token is '</x>', which the vocabulary does not"):
        tok.eos_token = "</x>"
    assert (tok.padding_side, tok.eos_token) == ("left", "<eos>")
    tok.eos_token = "<end_of_turn>"
    assert tok.eos_token_id == tok.token_to_id("<end_of_turn>")


@pytest.mark.parametrize("wrong", ["<tag>", None, 7, [7], [""], {"<tag>": 1}])
def test_additional_special_tokens_are_a_list_of_texts(tok, kind, model, wrong):
    def set_it():
        tok.additional_special_tokens = wrong

    for change in (
        set_it,
        lambda: tok.add_special_tokens({"additional_special_tokens": wrong}),
        lambda: kind(model, additional_special_tokens=wrong),
    ):
        with pytest.raises(TokenizerError, match=r"expected|empty"):
            change()
    assert tok.additional_special_tokens == ()
    assert len(tok) == 420


def test_a_role_goes_back_to_the_vocabulary(tok):
    tok.pad_token, tok.eos_token = "<eos>", "<end_of_turn>"
    assert (tok.pad_token_id, tok.eos_token_id) == (1, tok.token_to_id("<end_of_turn>"))
    tok.pad_token = tok.eos_token = None
    for one in (tok, copy.copy(tok)):
        assert (one.pad_token, one.pad_token_id) == ("<pad>", 0)
        assert (one.eos_token, one.eos_token_id) == ("<eos>", 1)


def test_settings_are_attributes(tok):
    tok.add_eos_token, tok.model_max_length = True, 3
    tok.chat_template, tok.truncation_side = "{{ bos_token }}", "left"
    assert (tok.settings.add_eos_token, tok.settings.model_max_length) == (True, 3)
    assert tok(A, truncation=True).input_ids == [2, tok.encode(A)[-2], 1]
    assert tok.apply_chat_template([{"role": "user", "content": "x"}]).input_ids == [2]
    for name, wrong in (
        ("add_bos_token", 1), ("model_max_length", 0), ("model_max_length", True),
        ("truncation_side", "up"), ("chat_template", 5), ("pad_token", 5), ("unk_token", "none"),
    ):  # fmt: skip
        with pytest.raises(TokenizerError, match=name):
            setattr(tok, name, wrong)
    assert tok.settings.model_max_length == 3


# -- copies and threads ----------------------------------------------------------------------------


def test_copies_are_whole_and_separate(tok):
    tok.add_tokens("newword")
    tok.add_special_tokens({"additional_special_tokens": ["<tag>"]})
    tok.padding_side = "right"
    for again in (pickle.loads(pickle.dumps(tok)), copy.deepcopy(tok), copy.copy(tok)):
        assert type(again) is type(tok)
        assert again.encode("a newword<tag>") == tok.encode("a newword<tag>")
        assert again.settings == tok.settings
        again.add_tokens("other")
        assert tok.token_to_id("other") is None


def test_threads_share_a_tokenizer_while_one_adds_tokens(tok):
    texts = [f"{A} {i} <end_of_turn> €" for i in range(50)]
    expected = tok(texts, padding=True, return_offsets_mapping=True)
    wrong = []

    def work():
        for _ in range(10):
            if tok(texts, padding=True, return_offsets_mapping=True) != expected:
                wrong.append(1)
            if tok.batch_decode(expected.input_ids)[0] != tok.decode(expected.input_ids[0]):
                wrong.append(2)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for i in range(40):
        tok.add_tokens(f"never seen {i}")
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(tok) == 460


def test_threads_that_add_tokens_lose_none(tok):
    def work(number):
        for i in range(15):
            tok.add_tokens(f"token {number} {i}.")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(tok) == 420 + 8 * 15
    assert sorted(tok.get_added_vocab().values()) == list(range(420, 540))


@pytest.mark.parametrize("spans", [False, True])
def test_a_call_sees_a_change_wholly_or_not_at_all(tok, spans):
    class Changing(str):
        """Changes the tokenizer in the middle of a call, as another thread may."""

        __slots__ = ()

        def encode(self, *options):
            tok.add_tokens("king")
            tok.eos_token = "<end_of_turn>"
            tok.add_eos_token = True
            return super().encode(*options)

    text = "a kings"
    before = tok.encode(text)
    assert tok([Changing(text), text], return_offsets_mapping=spans).input_ids == [before, before]
    assert tok.encode(text) != before
    assert tok.encode(text)[-1] == tok.token_to_id("<end_of_turn>")
