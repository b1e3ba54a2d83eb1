"""Vocabulary files that are broken, contradict one another or mean harm; and saving."""

import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece

from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast, open_tokenizer
from gemma_hub.tokenizers.conversion import json_content

PAIR = [GemmaTokenizer, GemmaTokenizerFast]
TEXT = "a king  had <end_of_turn> €\n\n   son▁"


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    GemmaTokenizer(model).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of a whole folder, to break."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def content(saved) -> dict:
    """Of a tokenizer.json, to change."""
    return json.loads((saved / "tokenizer.json").read_text("utf-8"))


def refused(content, words: str) -> None:
    """That a tokenizer.json is refused in these words, and quickly."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=words):
        GemmaTokenizerFast(data)
    assert time.perf_counter() - start < 1


def changed(content, old, new):
    """With another text in the place of one that is there once."""
    assert content.count(old) == 1
    return content.replace(old, new)


# -- tokenizer.model -------------------------------------------------------------------------------

MUTATE = """
import random, resource, sys, time
from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer
from gemma_hub.tokenizers.fast import GemmaTokenizerFast
path, seed, count = sys.argv[1:]
whole = open(path, "rb").read()
kinds = [GemmaTokenizerFast] if path.endswith("json") else [GemmaTokenizer, GemmaTokenizerFast]
draw = random.Random(int(seed))
loaded = 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(int(count)):
    data = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 8])):
        # Half of the damage near an end, where the settings are.
        near = draw.randrange(1, 3000 if path.endswith("json") else 300)
        near = near if path.endswith("json") else -near
        place = draw.randrange(len(data)) if draw.random() < 0.5 else near
        kind = draw.random()
        if kind < 0.6:
            data[place] = draw.choice([draw.randrange(256), *b'09-"[]{},:'])
        elif kind < 0.8:
            del data[place : place + draw.choice([1, 1, 20])]
        else:
            data[place:place] = bytes([draw.choice([0, 10, 255, 127, 48])]) * draw.randrange(1, 5)
    results = []
    for kind in kinds:
        start = time.perf_counter()
        try:
            tok = kind(bytes(data))
            ids = tok.encode("a king  had <end_of_turn> \\n \U0001f9d9", allow_special=i % 2 == 0)
            results.append((ids, tok.decode(ids), len(tok.vocab), repr(tok.special_tokens_map)))
            loaded += 1
        except TokenizerError as error:
            results.append(str(error))
        if time.perf_counter() - start > 1:
            print("slow")
    if len(kinds) == 2 and results[0] != results[1]:
        print("unlike", results)
if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 200_000:
    print("much memory")
print("survived", loaded)
"""


@pytest.mark.parametrize(("name", "count"), [("tokenizer.model", 2000), ("tokenizer.json", 8000)])
def test_random_damage_never_kills_the_process(saved, name, count, tmp_path):
    path = saved / name
    done = subprocess.run(
        [sys.executable, "-c", MUTATE, str(path), "1", str(count)],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "GEMMA_HUB_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (survived,) = done.stdout.splitlines()  # and nothing slow, unlike, or of much memory
    assert int(survived.removeprefix("survived ")) > 30


@pytest.mark.parametrize("kind", PAIR)
def test_what_is_no_model_is_refused(kind, tmp_path, model):
    for name, data in {
        "empty": b"", "text": b"hello", "cut": model[:-100], "zip": b"PK\x03\x04" + bytes(99),
        "lfs": b"version https://git-lfs.github.com/spec/v1\n", "twice": model[:14] + model,
        "length": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "nul": bytes(1000),
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.model"
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match=f"{name}.model: .*Get the file again"):
            kind.from_pretrained(path)
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="There is no vocabulary"):
        kind.from_pretrained(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointNotFoundError):
        kind.from_pretrained(str(tmp_path / "loop"))


@pytest.mark.parametrize("kind", PAIR)
def test_what_cannot_be_read_is_named(kind, folder, monkeypatch):
    def refuse(path, *rest, **more):
        raise PermissionError(13, "Permission denied", str(path))

    for method in ("read_bytes", "is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            with pytest.raises(TokenizerError, match=r"cannot be read.*Permission denied"):
                kind.from_pretrained(folder)
    for name in ("~no such user/x", "./" + "x" * 300):
        with pytest.raises(TokenizerError, match="cannot be read"):
            kind.from_pretrained(name)


def taken_apart(model: bytes) -> tuple[list[bytes], bytes]:
    """The records of the pieces, and the settings behind them."""
    records = []
    while model[0] == 0x0A:
        size = 2 + model[1]
        records.append(model[:size])
        model = model[size:]
    return records, model


def record(*fields: bytes) -> bytes:
    content = b"".join(fields)
    return bytes([0x0A, len(content)]) + content


def text(spelling: str | bytes) -> bytes:
    data = spelling.encode() if isinstance(spelling, str) else spelling
    return bytes([0x0A, len(data)]) + data


def score(number: float) -> bytes:
    return b"\x15" + struct.pack("<f", number)


CONTROL, USER_DEFINED = b"\x18\x03", b"\x18\x04"
A = record(text("▁son"), score(-9.0))


@pytest.mark.parametrize("kind", PAIR)
@pytest.mark.parametrize(
    ("place", "new", "words"),
    [
        (100, record(text("<0y41>"), score(0), b"\x18\x06"), "byte piece"),
        (100, record(text("<0x41>"), score(0)), "not a whole SentencePiece model|byte piece"),
        (400, record(text(b"\xe2\x96"), score(-9)), "not a whole SentencePiece model: 'utf-8'"),
        (400, record(text("<bos>"), score(-9)), "not a whole SentencePiece model.*already defined"),
        (400, record(text(""), score(-9)), "not a whole SentencePiece model.*empty"),
        (400, record(text("x"), score(-9), b"\x18\x09"), "9 is not a valid PieceType"),
        (400, b"\x0a\xff\xff\xff\xff\x7f" + A[2:], "it ends inside the field"),
        (400, b"\x0a" + b"\xff" * 12, "it ends inside a number"),
        (1, record(text("<eus>"), score(0), CONTROL), "has no <eos>"),
        (2, record(text("<bus>"), score(0), CONTROL), "has no <bos>"),
        (3, record(text("<unk>"), score(0), CONTROL), "has no <unk>"),
    ],
)
def test_a_model_with_a_wrong_piece_is_refused(kind, model, place, new, words):
    records, settings = taken_apart(model)
    assert b"".join(records) + settings == model
    records[place] = new
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=words):
        kind(b"".join(records) + settings)
    assert time.perf_counter() - start < 1


def test_fields_of_a_model_in_any_order_and_kind_are_what_they_are_for_sentencepiece(model):
    records, settings = taken_apart(model)
    mark = next(i for i, r in enumerate(records) if b"<unused0>" in r)
    records[mark] = record(USER_DEFINED, score(0), text("<unused0>"))
    no_piece = b"\x09" + b"\x0a" * 8 + b"\x08\x05"  # numbers under the number of pieces
    data = no_piece.join(records) + settings
    for kind in PAIR:
        tok = kind(data)
        assert tok.vocab == GemmaTokenizer(model).vocab
        assert tok.encode(TEXT) == GemmaTokenizer(model).encode(TEXT)
        assert mark in tok.special_token_ids
        assert mark not in tok.encode("<unused0>", allow_special=False)


@pytest.mark.parametrize(
    "new", [record(text("M"), score(-500.0)), record(text("m"), score(float("nan")))]
)
def test_what_the_packages_cut_in_two_ways_is_left_to_sentencepiece(model, new):
    # Without "m" sentencepiece still makes "▁time" of its characters; NaN is in no order.
    records, settings = taken_apart(model)
    place = next(i for i, r in enumerate(records) if text("m") in r)
    records[place] = new
    data = b"".join(records) + settings
    tok = GemmaTokenizerFast(data)
    assert tok.codec.engine.library == "sentencepiece"
    words = "Once upon a time mm"
    assert tok.encode(words) == GemmaTokenizer(data).encode(words)


# -- tokenizer.json --------------------------------------------------------------------------------


def test_what_is_no_json_is_refused(saved):
    whole = (saved / "tokenizer.json").read_bytes()
    for size in [*range(1, 300, 7), *range(300, len(whole) - 1, 997), len(whole) - 1]:
        refused(whole[:size], "not a whole tokenizer.json")
    refused(b'{"model": ' + b"[" * 100_000, "not a whole tokenizer.json")
    refused(b'{"version": ' + b"[" * 100_000, "not a whole tokenizer.json")
    deep = b"[" * 100_000 + b"]" * 100_000
    refused(changed(whole, b'"model":{', b'"model":{"x":' + deep + b","), "recursion limit")
    refused(changed(whole, b'"1.0"', deep), "recursion depth")
    digits = b"9" * 1_000_000
    refused(changed(whole, b'"1.0"', digits), "not a whole tokenizer.json")
    refused(changed(whole, b'"<pad>":0', b'"<pad>":' + digits), "number out of range")
    refused(b"[" + whole + b"]", "holds a list; expected a JSON object")
    refused(whole.decode("utf-8").encode("utf-16"), "Get the file again")
    refused(whole + b"x", "trailing characters")
    refused(b'{"version": "1.0", "added_tokens": 7, "model": {}}', "added_tokens are no list")
    refused(b"{}", "normalises texts by nothing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"].update(type="WordLevel"), "not a whole tokenizer.json|WordLevel"),
        (lambda c: c["model"].update(dropout=0.5), "has dropout"),
        (lambda c: c["model"].update(ignore_merges=True), "has ignore_merges"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "has end_of_word_suffix"),
        # The package panics.
        (lambda c: c["model"].update(continuing_subword_prefix="▁" * 9), "not a whole|has cont"),
        (lambda c: c["model"].update(unk_token=None), "has unk_token=None"),
        (lambda c: c["model"].update(unk_token="zz"), "has no <unk>"),
        (lambda c: c["model"].update(fuse_unk=False, byte_fallback=False), "has fuse_unk=False"),
        (lambda c: c.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}),
         "Its model is Unigram; Gemma's is BPE"),
        (lambda c: c.update(model={"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0},
                                   "continuing_subword_prefix": "#",
                                   "max_input_chars_per_word": 9}), "Its model is WordPiece"),
        (lambda c: c.pop("model"), "not a whole tokenizer.json .*[Mm]odel"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "normalises texts by NFKC"),
        (lambda c: c.update(normalizer=None), "normalises texts by nothing"),
        (lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [c["normalizer"]] * 2}),
         "normalises texts by Replace and Replace"),
        (lambda c: c["normalizer"].update(pattern={"Regex": " "}), "normalises texts by Replace"),
        (lambda c: c.update(normalizer=7), "A part of it is 7"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "splits texts by Whitespace"),
        (lambda c: c.update(pre_tokenizer={"type": "Split", "pattern": {"String": " "},
                                           "behavior": "Removed", "invert": True}),
         "splits texts by Split"),
        (lambda c: c.update(decoder={"type": "ByteLevel"}), "decodes by ByteLevel"),
        (lambda c: c.update(decoder={"type": "Replace", "pattern": {"Regex": "((a{99}){99}){99}"},
                                     "content": ""}), "decodes by Replace"),
        (lambda c: c.update(post_processor={"type": "Nonsense"}), "PostProcessor"),
        (lambda c: c["model"]["vocab"].update({"king": 400}), "out of range or given twice"),
        (lambda c: c["model"]["vocab"].update({"zz": 7000}), "out of range or given twice"),
        (lambda c: c["model"]["vocab"].update({"zz": -1}), "not a whole tokenizer.json"),
        (lambda c: c["model"]["vocab"].update({"zz": "1"}), "not a whole tokenizer.json"),
        (lambda c: c["model"]["merges"].append(["zz", "y"]), "not a whole tokenizer.json"),
        (lambda c: c["added_tokens"][0].update(lstrip=True), "asks for lstrip"),
        (lambda c: c["added_tokens"][0].update(id="0"), "expected an id and a content"),
        (lambda c: c["added_tokens"][0].update(id=9000), "<pad>"),
        (lambda c: c["added_tokens"][0].update(id=-1), "expected an id and a content"),
        (lambda c: c["added_tokens"][0].update(content="<eos>"), "token '<eos>' is there twice"),
        (lambda c: c["added_tokens"][0].update(content="king"), "'king' has the id 0; .* gives it"),
        (lambda c: c.update(normalizer={"type": "Sequence", "normalizers": 7}), "are 7; expected"),
        (lambda c: c["added_tokens"].append(c["added_tokens"][0] | {"content": "", "id": 420}),
         "added token '' has the id 420"),
        (lambda c: c["added_tokens"].append(c["added_tokens"][0] | {"content": "z", "id": 421}),
         "added token 'z' has the id 421; .* gives it 420"),
    ],
)  # fmt: skip
def test_a_json_that_is_not_gemmas_is_refused(content, change, words):
    change(content)
    refused(content, words)


def test_a_json_without_bos_is_refused(content):
    vocab = content["model"]["vocab"]
    vocab["<boss>"] = vocab.pop("<bos>")
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<bos>"]
    content["post_processor"] = None
    refused(content, "has no <bos>")


def places(value, place=()):
    """The path of everything in a tokenizer.json but single pieces and merges."""
    keys = range(len(value)) if isinstance(value, list) else value
    for key in keys if isinstance(value, (dict, list)) and place[-1:] != ("vocab",) else ():
        if place[-1:] != ("merges",) or key < 3:
            yield (*place, key)
            yield from places(value[key], (*place, key))


@pytest.mark.parametrize(
    "value", [None, True, -1, 3, 2**32, 10**30, 1e300, "", "▁", "BPE", "x" * 999, [], [[]], {}]
)
def test_a_json_with_anything_anywhere_is_refused_or_works(content, model, value):
    slow, whole = GemmaTokenizer(model), json.dumps(content)
    refusals = worked = 0
    for place in places(content):
        other = json.loads(whole)
        part = other
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value
        try:
            tok = GemmaTokenizerFast(json.dumps(other).encode())
            back = tok.decode(tok.encode(TEXT, allow_special=False))
            assert back == f"<bos>{TEXT}" or not tok.codec.vocabulary.bytes
            assert place[0] == "model" or tok.encode("a king") == slow.encode("a king")
            worked += 1
        except TokenizerError:
            refusals += 1
    assert refusals > worked > 0


def test_a_key_given_twice_counts_as_the_package_takes_it(content):
    whole = json.dumps(content)
    refused((whole[:-1] + ', "normalizer": {"type": "NFKC"}}').encode(), "texts by NFKC")
    refused((whole[:-1] + ', "model": {"vocab": {}, "merges": []}}').encode(), "Its BPE model|unk")
    refused(changed(whole, '"<pad>": 0', '"<pad>": 0, "<pad>": 7').encode(), "there is no id 0")
    other = '"\\u006dodel": {"vocab": {}, "merges": []}, "model": '
    tok = GemmaTokenizerFast(changed(whole, '"model": ', other).encode())
    assert tok.encode("a king") == GemmaTokenizerFast(whole.encode()).encode("a king")


def test_runs_of_spaces_in_googles_json_are_cut_as_in_sentencepiece(train, content):
    runs = ["▁" * n for n in range(2, 32)]
    model = train(vocab_size=480, user_defined_symbols=[*runs, "\n", "\n\n", "<end_of_turn>"])
    content = json.loads(json_content(model))
    content["added_tokens"] = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": i < 4}
        for name, i in GemmaTokenizer(model).vocab.items()
        if name in [*runs, "\n", "\n\n", "<end_of_turn>"] or i < 4
    ]  # fmt: skip
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "},
                                "behavior": "MergedWithPrevious", "invert": False}  # fmt: skip
    tok = GemmaTokenizerFast(json.dumps(content).encode())
    expected = sentencepiece.SentencePieceProcessor(model_proto=model)
    draw = random.Random(3)
    for n in range(2, 81):
        mixed = "".join(draw.choice(" ▁") for _ in range(n))
        for run in (" " * n, "▁" * n, mixed, mixed + "\n" + mixed, " " * (n - 1) + "▁"):
            for words in (run, f"a{run}king", f"{run}son", f"king{run}"):
                ids = tok.encode(words, add_special_tokens=False)
                assert ids == expected.encode(words), words
                plain = tok.encode(words, allow_special=False, add_special_tokens=False)
                assert tok.decode(plain) == words


def test_the_form_of_a_json_does_not_matter(content, model):
    expected = GemmaTokenizer(model).encode_with_offsets(TEXT)
    content["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0,
                             "direction": "Right"}  # fmt: skip
    turned = dict(reversed(content.items()))
    assert next(iter(turned)) == "model"
    for data in (
        json.dumps(content), json.dumps(content, indent=4), json.dumps(turned),
        "\n " + json.dumps(content, ensure_ascii=False), "\ufeff" + json.dumps(content),
        json.dumps(content).replace('"model"', r'"\u006dodel"'),
    ):  # fmt: skip
        assert GemmaTokenizerFast(data.encode("utf-8")).encode_with_offsets(TEXT) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update({"zz": v.pop("a")}), "is 'zz' in the one and 'a' in the other"),
        (lambda v: v.update({"a": v["o"], "o": v["a"]}), "is '[ao]' in the one and '[ao]' in the"),
        (lambda v: v.update({"zz": len(v)}), r"\(421 and 420 pieces\): id 420 is 'zz' .* nothing"),
        (lambda v: v.pop(max(v, key=v.get)), r"\(419 and 420 pieces\): id 419 is nothing"),
    ],
)
def test_a_json_of_another_vocabulary_than_the_model_is_refused(folder, content, change, words):
    content["model"]["merges"] = []
    change(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(TokenizerError, match=f"different vocabularies.*{words}"):
        GemmaTokenizerFast.from_pretrained(folder)
    assert GemmaTokenizer.from_pretrained(folder).encode(TEXT)


@pytest.mark.parametrize("damage", [b"", b"hello", b"\xff"])
def test_a_json_beside_a_broken_model_is_refused(folder, damage):
    path = folder / "tokenizer.model"
    whole = path.read_bytes()
    path.write_bytes(
        damage if damage != b"\xff" else whole.replace("▁k".encode(), b"\xff\xfek\xff", 1)
    )
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: "):
        GemmaTokenizerFast.from_pretrained(folder)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIR)
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[]", "expected"),
        ("{", "expected|JSON"),
        ('{"padding_side": "up"}', "padding_side is 'up'; expected 'left' or 'right'"),
        ('{"add_bos_token": "yes"}', "add_bos_token is 'yes'; expected True or False"),
        ('{"model_max_length": -5}', "model_max_length is -5"),
        ('{"chat_template": 7}', "chat_template is 7; expected a text"),
        ('{"chat_template": [{"name": "tool", "template": "x"}]}', "none called 'default'"),
        ('{"bos_token": "<s1>"}', "bos_token is '<s1>', which the vocabulary does not have"),
        ('{"added_tokens_decoder": {"5": {"content": "<mask>"}}}', "gives to '<2mass>'"),
        ('{"added_tokens_decoder": {"x": {"content": "<mask>"}}}', "expected an id"),
        ('{"added_tokens_decoder": {"99999999": {"content": "<new>"}}}', "out of range"),
        ('{"added_tokens_decoder": {"420": {"content": "<n>"}, "0420": {"content": "<m>"}}}',
         "Two added tokens have the id 420"),
        ('{"additional_special_tokens": [7]}', "additional_special_tokens is"),
        ('{"additional_special_tokens": ["\\ud800"]}', "additional_special_tokens is"),
        ('{"extra_special_tokens": [{"content": ""}]}', "additional_special_tokens is"),
        ('{"added_tokens_decoder": [1]}', r"added_tokens_decoder is \[1\]; expected an object"),
        ('{"added_tokens_decoder": {"420": {"content": "\\ud800"}}}', "expected an id and an"),
        ('{"added_tokens_decoder": {"' + "9" * 5000 + '": {"content": "x"}}}', "expected an id"),
        ('{"added_tokens_decoder": {"420": []}}', "expected an id and an object"),
        ('{"chat_template": [{"name": [], "template": "x"}]}', "none called 'default'"),
        ('{"chat_template": [{"name": "default"}]}', "none called 'default'"),
        ('{"chat_template": [{"name": "default", "template": 7}]}', "chat_template is 7"),
        ('{"chat_template": "\\ud800"}', "chat_template is '.ud800'; expected a text"),
        ('{"chat_template": {"default": "x"}}', "chat_template is {.*}; expected a text"),
        ('{"bos_token": {}}', "bos_token is {}; expected a text"),
        ('{"eos_token": {"content": 7}}', "eos_token is 7; expected a text"),
        ('{"unk_token": "\\udfff"}', "unk_token is '.udfff'; expected a text"),
        ('{"pad_token": ""}', "An added token is empty"),
        ('{"model_max_length": true}', "model_max_length is True"),
        ('{"model_max_length": 0.5}', "model_max_length is 0.5"),
        ('{"model_max_length": NaN}', "model_max_length is nan"),
        ('{"model_max_length": 1e999}', "model_max_length is inf"),
        ('{"model_max_length": ' + "9" * 1_000_000 + "}", "not valid JSON"),
        ('{"truncation_side": ["left"]}', "truncation_side is "),
        ('{"a": 1, "a": 2}', "gives a key twice: a"),
        ("[" * 100_000, "not valid JSON"),
        (" " * (17 << 20), "far too large for settings"),
    ],
    ids=range(37),
)  # fmt: skip
def test_wrong_settings_are_named_with_their_file(folder, kind, config, words):
    (folder / "tokenizer_config.json").write_text(config, "utf-8")
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=words) as caught:
        kind.from_pretrained(folder)
    assert time.perf_counter() - start < 1
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", b'{"a": "\xff"}', "not valid JSON"),
        ("special_tokens_map.json", b"[]", "holds a JSON list; expected an object"),
        ("special_tokens_map.json", b'{"cls_token": 7, "chat_template": 7}', "chat_template is 7"),
        ("special_tokens_map.json", b'{"additional_special_tokens": 7}', "additional_special_t"),
        ("added_tokens.json", b'{"x": "420"}', "'x' has '420' for an id; expected"),
        ("added_tokens.json", b'{"x": true}', "'x' has True for an id"),
        ("added_tokens.json", b'{"x": 1e3}', "'x' has 1000.0 for an id"),
        ("added_tokens.json", b'{"": 420}', "'' has 420 for an id"),
        ("added_tokens.json", b'{"\\ud800": 420}', "has 420 for an id"),
        ("added_tokens.json", b'{"x": 1' + b"0" * 4000 + b"}", "for an id"),
        ("added_tokens.json", b'["x"]', "expected an object"),
        ("chat_template.jinja", b"\xff\xfe", "cannot be read as UTF-8"),
        ("chat_template.jinja", b" " * (17 << 20), "far too large"),
    ],
    ids=range(13),
)
@pytest.mark.parametrize("kind", PAIR)
def test_a_damaged_file_of_settings_is_named(folder, kind, name, content, words):
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=words) as caught:
        kind.from_pretrained(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("kind", PAIR)
def test_added_tokens_that_contradict_the_vocabulary_are_refused(folder, kind):
    for added, words in {
        '{"x": 5}': "'x' has the id 5, which the vocabulary gives to '<2mass>'",
        '{"x": 421}': "out of range",
        '{"x": 420, "y": 420}': "Two added tokens have the id 420: x and y",
    }.items():
        (folder / "added_tokens.json").write_text(added)
        with pytest.raises(TokenizerError, match=words):
            kind.from_pretrained(folder)


def test_a_template_file_stands_for_templates_without_a_default(folder):
    config = {"chat_template": [{"name": "tool", "template": "x"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}C")
    assert GemmaTokenizer.from_pretrained(folder).chat_template == "{{ bos_token }}C"


def test_a_hostile_post_processor_says_nothing_of_bos(folder):
    (folder / "tokenizer_config.json").unlink()
    path = folder / "tokenizer.json"
    path.write_bytes(b'{"post_processor": ' + b"[" * 100_000)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: It is not a whole"):
        GemmaTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", PAIR)
def test_settings_of_a_folder_are_followed(folder, kind):
    config = {
        "add_eos_token": True, "padding_side": "right", "model_max_length": 1e30,
        "bos_token": {"content": "<bos>", "lstrip": False}, "tokenizer_class": "GemmaTokenizer",
        "chat_template": [{"name": "default", "template": "{{ bos_token }}A"},
                          {"name": "tool", "template": "B"}],
        "extra_special_tokens": ["<unused0>"], "sp_model_kwargs": {},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<unused0>"}', "utf-8")
    (folder / "added_tokens.json").write_text('{"newword": 420}', "utf-8")
    tok = kind.from_pretrained(folder, truncation_side="left")
    assert (tok.padding_side, tok.truncation_side, tok.model_max_length) == ("right", "left", None)
    assert tok.encode("newword")[-2:] == [420, tok.eos_token_id]
    assert tok.pad_token == "<unused0>"
    message = [{"role": "user", "content": "x"}]
    assert tok.apply_chat_template(message, tokenize=False) == "<bos>A"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}C", "utf-8")
    tok = kind.from_pretrained(folder)
    assert tok.apply_chat_template(message, tokenize=False) == "<bos>C"
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja cannot be read as UTF-8"):
        kind.from_pretrained(folder)


def test_a_folder_opens_by_the_file_that_it_has(folder):
    assert type(open_tokenizer(folder)) is GemmaTokenizer
    (folder / "tokenizer.model").unlink()
    assert type(open_tokenizer(folder)) is GemmaTokenizerFast
    with pytest.raises(CheckpointNotFoundError, match=r"tokenizer\.json, which GemmaTokenizerFast"):
        GemmaTokenizer.from_pretrained(folder)
    assert type(open_tokenizer(folder / "tokenizer.json")) is GemmaTokenizerFast
    (folder / "tokenizer.json").unlink()
    assert open_tokenizer(folder) is None
    assert open_tokenizer(folder / "tokenizer.json") is None
    with pytest.raises(CheckpointNotFoundError, match=r"tokenizer\.json or tokenizer\.model"):
        GemmaTokenizerFast.from_pretrained(folder)


# -- the cache -------------------------------------------------------------------------------------


def test_a_damaged_cache_is_made_again(train, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path))
    model, other = train(), train(vocab_size=430)
    expected = GemmaTokenizer(model).encode(TEXT)
    assert GemmaTokenizerFast(model).encode(TEXT) == expected
    (cached,) = (tmp_path / "tokenizers").iterdir()
    whole = cached.read_bytes()
    check, _, text = whole.partition(b"\n")
    GemmaTokenizerFast(other)
    (another,) = set((tmp_path / "tokenizers").iterdir()) - {cached}
    pieces = json.loads(text)
    pieces["model"]["vocab"] = dict(
        zip(reversed(pieces["model"]["vocab"]), range(420), strict=True)
    )
    for damage in (b"", b"{", whole[: len(whole) // 2], another.read_bytes(), whole + b"x",
                   check + b"\n" + json.dumps(pieces).encode()):  # fmt: skip
        cached.write_bytes(damage)
        assert GemmaTokenizerFast(model).encode(TEXT) == expected
        assert cached.read_bytes() == whole
    assert not [path for path in cached.parent.iterdir() if path.suffix == ".partial"]


def test_without_a_place_for_a_cache_it_works(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / "file"))
    assert GemmaTokenizerFast(model).encode(TEXT) == GemmaTokenizer(model).encode(TEXT)


def test_without_a_home_for_a_cache_it_works(model, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_HUB_CACHE", "~no such user/cache")
    assert GemmaTokenizerFast(model).encode(TEXT) == GemmaTokenizer(model).encode(TEXT)
    (tmp_path / "tokenizers").mkdir()
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path))
    GemmaTokenizerFast(model)
    (cached,) = (tmp_path / "tokenizers").iterdir()
    cached.unlink()
    cached.mkdir()  # in the place of the file
    assert GemmaTokenizerFast(model).encode(TEXT) == GemmaTokenizer(model).encode(TEXT)
    assert list((tmp_path / "tokenizers").iterdir()) == [cached]


RACE = """
import sys
from gemma_hub.tokenizers import GemmaTokenizer
from gemma_hub.tokenizers.conversion import cache_folder
from gemma_hub.tokenizers.fast import GemmaTokenizerFast
models = [open(path, "rb").read() for path in sys.argv[1:]]
expected = [GemmaTokenizer(model).encode("a king had a cake") for model in models]
for i in range(60):
    for path in cache_folder().glob("*") if i % 3 == 0 else ():
        path.unlink(missing_ok=True)
    for model, ids in zip(models, expected):
        assert GemmaTokenizerFast(model).encode("a king had a cake") == ids
"""


def test_processes_that_share_a_cache_never_get_a_wrong_tokenizer(train, tmp_path):
    paths = []
    for size in (420, 430):
        paths.append(tmp_path / f"{size}.model")
        paths[-1].write_bytes(train(vocab_size=size))
    environment = {**os.environ, "GEMMA_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", RACE, *map(str, paths)]
    several = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    for process in several:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()[-2000:]
    assert not list((tmp_path / "cache").rglob("*.partial"))


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIR)
def test_saving_replaces_only_when_asked_and_leaves_the_rest_alone(kind, model, tmp_path):
    tok = kind(model)
    (tmp_path / "config.json").write_text("{}")
    paths = tok.save_pretrained(tmp_path)
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
    assert [Path(path).name for path in paths] == names
    assert (tmp_path / "tokenizer.model").read_bytes() == model
    with pytest.raises(CheckpointError, match=r"has tokenizer\.model, .*overwrite=True"):
        tok.save_pretrained(tmp_path)
    tok.add_eos_token = True
    tok.save_pretrained(tmp_path, overwrite=True)
    assert kind.from_pretrained(tmp_path).add_eos_token
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "config.json"])
    with pytest.raises(CheckpointError, match="is a file"):
        tok.save_pretrained(tmp_path / "config.json")


def test_a_failed_save_leaves_nothing(model, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        GemmaTokenizer(model).save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_what_was_there(model, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        GemmaTokenizer(model, add_eos_token=True).save_pretrained(folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not [path for path in folder.parent.iterdir() if path.name.endswith(".partial")]


def test_a_save_leaves_nothing_of_another_tokenizer(model, folder):
    stale = ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
    (folder / stale[0]).write_text('{"additional_special_tokens": ["<table>"]}')
    (folder / stale[1]).write_text('{"newword": 420}')
    (folder / stale[2]).write_text("{{ bos_token }}C")
    tok = GemmaTokenizer(model)
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        tok.save_pretrained(folder)
    tok.save_pretrained(folder, overwrite=True)
    for kind in PAIR:
        again = kind.from_pretrained(folder)
        assert (again.chat_template, again.additional_special_tokens) == (None, ())
        assert again.special_token_ids == tok.special_token_ids
        assert (len(again), again.encode("newword")) == (len(tok), tok.encode("newword"))


def test_a_path_that_is_no_place_is_refused(model, tmp_path):
    tok = GemmaTokenizer(model)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for path in ("loop", "file", "file/below", "x" * 300, "nul\0"):
        with pytest.raises(CheckpointError, match=r"cannot be written|is a file"):
            tok.save_pretrained(f"{tmp_path}/{path}")
    with pytest.raises(CheckpointError, match="cannot be written"):
        tok.save_pretrained("~no such user/x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_disk_of_its_own_is_written_to(model, tmp_path, monkeypatch):
    """A volume that is mounted, as in a container: nothing can be renamed into it from outside."""
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    outside = Path.replace

    def replace(path, target):
        assert volume in path.parents
        return outside(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    tok = GemmaTokenizer(model)
    tok.save_pretrained(volume)
    assert len(list(volume.iterdir())) == 3
    assert GemmaTokenizer.from_pretrained(volume).encode(TEXT) == tok.encode(TEXT)


KILLED = """
import os, sys
from gemma_hub import GemmaTokenizer
old = GemmaTokenizer.from_pretrained(sys.argv[1])
new = GemmaTokenizer.from_pretrained(sys.argv[1], add_eos_token=True)
print("ready", flush=True)
while True:
    new.save_pretrained(sys.argv[2], overwrite=True)
    old.save_pretrained(sys.argv[2], overwrite=True)
"""


def test_a_killed_save_leaves_whole_files(saved, tmp_path):
    target = tmp_path / "target"
    GemmaTokenizer.from_pretrained(saved).save_pretrained(target)
    old = {path.name: path.read_bytes() for path in target.iterdir()}
    GemmaTokenizer.from_pretrained(saved, add_eos_token=True).save_pretrained(tmp_path / "new")
    new = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    draw = random.Random(5)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(saved), str(target)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.1))
        process.kill()
        process.wait()
        process.stdout.close()
        there = {path.name: path.read_bytes() for path in target.iterdir()}
        assert there.keys() == old.keys()
        assert all(there[name] in (old[name], new[name]) for name in old)
        for kind in PAIR:
            assert kind.from_pretrained(target).encode("a king")[:1] == [2]
    # All that is left is a hidden folder for each, beside the target.
    left = {path.name for path in tmp_path.iterdir()} - {"target", "new"}
    assert all(name.startswith(".target.") and name.endswith(".partial") for name in left)
