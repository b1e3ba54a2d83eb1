"""GemmaTokenizer: against sentencepiece, against Transformers, and where it goes its own way."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_hub.errors import CheckpointNotFoundError, TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, Tokenizer
from gemma_hub.tokenizers.model_file import PieceType, read_model_file

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizer"
STORY = (
    "Once upon a time there was a king who had three sons. The youngest son went out into the wide "
    "world to seek his fortune, and the old woman gave him bread, cheese and a little grey horse."
)
MARKS = ["<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused1>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
TEXT_PIECES = ["\n", "\n\n", "▁▁", "▁▁▁", "\t\t", "<table>", "</h1>", "<s>"]


@pytest.fixture(scope="module")
def small(model) -> GemmaTokenizer:
    return GemmaTokenizer(model)


@pytest.fixture(scope="module")
def large(gemma_1) -> GemmaTokenizer:
    return GemmaTokenizer.from_pretrained(gemma_1)


@pytest.fixture(scope="module", params=["small", "large"])
def tokenizer(request) -> GemmaTokenizer:
    return request.getfixturevalue(request.param)


TEXTS = [
    "",
    "Hello, World!",
    "Once upon a time there was a king.",
    " leading and trailing ",
    f"two  three   and many{' ' * 20}spaces",
    "tabs\tone\t\ttwo\t\t\tthree",
    "lines\none\n\ntwo\n\n\nthree" + "\n" * 40,
    "mixed \n \t \n\n  \t\t x",
    "digits 1234567890 3.14",
    "<table><tr><td>html</td></tr></table> <s>struck</s> <h1>",
    "naïve café Straße Ærø Ωμέγα Москва 日本語 한국어 العربية עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇪🇺 👍🏽 e\u0301",
    "\ue000\U000f0000\u200b\ufeff\x00\x01\x7f\x85\u2028",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "def f(x):\n    return x  # <unused1>\r\n",
]
ANY_TEXT = st.lists(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from(" \n\t<>[]@_a1▁"),
        st.sampled_from([*MARKS, *TURNS, *TEXT_PIECES, "<bos>", "<eos>", "<pad>", "<unk>"]),
    ),
    max_size=30,
).map("".join)
SEARCH = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# -- against sentencepiece -------------------------------------------------------------------------


# A run longer than the longest piece for it, which Transformers cuts elsewhere.
@pytest.mark.parametrize("text", [*TEXTS, " " * 70])
def test_ids_are_those_of_sentencepiece(tokenizer, text):
    assert tokenizer.encode(
        text, add_special_tokens=False
    ) == tokenizer.codec.engine._starting.encode(text)


@SEARCH
@given(text=st.text(max_size=60))
def test_ids_are_those_of_sentencepiece_for_any_text(small, text):
    assert small.encode(text, add_special_tokens=False) == small.codec.engine._starting.encode(text)


@SEARCH
@given(ids=st.lists(st.integers(4, 419), max_size=30))
def test_decoding_is_that_of_sentencepiece_for_any_ids(small, ids):
    assert small.decode(ids) == small.codec.engine._starting.decode(ids)


def test_broken_bytes_become_one_replacement_character_each(tokenizer):
    euro = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    letter = tokenizer.token_to_id("a")
    assert tokenizer.decode(euro) == "€"
    for ids in (euro[:2], [*euro[:2], letter], euro[1:], [euro[0], *euro], [euro[2]] * 3):
        assert tokenizer.decode(ids) == tokenizer.codec.engine._starting.decode(ids)
    assert tokenizer.decode([*euro[:2], letter]) == "\ufffd\ufffda"


# -- Gemma 1's vocabulary --------------------------------------------------------------------------


def test_known_ids_of_gemma_1(large):
    assert large.vocab_size == 256_000
    chat = "<start_of_turn>user\nHello world<end_of_turn>\n"
    assert large.encode(chat) == [2, 106, 1645, 108, 4521, 2134, 107, 108]
    assert large.encode("\n\n  1") == [2, 109, 139, 235274]
    assert (large.token_to_id("▁"), large.id_to_token(235_248)) == (235_248, "▁")


def test_special_ids_of_gemma_1(large):
    # Control pieces, marks and turns; not newlines (108-138), spaces (139-168), HTML (169-216) or
    # tabs (255969-255998).
    assert large.special_token_ids == {*range(108), 255_968, 255_999}


# -- special tokens --------------------------------------------------------------------------------


def test_special_tokens_are_marks_and_not_text(small):
    names = {small.id_to_token(i) for i in small.special_token_ids}
    assert names == {"<pad>", "<eos>", "<bos>", "<unk>", *MARKS, *TURNS}


def test_special_text_becomes_special_ids(small):
    ids = small.encode("<bos>a<eos><unk><pad><end_of_turn>")
    assert [small.id_to_token(i) for i in ids] == [
        "<bos>", "<bos>", "a", "<eos>", "<unk>", "<pad>", "<end_of_turn>",
    ]  # fmt: skip


def test_bos_comes_first_and_nothing_last(tokenizer):
    ids = tokenizer.encode("a king")
    assert ids[0] == tokenizer.bos_token_id == 2
    assert ids[1:] == tokenizer.encode("a king", add_special_tokens=False)
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("", add_special_tokens=False) == []


@SEARCH
@given(text=ANY_TEXT)
def test_plain_text_holds_no_special_token_and_comes_back(small, text):
    ids = small.encode(text, add_special_tokens=False, allow_special=False)
    assert not small.special_token_ids & set(ids)
    assert small.decode(ids) == text
    assert small.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", [*TEXTS, "<bos><eos>", "▁ ▁▁", "<start_of_turn><start_of_turn>"])
def test_plain_text_comes_back_from_any_vocabulary(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    assert not tokenizer.special_token_ids & set(ids)
    assert tokenizer.decode(ids) == text


def test_overlapping_marks_are_all_kept_plain(train):
    tokenizer = GemmaTokenizer(train(user_defined_symbols=["[a]", "<[a]>", "[b]"]))
    text = "<[a]> [[a] [b]"
    ids = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    assert not tokenizer.special_token_ids & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_token_ids > {tokenizer.token_to_id("<[a]>")}


def test_text_without_marks_is_the_same_either_way(tokenizer):
    text = "Once upon a time, in 1234:\n\n\t\t<table>  two"
    assert tokenizer.encode(text) == tokenizer.encode(text, allow_special=False)


def test_the_lower_eighth_block_is_a_space_unless_plain(small):
    assert small.decode(small.encode("a▁b"), skip_special_tokens=True) == "a b"
    assert small.decode(small.encode("a▁b", allow_special=False)) == "<bos>a▁b"


def test_decode_keeps_or_drops_special_tokens(small):
    ids = small.encode("<start_of_turn>user\nHi<end_of_turn>\n")
    assert small.decode(ids) == "<bos><start_of_turn>user\nHi<end_of_turn>\n"
    assert small.decode(ids, skip_special_tokens=True) == "user\nHi\n"


def test_without_byte_pieces_unknown_text_is_unk(train):
    tokenizer = GemmaTokenizer(train(byte_fallback=False, vocab_size=100))
    ids = tokenizer.encode("a🧙", add_special_tokens=False)
    assert ids[-1] == tokenizer.unk_token_id
    assert tokenizer.decode(ids) == "a<unk>"


# -- size, threads, types --------------------------------------------------------------------------


def test_a_megabyte_of_text_comes_back(tokenizer):
    lines = [f"{STORY} No. {i}: ⅷ {'<end_of_turn>' * (i % 2)}" for i in range(5000)]
    text = "\n".join(lines)[: 1 << 20]
    ids = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text)[1:]) == text


def test_threads_share_a_tokenizer(small):
    texts = [f"{STORY} {i} <end_of_turn> €" for i in range(200)]

    def there_and_back(text: str) -> tuple[list[int], str]:
        ids = small.encode(text)
        return ids, small.decode(ids)

    expected = [there_and_back(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, texts)) == expected


def test_it_is_a_tokenizer(small):
    assert isinstance(small, Tokenizer)
    assert (small.pad_token_id, small.eos_token_id, small.unk_token_id) == (0, 1, 3)


def test_numpy_ids_decode(small):
    ids = small.encode("a king")
    assert small.decode(np.array(ids)) == small.decode(ids)


def test_padding_is_eos_where_there_is_no_pad(train):
    assert GemmaTokenizer(train(pad_id=-1)).pad_token_id == 1


def test_token_to_id_of_what_is_not_there(small):
    assert small.token_to_id("no such piece") is None
    assert small.token_to_id("<unk>") == 3


# -- files and errors ------------------------------------------------------------------------------


def test_from_pretrained_takes_a_folder_or_a_file(tmp_path, model, small):
    (tmp_path / "tokenizer.model").write_bytes(model)
    for source in (tmp_path, str(tmp_path), tmp_path / "tokenizer.model"):
        assert GemmaTokenizer.from_pretrained(source).encode("a king") == small.encode("a king")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"no vocabulary at .*tokenizer\.model"):
        GemmaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        CheckpointNotFoundError, match=r"There is a tokenizer\.json, which GemmaTokenizerFast"
    ):
        GemmaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "not a whole SentencePiece model"),
        (b"PK\x03\x04" + bytes(200), "not a whole SentencePiece model"),
        (bytes(1000), "not a whole SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a whole SentencePiece model"),
    ],
)
def test_another_kind_of_file_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        GemmaTokenizer.from_pretrained(path)
    assert str(path) in str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(model):
    for size in [
        *range(1, 400),
        *range(400, len(model) - 200, 7),
        *range(len(model) - 200, len(model)),
    ]:
        with pytest.raises(TokenizerError):
            GemmaTokenizer(model[:size])


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_vocabulary_without_bos_or_eos_is_refused(name, train):
    with pytest.raises(TokenizerError, match=f"has no <{name}>"):
        GemmaTokenizer(train(**{f"{name}_id": -1}))


def test_a_dummy_prefix_is_added_once_and_taken_away(train):
    tokenizer = GemmaTokenizer(train(add_dummy_prefix=True))
    processor = tokenizer.codec.engine._starting
    ids = tokenizer.encode("a king")
    assert ids[1:] == processor.encode("a king")
    assert tokenizer.decode(ids[1:]) == processor.decode(ids[1:]) == "a king"
    text = "<end_of_turn>a king<end_of_turn>a son"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    plain = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    assert not tokenizer.special_token_ids & set(plain)
    assert tokenizer.decode(plain) == text


@pytest.mark.parametrize("text", [b"bytes", None, 7, ["a", "list"]])
def test_only_text_is_encoded(small, text):
    with pytest.raises(TokenizerError, match=f"is a {type(text).__name__}; expected a str"):
        small.encode(text)


@pytest.mark.parametrize("allow_special", [True, False])
def test_lone_surrogates_are_refused(small, allow_special):
    with pytest.raises(TokenizerError, match=r"Character 3 .* lone surrogate U\+D83E.*utf-8"):
        small.encode("abc\ud83e", allow_special=allow_special)


@pytest.mark.parametrize("bad", [-1, 420, 10**9, 2**70])
def test_ids_outside_the_vocabulary_are_refused(small, bad):
    with pytest.raises(TokenizerError, match=rf"no token {bad}; .* 0 to 419"):
        small.decode([5, bad])
    with pytest.raises(TokenizerError, match=f"no token {bad}"):
        small.id_to_token(bad)


@pytest.mark.parametrize("bad", [1.0, "a", None, [1]])
def test_ids_that_are_no_integers_are_refused(small, bad):
    with pytest.raises(TokenizerError, match="expected an integer"):
        small.decode([5, bad])


# -- the model file --------------------------------------------------------------------------------


def test_marked_pieces_are_those_that_sentencepiece_knows(model, small):
    marked = read_model_file(model).marked
    by_type = {
        PieceType.CONTROL: small.codec.engine._starting.is_control,
        PieceType.UNKNOWN: small.codec.engine._starting.is_unknown,
        PieceType.BYTE: small.codec.engine._starting.is_byte,
    }
    for kind, is_kind in by_type.items():
        ids = {i for i, (_, k) in marked.items() if k == kind}
        assert ids == {i for i in range(small.vocab_size) if is_kind(i)}
    user_defined = [text for text, kind in marked.values() if kind == PieceType.USER_DEFINED]
    assert user_defined == [*MARKS, *TURNS, *TEXT_PIECES]
    assert all(small.id_to_token(i) == text for i, (text, _) in marked.items())


def test_other_vocabularies_load(tmp_path):
    folder = DATA / "keras_hub"
    if not folder.is_dir():
        pytest.skip("the vocabularies of other projects are not part of the repository")
    shutil.copy(folder / "gemma_export_vocab.spm", tmp_path / "tokenizer.model")
    unigram = GemmaTokenizer.from_pretrained(tmp_path)
    assert unigram.decode(unigram.encode("the quick"), skip_special_tokens=True) == "the quick"
    for path in (folder / "gemma3_test_vocab.spm", DATA / "mistral" / "mistral01.model"):
        other = GemmaTokenizer.from_pretrained(path)
        assert other.decode(other.encode("the fox"), skip_special_tokens=True) == "the fox"


def test_a_file_cut_between_two_fields_is_refused(model):
    # What is left is a valid model of pieces alone; sentencepiece loads it, with other settings.
    cut = model.rindex(b"<unused1>\x15")
    cut = model.index(b"\x0a", cut)
    assert sentencepiece.SentencePieceProcessor(model_proto=model[:cut]).get_piece_size() == 9
    with pytest.raises(TokenizerError, match="its end is missing"):
        GemmaTokenizer(model[:cut])


def test_the_longest_name_of_a_special_token_counts(train):
    tokenizer = GemmaTokenizer(train(bos_piece="<s", eos_piece="<sos>"))
    assert tokenizer.encode("<sos><s", add_special_tokens=False) == [1, 2]
