"""GemmaTokenizer and GemmaTokenizerFast never disagree, nor do they with sentencepiece."""

import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast, IncrementalDecoder

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TINY = Path(__file__).resolve().parents[2] / "plugins/tiny/gemma_hub_tiny/checkpoint"
OTHERS = """
    keras_hub/gemma3_test_vocab.spm keras_hub/gemma3n_test_vocab.spm
    keras_hub/gemma4_test_vocab.spm keras_hub/gemma_export_vocab.spm keras_hub/gemma_test_vocab.spm
    mistral/mistral01.model sentencepiece/test_model.model
""".split()
BY_TOKENIZERS = ["gemma_1", "tiny", "trained", "without_bytes", "overlapping"]


def content(name: str, request) -> bytes:
    """Of a tokenizer.model."""
    if name == "gemma_1":
        return request.getfixturevalue("gemma_1").read_bytes()
    if name == "tiny":
        return (TINY / "tokenizer.model").read_bytes()
    train = request.getfixturevalue("train")
    changes = {
        "trained": {},
        "without_bytes": {"byte_fallback": False, "vocab_size": 120},
        "overlapping": {"user_defined_symbols": ["[a]", "<[a]>", "[b]", "▁▁", "<x>", "<x>y"]},
    }
    if name in changes:
        return train(**changes[name])
    path = DATA / "tokenizer" / name
    if not path.is_file():
        pytest.skip("the vocabularies of other projects are not part of the repository")
    return path.read_bytes()


class Trio:
    """One vocabulary, three times."""

    def __init__(self, model: bytes) -> None:
        self.slow = GemmaTokenizer(model)
        self.fast = GemmaTokenizerFast(model)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def check(self, text: str) -> None:
        for options in ({}, {"allow_special": False}, {"add_special_tokens": False}):
            slow = self.slow.encode_with_offsets(text, **options)
            assert slow == self.fast.encode_with_offsets(text, **options)
            assert slow[0] == self.slow.encode(text, **options)
            assert slow[0] == self.fast.encode(text, **options)
            self._check_decoding(slow[0])
        ids = self.slow.encode(text, add_special_tokens=False)
        if not self._holds_special(text):
            assert ids == self.processor.encode(text)
            if "▁" in text:
                return  # plain, it is spelled by its bytes; decoded, it is a space
            assert ids == self.fast.encode(text, add_special_tokens=False, allow_special=False)
            if self.slow.unk_token_id not in ids:
                assert self.fast.decode(ids) == self.processor.decode(ids)

    def _check_decoding(self, ids: list[int]) -> None:
        assert self.slow.convert_ids_to_tokens(ids) == self.fast.convert_ids_to_tokens(ids)
        for skip in (False, True):
            text = self.slow.decode(ids, skip_special_tokens=skip)
            assert text == self.fast.decode(ids, skip_special_tokens=skip)
            decoder = IncrementalDecoder(self.fast, skip_special_tokens=skip)
            assert "".join(map(decoder.push, ids)) + decoder.finish() == text

    def _holds_special(self, text: str) -> bool:
        return any(name in text for name in self.slow.all_special_tokens)


@pytest.fixture(scope="module", params=[*BY_TOKENIZERS, *OTHERS])
def trio(request) -> Trio:
    return Trio(content(request.param, request))


@pytest.mark.parametrize("name", BY_TOKENIZERS)
def test_vocabularies_of_gemmas_kind_run_by_tokenizers(name, request):
    trio = Trio(content(name, request))
    assert trio.slow.codec.engine.library == "sentencepiece"
    assert trio.fast.codec.engine.library == "tokenizers"


@pytest.mark.parametrize("name", OTHERS)
def test_other_vocabularies_run_by_sentencepiece_in_both(name, request):
    assert Trio(content(name, request)).fast.codec.engine.library == "sentencepiece"


def test_without_bos_both_refuse_in_the_same_words(request):
    model = content("keras_hub/no_special_token_vocab.spm", request)
    errors = []
    for kind in (GemmaTokenizer, GemmaTokenizerFast):
        with pytest.raises(TokenizerError, match="has no <bos> and no <eos>") as caught:
            kind(model)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_they_have_the_same_vocabulary(trio):
    slow, fast = trio.slow, trio.fast
    assert slow.vocab == fast.vocab
    assert len(slow) == len(fast) == slow.vocab_size == len(slow.vocab)
    assert slow.special_token_ids == fast.special_token_ids
    assert slow.special_tokens_map == fast.special_tokens_map
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(slow, f"{role}_token_id") == getattr(fast, f"{role}_token_id")


def test_they_agree_on_fixed_texts(trio, random_texts):
    for text in random_texts.FIXED:
        trio.check(text)


def test_they_agree_on_random_texts(trio, random_texts):
    made = random_texts.RandomTexts(list(trio.slow.vocab), trio.slow.all_special_tokens, seed=7)
    for _ in range(300):
        trio.check(made.text())


def test_they_agree_on_any_text(trio):
    special = trio.slow.all_special_tokens
    parts = st.one_of(st.text(max_size=10), st.sampled_from([*special, " ", "▁", "\n", "<", "a"]))

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(parts, max_size=10).map("".join))
    def check(text):
        trio.check(text)

    check()


def test_they_agree_on_a_corpus_in_a_batch(trio):
    path = DATA / "corpus" / "fairy_tales.txt"
    if not path.is_file():
        pytest.skip("the corpus is not part of the repository")
    lines = path.read_text("utf-8").splitlines()[:3000]
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    slow, fast = trio.slow(lines, **options), trio.fast(lines, **options)
    assert slow == fast
    assert trio.slow(lines).input_ids == fast.input_ids == trio.fast(lines).input_ids
    assert trio.fast.batch_decode(fast.input_ids) == trio.slow.batch_decode(slow.input_ids)
    plain = trio.fast(lines, add_special_tokens=False).input_ids
    assert plain == trio.processor.encode(lines)


def test_they_agree_on_a_megabyte(trio):
    text = ("The king's daughter said:  “Нет!” 👩‍👩‍👧‍👦\n\tand went ⅷ home. " * 20_000)[: 1 << 20]
    ids = trio.slow.encode(text, add_special_tokens=False)
    assert ids == trio.fast.encode(text, add_special_tokens=False) == trio.processor.encode(text)
    assert trio.fast.decode(ids) == trio.slow.decode(ids)


@pytest.mark.parametrize("text", ["\ud83e", "a\udfff", "\udc80\udc81"])
def test_lone_surrogates_are_refused_alike_and_escaped_ones_taken(trio, text):
    errors = []
    for tokenizer in (trio.slow, trio.fast):
        with pytest.raises(TokenizerError, match="lone surrogate") as caught:
            tokenizer(text)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    trio.check(text.encode("utf-8", "backslashreplace").decode("utf-8"))


@pytest.mark.parametrize("kind", [GemmaTokenizer, GemmaTokenizerFast])
@pytest.mark.parametrize("name", BY_TOKENIZERS)
def test_a_saved_tokenizer_json_agrees_too(name, kind, request, random_texts, tmp_path):
    trio = Trio(content(name, request))
    (trio.slow if kind is GemmaTokenizer else trio.fast).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").is_file()
    trio.fast = GemmaTokenizerFast.from_pretrained(tmp_path / "tokenizer.json")
    made = random_texts.RandomTexts(list(trio.slow.vocab), trio.slow.all_special_tokens, seed=8)
    for text in [*random_texts.FIXED, *(made.text() for _ in range(100))]:
        trio.check(text)
    # One tokenizer of the two files together, once they are seen to be of one vocabulary.
    both = GemmaTokenizerFast.from_pretrained(tmp_path)
    assert both.encode(random_texts.SCRIPTS) == trio.slow.encode(random_texts.SCRIPTS)


def test_googles_own_tokenizer_json_cuts_long_runs_of_spaces_as_sentencepiece(model, tmp_path):
    trio = Trio(model)
    trio.slow.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text("utf-8")
    # Google's file looks for user-defined pieces before spaces become "▁".
    path.write_text(re.sub(r'"normalized": ?true', '"normalized": false', text), "utf-8")
    trio.fast = GemmaTokenizerFast.from_pretrained(path)
    for n in range(1, 80):
        trio.check(f"a{' ' * n}b▁{' ' * (n % 5)}▁▁")
