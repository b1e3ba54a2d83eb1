"""Transformers has the same ids, in both of its generations, and reads and writes our files."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TINY = Path(__file__).resolve().parents[2] / "plugins/tiny/gemma_hub_tiny/checkpoint"
RECORD = json.loads(Path(__file__).with_name("transformers_4.json").read_text("utf-8"))
# What the fast tokenizer of Transformers 4 looks for in a text before spaces become "▁" are runs of
# "▁"; sentencepiece, and with it Transformers' slow tokenizer, cuts the two alike.
FAST_4_IS_WRONG = {"gemma_1": ["▁ ▁▁  ▁a▁"]}


@pytest.fixture(scope="module", params=["tiny", "gemma_1"])
def vocabulary(request) -> tuple[str, bytes]:
    if request.param == "tiny":
        return "tiny", (TINY / "tokenizer.model").read_bytes()
    return "gemma_1", request.getfixturevalue("gemma_1").read_bytes()


@pytest.fixture(scope="module", params=[GemmaTokenizer, GemmaTokenizerFast])
def ours(request, vocabulary):
    return request.param(vocabulary[1])


@pytest.fixture(scope="module")
def saved(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ours.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(saved):
    return transformers.AutoTokenizer.from_pretrained(saved)


# -- Transformers 4, as recorded -------------------------------------------------------------------


def test_ids_spans_and_text_are_those_of_transformers_4(ours, vocabulary):
    name = vocabulary[0]
    for row in RECORD[name]:
        ids, spans = ours.encode_with_offsets(row["text"])
        assert ids == row["slow"]
        assert ours.decode(ids) == row["decoded"]
        if row["text"] in FAST_4_IS_WRONG.get(name, []):
            assert ids != row["fast"]
        else:
            assert ids == row["fast"]
            assert [list(span) for span in spans] == row["spans"]


# -- Transformers 5 -------------------------------------------------------------------------------


# It cuts runs of spaces by merges, and so otherwise where no piece is as long as the run; and it
# finds runs of "▁" as they are typed, as the fast one of Transformers 4 does.
LONGEST_RUN = 31


def test_ids_are_those_that_transformers_5_makes_of_a_model(vocabulary, tmp_path, random_texts):
    pytest.importorskip("google.protobuf", reason="Transformers reads the file with it")
    (tmp_path / "tokenizer.model").write_bytes(vocabulary[1])
    theirs = transformers.GemmaTokenizer.from_pretrained(tmp_path)
    ours = GemmaTokenizer(vocabulary[1])
    differ = [
        text
        for text in random_texts.FIXED
        if ours.encode(text, add_special_tokens=False)
        != theirs.encode(text, add_special_tokens=False)
    ]
    right = ours.codec.engine._starting
    for text in differ:
        assert " " * (LONGEST_RUN + 1) in text or "▁▁" in text
        assert ours.encode(text, add_special_tokens=False) == right.encode(text)


def test_transformers_reads_what_we_write(ours, theirs, random_texts):
    assert type(theirs).__name__ == "GemmaTokenizer"
    assert len(theirs) == len(ours)
    assert theirs.padding_side == ours.padding_side
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(theirs, f"{role}_token_id") == getattr(ours, f"{role}_token_id")
    made = random_texts.RandomTexts(list(ours.vocab), ours.all_special_tokens, seed=3)
    for text in [*random_texts.FIXED, *(made.text() for _ in range(300))]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.tokenize(text) == theirs.tokenize(text)


def test_calls_are_those_of_transformers(ours, theirs, random_texts):
    firsts = [text for text in random_texts.FIXED if text][:40]
    seconds = firsts[::-1]
    returned = {"return_offsets_mapping": True, "return_special_tokens_mask": True,
                "return_token_type_ids": True}  # fmt: skip
    for options in (
        {"padding": True},
        {"padding": "max_length", "max_length": 300, "padding_side": "right"},
        {"padding": True, "pad_to_multiple_of": 16},
        {"truncation": True, "max_length": 7, "padding": True},
        {"truncation": True, "max_length": 7, "add_special_tokens": False},
    ):
        a, b = ours(firsts, **options, **returned), theirs(firsts, **options, **returned)
        assert set(a) == set(b)
        for name in ("input_ids", "attention_mask", "special_tokens_mask", "token_type_ids"):
            assert a[name] == b[name], (options, name)
        for spans, row in zip(a.offset_mapping, b.offset_mapping, strict=True):
            assert spans == [tuple(span) for span in row]
    pairs = ours(firsts, seconds, **returned), theirs(firsts, seconds, **returned)
    assert pairs[0].input_ids == pairs[1].input_ids
    assert pairs[0].token_type_ids == pairs[1].token_type_ids
    assert pairs[0].special_tokens_mask == pairs[1].special_tokens_mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strategy", ["only_first", "only_second"])
def test_a_pair_is_truncated_as_in_transformers(ours, theirs, side, strategy):
    a = "Once upon a time there was a king, and he had three sons and a daughter."
    b = "In a land far away, beyond the hills and the wide sea, lived a fox with his wife."
    options = {"truncation": strategy, "max_length": 30}
    ours.truncation_side = theirs.truncation_side = side
    try:
        assert ours(a, b, **options).input_ids == theirs(a, b, **options).input_ids
    finally:
        ours.truncation_side = theirs.truncation_side = "right"


def test_the_tokenizers_package_reads_our_tokenizer_json(ours, saved, random_texts):
    direct = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    for text in random_texts.FIXED:
        encoding = direct.encode(text)
        ids, spans = ours.encode_with_offsets(text)
        assert encoding.ids == ids
        assert encoding.offsets == spans
        assert direct.decode(ids, skip_special_tokens=False) == ours.decode(ids)


def test_eos_and_added_tokens_arrive_in_transformers(vocabulary, tmp_path):
    ours = GemmaTokenizer(vocabulary[1], add_eos_token=True, padding_side="right")
    ours.add_tokens(["<new_tag>"], special_tokens=True)
    ours.add_tokens("newword")
    ours.add_special_tokens({"additional_special_tokens": ["<more>"]})
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a king<new_tag> said newword<more> <newword>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text)[-1] == ours.eos_token_id
    assert len(theirs) == len(ours) == ours.vocab_size + 3
    assert theirs.padding_side == "right"
    for kind in (GemmaTokenizer, GemmaTokenizerFast):
        again = kind.from_pretrained(tmp_path)
        assert again.encode(text) == ours.encode(text)
        assert again.special_tokens_map == ours.special_tokens_map
        assert (again.add_eos_token, again.padding_side) == (True, "right")
        assert again.additional_special_tokens == ("<more>",)
        assert again.special_token_ids == ours.special_token_ids
        assert again.decode(again.encode(text), skip_special_tokens=True) == (
            "a king said newword <newword>"
        )


def test_we_read_what_transformers_writes(vocabulary, theirs, tmp_path, random_texts):
    theirs.save_pretrained(tmp_path)
    ours = GemmaTokenizerFast.from_pretrained(tmp_path)
    reference = GemmaTokenizer(vocabulary[1])
    for text in random_texts.FIXED:
        assert ours.encode_with_offsets(text) == reference.encode_with_offsets(text)
    assert ours.special_token_ids == reference.special_token_ids


def test_special_tokens_are_left_out_of_a_text_as_in_transformers(ours, theirs, random_texts):
    for text in random_texts.FIXED:
        ids = ours.encode(text)
        bare = ours.decode(ids, skip_special_tokens=True)
        assert bare == theirs.decode(ids, skip_special_tokens=True)
        # Transformers keeps turns in the pieces, though not in the text.
        kept = ours.convert_ids_to_tokens(ids, skip_special_tokens=True)
        assert ours.convert_tokens_to_string(kept) == bare
        assert ours.convert_tokens_to_string(ours.tokenize(text)) == (
            theirs.convert_tokens_to_string(theirs.tokenize(text))
        )


# -- folders that Transformers 5 writes ------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with tiny's tokenizer, as we write it."""
    folder = tmp_path_factory.mktemp("tiny")
    GemmaTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def written(tiny, tmp_path):
    """`written(change, **options)`: a tokenizer of Transformers and the folder that it writes."""

    def write(change=lambda tokenizer: None, source=tiny, **options):
        theirs = transformers.GemmaTokenizer.from_pretrained(source, **options)
        change(theirs)
        theirs.save_pretrained(tmp_path)
        assert not (tmp_path / "tokenizer.model").exists()
        shutil.copy(TINY / "tokenizer.model", tmp_path)  # it writes none; GemmaTokenizer needs one
        return theirs, tmp_path

    return write


@pytest.mark.parametrize("kind", [GemmaTokenizer, GemmaTokenizerFast])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_what_it_puts_around_a_text_is_read_from_its_tokenizer_json(kind, bos, eos, written):
    theirs, folder = written(add_bos_token=bos, add_eos_token=eos)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert "add_bos_token" not in config
    ours = kind.from_pretrained(folder)
    assert (ours.add_bos_token, ours.add_eos_token) == (bos, eos)
    assert ours("a king").input_ids == theirs("a king").input_ids
    assert ours("a king", "a son").input_ids == theirs("a king", "a son").input_ids
    asked = kind.from_pretrained(folder, add_bos_token=not bos)
    assert (asked.add_bos_token, asked.add_eos_token) == (not bos, eos)
    config["add_eos_token"] = not eos
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    assert kind.from_pretrained(folder).add_eos_token is not eos


@pytest.mark.parametrize(
    "part",
    [
        "null",
        '{"type": "ByteLevel"}',
        '{"type": "TemplateProcessing", "single": 5}',
        "[",
        '{"single',
    ],
)
def test_another_post_processor_says_nothing_of_bos(tiny, tmp_path, part):
    config = json.loads((tiny / "tokenizer_config.json").read_text("utf-8"))
    del config["add_bos_token"], config["add_eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    text = (tiny / "tokenizer.json").read_text("utf-8")
    (tmp_path / "tokenizer.json").write_text(
        f'{{"post_processor": {part}, {text.lstrip()[1:]}', "utf-8"
    )
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    ours = GemmaTokenizer.from_pretrained(tmp_path)
    assert (ours.add_bos_token, ours.add_eos_token) == (True, False)


@pytest.mark.parametrize("kind", [GemmaTokenizer, GemmaTokenizerFast])
def test_tokens_that_were_added_in_it_keep_their_ids(kind, written, random_texts):
    def change(theirs):
        theirs.add_tokens(["newword", "<plain>"])
        theirs.add_tokens(["<mark>"], special_tokens=True)
        theirs.add_special_tokens({"additional_special_tokens": ["<more>"]})

    theirs, folder = written(change)
    ours = kind.from_pretrained(folder)
    assert len(ours) == len(theirs) == ours.vocab_size + 4
    added = {"newword": 4096, "<plain>": 4097, "<mark>": 4098, "<more>": 4099}
    assert ours.get_added_vocab() == added
    text = "a king<mark> said newword<more> xnewword <plain><end_of_turn>"
    for each in [text, *random_texts.FIXED]:
        assert ours.encode(each) == theirs.encode(each)
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == "a king said newword xnewword <plain>"
    assert theirs.decode(ids, skip_special_tokens=True) == "a king said newword xnewword <plain>"


@pytest.mark.parametrize("kind", [GemmaTokenizer, GemmaTokenizerFast])
def test_newlines_stay_text_though_it_lists_them_with_special_tokens(kind, written):
    pytest.importorskip("google.protobuf", reason="Transformers reads the file with it")
    theirs, folder = written(source=TINY, add_bos_token=True)
    listed = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert "\n" in listed["extra_special_tokens"]
    ours = kind.from_pretrained(folder)
    text = "a king<unused0>\n\na son\n"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == "a king\n\na son\n"
    assert ours.special_token_ids == GemmaTokenizer.from_pretrained(TINY).special_token_ids
    asked = kind.from_pretrained(folder, additional_special_tokens=["\n"])
    assert asked.decode(asked.encode("a\nb"), skip_special_tokens=True) == "ab"
    asked.save_pretrained(folder, overwrite=True)
    again = kind.from_pretrained(folder)
    assert again.decode(again.encode("a\nb"), skip_special_tokens=True) == "ab"


# -- truncation and chat ---------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pair_is_cut_as_in_transformers_but_for_an_odd_token(tiny, side):
    theirs = transformers.GemmaTokenizer.from_pretrained(tiny, truncation_side=side)
    ours = GemmaTokenizer.from_pretrained(tiny, truncation_side=side)
    first, second = (ours.encode(text, add_special_tokens=False) for text in ("12345", "67890"))

    def result(tokenizer, a, b, **options):
        try:
            return tokenizer("12345"[:a], "67890"[:b], **options).input_ids
        except Exception as error:  # noqa: BLE001  # theirs raises Exception itself
            return type(error).__name__

    for a, b, length in itertools.product(range(1, 6), range(1, 6), range(3, 12)):
        room = length - 2
        for strategy in ("only_first", "only_second"):
            options = {"truncation": strategy, "max_length": length}
            found = result(ours, a, b, **options)
            other = b if strategy == "only_first" else a
            if room > other:
                assert found == result(theirs, a, b, **options)
            else:  # nothing may be left of the one text; Transformers refuses that, too
                assert result(theirs, a, b, **options) == "Exception"
                kept = ([], second[:b]) if strategy == "only_first" else (first[:a], [])
                assert found == ([2, *kept[0], 2, *kept[1]] if room == other else "InputError")
        options = {"truncation": True, "max_length": length}
        found, other = (result(tokenizer, a, b, **options) for tokenizer in (ours, theirs))
        is_odd = min(a, b) > room // 2 and room % 2  # both are cut, and one has one token more
        if not is_odd or a > b:
            assert found == other
        else:  # the first, as in the slow one of Transformers 4; there the longer, or the second
            assert len(found) == len(other) == length
            assert (found.index(2, 1), other.index(2, 1)) == (room // 2 + 2, room // 2 + 1)


def test_the_template_is_rendered_as_in_transformers(ours, theirs):
    from gemma_hub.tokenizers.chat import GEMMA_TEMPLATE

    messages = [
        {"role": "user", "content": " Hi there \n"},
        {"role": "assistant", "content": "Hello.\n\nWhat now?"},
        {"role": "user", "content": "A story, <b>please</b>"},
    ]
    for generate in (False, True):
        options = {"tokenize": False, "add_generation_prompt": generate}
        expected = theirs.apply_chat_template(messages, chat_template=GEMMA_TEMPLATE, **options)
        assert ours.apply_chat_template(messages, **options) == expected
        ids = ours.apply_chat_template(messages, add_generation_prompt=generate)
        assert ids.input_ids == theirs.encode(expected, add_special_tokens=False)
