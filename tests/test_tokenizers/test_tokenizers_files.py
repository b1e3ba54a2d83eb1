"""tokenizer.model and tokenizer.json that are broken, contradict one another or mean harm."""

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

from gemma_hub.errors import CheckpointNotFoundError, TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast
from gemma_hub.tokenizers.conversion import json_content

PAIR = [GemmaTokenizer, GemmaTokenizerFast]
TEXT = "a king  had <end_of_turn> €\n\n   son▁"


def refused(content, words: str) -> None:
    """That a tokenizer.json is refused in these words, and quickly."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    start = time.process_time()
    with pytest.raises(TokenizerError, match=words):
        GemmaTokenizerFast(data)
    assert time.process_time() - start < 1


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
        start = time.process_time()
        try:
            tok = kind(bytes(data))
            ids = tok.encode("a king  had <end_of_turn> \\n \U0001f9d9", allow_special=i % 2 == 0)
            results.append((ids, tok.decode(ids), len(tok.vocab), repr(tok.special_tokens_map)))
            loaded += 1
        except TokenizerError as error:
            results.append(str(error))
        if time.process_time() - start > 1:
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
    start = time.process_time()
    with pytest.raises(TokenizerError, match=words):
        kind(b"".join(records) + settings)
    assert time.process_time() - start < 1


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
