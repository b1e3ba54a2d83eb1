"""The folder of a tokenizer: its settings, the cache of conversions, and saving."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, TokenizerError
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast, open_tokenizer

PAIR = [GemmaTokenizer, GemmaTokenizerFast]
TEXT = "a king  had <end_of_turn> €\n\n   son▁"


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
    start = time.process_time()
    with pytest.raises(TokenizerError, match=words) as caught:
        kind.from_pretrained(folder)
    assert time.process_time() - start < 1
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
