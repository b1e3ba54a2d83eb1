"""GemmaTokenizer and GemmaTokenizerFast never disagree, nor do they with sentencepiece."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast, IncrementalDecoder
from gemma_hub.tokenizers.model_file import read_model_file

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "data" / "corpus"
BY_TOKENIZERS = ["gemma_1", "tiny", "trained", "without_bytes", "overlapping", "dead_marks"]
RENAMED = "renamed"  # its tokenizer.json does not say which of its tokens is <bos>
OTHERS = ["mistral", "test_model", "gemma3_test", "gemma3n_test", "gemma4_test"]
OTHERS += ["gemma_export", "gemma_test", "with_prefix"]
KINDS = [GemmaTokenizer, GemmaTokenizerFast]


class Trio:
    """One vocabulary in the hands of both classes, and of sentencepiece itself.

    Attributes:
        others: what must be the same as `slow`: the fast one, and one from a tokenizer.json.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.slow = GemmaTokenizer(model)
        self.fast = GemmaTokenizerFast(model)
        self.others = [self.fast]
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.file = read_model_file(model)
        self.keeps_text = self.fast.codec.engine.library == "tokenizers"

    def check(self, texts: Sequence[str], streams: bool = True) -> None:
        """That all is the same for these texts, with special tokens allowed and not."""
        for allow_special in (True, False):
            asked = {"allow_special": allow_special, "add_special_tokens": False}
            with_spans = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
            slow = self.slow(texts, **asked, **with_spans)
            equal(texts, slow.input_ids, self.slow(texts, **asked).input_ids)
            for other in self.others:
                there = other(texts, **asked, **with_spans)
                equal(texts, slow.input_ids, there.input_ids)
                equal(texts, slow.offset_mapping, there.offset_mapping)
                assert slow == there
                # Without spans, tokenizers is called once for all texts.
                equal(texts, slow.input_ids, other(texts, **asked).input_ids)
            self._check_decoding(texts, slow.input_ids, streams)
            if self.keeps_text:
                for row in zip(texts, slow.input_ids, slow.offset_mapping, strict=True):
                    self._check_spans(*row)
            if self.keeps_text and self.file.byte_fallback and not allow_special:
                equal(texts, texts, self.slow.batch_decode(slow.input_ids))
        self._check_against_sentencepiece(texts)

    def _check_decoding(self, texts: Sequence[str], rows: list[list[int]], streams: bool) -> None:
        for skip in (False, True):
            decoded = self.slow.batch_decode(rows, skip_special_tokens=skip)
            for other in self.others:
                equal(texts, decoded, other.batch_decode(rows, skip_special_tokens=skip))
            if streams:
                equal(texts, decoded, [streamed(self.fast, ids, skip) for ids in rows])
        for other in self.others:
            pieces = list(map(self.slow.convert_ids_to_tokens, rows))
            equal(texts, pieces, list(map(other.convert_ids_to_tokens, rows)))

    def _check_spans(self, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> None:
        """That they follow one another without a gap, and that each holds what its token spells."""
        place, last = 0, None
        for token_id, span in zip(ids, spans, strict=True):
            spelled, byte = text[slice(*span)], self.slow.codec.vocabulary.bytes.get(token_id)
            if byte is not None:
                assert len(spelled) == 1, text
                assert byte in spelled.encode(), text
            elif token_id != self.slow.unk_token_id:
                piece = self.slow.id_to_token(token_id)
                assert piece in (spelled, spelled.replace(" ", "▁")), text
            assert span[0] == place or span == last, text
            place, last = span[1], span
        assert place == len(text), text

    def _check_against_sentencepiece(self, texts: Sequence[str]) -> None:
        names = self.slow.all_special_tokens
        same = [text for text in texts if not any(name in text for name in names)]
        ids = self.slow(same, add_special_tokens=False).input_ids
        equal(same, self.processor.encode(same), ids)
        # Where "▁" is plain it is spelled by its bytes, so that it is no space when it comes back.
        marked = self.file.byte_fallback and "▁"
        plain = [text for text in same if not marked or marked not in text]
        rows = self.slow(plain, add_special_tokens=False, allow_special=False).input_ids
        equal(plain, self.processor.encode(plain), rows)
        known = [row for row in ids if self.slow.unk_token_id not in row]
        ours, theirs = self.slow.batch_decode(known), list(map(self.processor.decode, known))
        if self.file.removes_spaces:
            # sentencepiece drops every space that a text begins with, and not only its own.
            ours, theirs = [text.lstrip(" ") for text in ours], [t.lstrip(" ") for t in theirs]
        equal(known, theirs, ours)


def equal(texts: Sequence[object], expected: Sequence[object], found: Sequence[object]) -> None:
    """That two lists are the same; if not, the first text on which they differ."""
    for text, a, b in zip(texts, expected, found, strict=True):
        assert a == b, text


def streamed(tokenizer: GemmaTokenizerFast, ids: Sequence[int], skip: bool) -> str:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    return "".join(map(decoder.push, ids)) + decoder.finish()


@pytest.fixture(scope="module", params=[*BY_TOKENIZERS, RENAMED, *OTHERS])
def trio(request, named, tmp_path_factory) -> Trio:
    trio = Trio(named(request.param))
    if request.param in BY_TOKENIZERS:
        folder = tmp_path_factory.mktemp("saved")
        trio.fast.save_pretrained(folder)
        trio.others.append(GemmaTokenizerFast(folder / "tokenizer.json"))
    return trio


def test_gemmas_kind_of_vocabulary_runs_by_tokenizers_and_others_by_sentencepiece(trio, request):
    name = request.node.callspec.params["trio"]
    assert trio.slow.codec.engine.library == "sentencepiece"
    library = "sentencepiece" if name in OTHERS else "tokenizers"
    assert {other.codec.engine.library for other in trio.others} == {library}


def test_without_bos_both_refuse_in_the_same_words(named):
    model = named("no_special_token")
    errors = []
    for kind in KINDS:
        with pytest.raises(TokenizerError, match="has no <bos> and no <eos>") as caught:
            kind(model)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_they_have_the_same_vocabulary(trio):
    slow = trio.slow
    count = trio.processor.get_piece_size()
    assert len(slow) == slow.vocab_size == len(slow.vocab) == count
    assert list(slow.vocab) == trio.processor.id_to_piece(list(range(count)))
    for other in trio.others:
        assert other.vocab == slow.vocab
        assert len(other) == other.vocab_size == count
        assert other.special_token_ids == slow.special_token_ids
        assert other.special_tokens_map == slow.special_tokens_map
        assert other.codec.vocabulary == slow.codec.vocabulary


def test_they_agree_on_fixed_texts(trio, random_texts):
    trio.check(random_texts.FIXED)


def test_they_agree_on_random_texts(trio, random_texts):
    made = random_texts.RandomTexts(trio.slow.vocab, trio.slow.all_special_tokens, seed=7)
    trio.check([made.text() for _ in range(400)])


def test_they_agree_on_any_text(trio):
    special = trio.slow.all_special_tokens
    parts = st.one_of(st.text(max_size=10), st.sampled_from([*special, " ", "▁", "\n", "<", "a"]))
    texts = st.lists(parts, max_size=10).map("".join)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(texts, max_size=5))
    def check(texts):
        trio.check(texts)

    check()


def test_any_ids_decode_alike(trio, random_texts):
    made = random_texts.RandomTexts(trio.slow.vocab, trio.slow.all_special_tokens, seed=9)
    rows = [made.ids(len(trio.slow)) for _ in range(300)]
    trio._check_decoding([str(row) for row in rows], rows, streams=True)
    if trio.keeps_text:
        ours = trio.fast.batch_decode(rows, skip_special_tokens=True)
        special = trio.slow.special_token_ids
        plain = [[i for i in row if i not in special] for row in rows]
        equal(rows, list(map(trio.processor.decode, plain)), ours)


def test_they_agree_one_by_one_and_with_tokens_around(trio, random_texts):
    for text in random_texts.FIXED[::3]:
        for allow_special in (True, False):
            options = {"allow_special": allow_special}
            ids, spans = trio.slow.encode_with_offsets(text, **options)
            mask = trio.slow.get_special_tokens_mask(ids, already_has_special_tokens=True)
            assert trio.slow.encode(text, **options) == ids
            for other in trio.others:
                assert other.encode(text, **options) == ids
                assert other.encode_with_offsets(text, **options) == (ids, spans)
                assert other.tokenize(text, **options) == trio.slow.tokenize(text, **options)
                assert mask == other.get_special_tokens_mask(ids, already_has_special_tokens=True)
                assert other.decode(ids) == trio.slow.decode(ids)


def test_they_agree_on_fairy_tales(trio):
    path = CORPUS / "fairy_tales.txt"
    if not path.is_file():
        pytest.skip("the corpus is not part of the repository")
    trio.check(path.read_text("utf-8").split("\n\n")[:120], streams=False)


def test_they_agree_on_a_megabyte(trio, request):
    whole = request.node.callspec.params["trio"] in ("gemma_1", "tiny", "mistral", "gemma_export")
    text = "The king's daughter said:  “Нет!” 👩‍👩‍👧‍👦\n\tand went ⅷ home. " * 20_000
    text = text[: 1 << 20 if whole else 1 << 16]
    ids = trio.slow.encode(text, add_special_tokens=False)
    assert ids == trio.processor.encode(text)
    for other in trio.others:
        assert other.encode(text, add_special_tokens=False) == ids
        assert other.decode(ids) == trio.slow.decode(ids)


@pytest.mark.parametrize("text", ["\ud83e", "a\udfff", "\udc80\udc81"])
def test_lone_surrogates_are_refused_alike_and_escaped_ones_taken(trio, text):
    errors = set()
    for tokenizer in (trio.slow, *trio.others):
        for call in (tokenizer, tokenizer.encode, tokenizer.tokenize, tokenizer.token_to_id):
            with pytest.raises(TokenizerError, match="lone surrogate") as caught:
                call(text)
            errors.add(str(caught.value))
    assert len(errors) == 1
    data = text.encode("utf-8", "surrogatepass")
    trio.check([data.decode("utf-8", "backslashreplace"), data.decode("utf-8", "replace")])


@pytest.mark.parametrize("name", ["mistral", "with_prefix"])
def test_a_space_is_put_in_front_of_a_text_once(name, named):
    """In vocabularies that put one there at all."""
    trio = Trio(named(name))
    eos = trio.slow.eos_token
    assert trio.slow.drops_first_space
    for text in ("a", f"a{eos}a", f"{eos}a", f"a {eos} a", f"{eos}{eos}a{eos}b", f"<{eos}", eos):
        for allow_special in (True, False):
            ids = trio.slow.encode(text, add_special_tokens=False, allow_special=allow_special)
            assert trio.slow.decode(ids) == text
            assert streamed(trio.fast, ids, skip=False) == text
    pieces = trio.fast.tokenize(f"a{eos}b")
    assert pieces == ["▁a", eos, "b"]
    assert trio.fast.tokenize(f"{eos}a") == [eos, "▁a"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_both_files_agrees_too(kind, named, random_texts, tmp_path):
    trio = Trio(named("trained"))
    kind(trio.model).save_pretrained(tmp_path)
    assert {"tokenizer.model", "tokenizer.json"} < {path.name for path in tmp_path.iterdir()}
    trio.others = [tokenizer.from_pretrained(tmp_path) for tokenizer in KINDS]
    trio.check(random_texts.FIXED)


def test_googles_own_tokenizer_json_cuts_long_runs_of_spaces_as_sentencepiece(model, tmp_path):
    trio = Trio(model)
    trio.slow.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text("utf-8")
    # Google's file looks for user-defined pieces before spaces become "▁".
    changed, count = re.subn(r'"normalized": ?true', '"normalized": false', text)
    assert count
    trio.others = [GemmaTokenizerFast(changed.encode())]
    trio.check([f"a{' ' * n}b▁{' ' * (n % 5)}▁▁" for n in range(1, 80)])


# -- tokens that were added ------------------------------------------------------------------------


def added(named, tmp_path, names: Sequence[str], is_special: bool) -> Trio:
    """With added tokens, in the memory and in folders that each class has saved and read."""
    trio = Trio(named("trained"))
    for tokenizer in (trio.slow, trio.fast):
        tokenizer.add_tokens(names, special_tokens=is_special)
        tokenizer.save_pretrained(tmp_path / tokenizer.codec.engine.library)
    trio.others += [kind.from_pretrained(path) for path in tmp_path.iterdir() for kind in KINDS]
    return trio


@pytest.mark.parametrize("is_special", [True, False])
def test_they_agree_on_added_tokens(named, tmp_path, is_special):
    names = ["<x>", "<x", "x>>", "¤", "king", "once upon", " son", "😀"]
    trio = added(named, tmp_path, names, is_special)
    texts = ["<x>>", "<<x>x>>", "a¤¤b", "the king and kings", "once upon once▁upon", "a son▁son 😀"]
    for allow_special in (True, False):
        options = {"return_offsets_mapping": True, "allow_special": allow_special}
        expected = trio.slow(texts, **options)
        for other in trio.others:
            assert other(texts, **options) == expected
            assert other(texts, **options).input_ids == expected.input_ids
    assert all(len(other) == len(trio.slow) > 420 for other in trio.others)


def test_one_character_that_is_special_stays_plain(named, tmp_path):
    trio = added(named, tmp_path, ["¤", "g"], is_special=True)
    for tokenizer in (trio.slow, *trio.others):
        ids = tokenizer.encode("a ¤ king", add_special_tokens=False, allow_special=False)
        assert not tokenizer.special_token_ids & set(ids)
        assert tokenizer.decode(ids) == "a ¤ king"
        assert tokenizer.token_to_id("g") in tokenizer.encode("king")
