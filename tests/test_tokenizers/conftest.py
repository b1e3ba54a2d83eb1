"""Vocabularies that the tests of tokenizers share, and a cache of their own."""

import importlib.util
import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece

from gemma_hub.tokenizers import GemmaTokenizer

# The tokenizers package panics on some vocabularies, and names for its stack take it a second.
os.environ["RUST_BACKTRACE"] = "0"

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
STORY = (
    "Once upon a time there was a king who had three sons. The youngest son went out into the wide "
    "world to seek his fortune, and the old woman gave him bread, cheese and a little grey horse."
)
MARKS = ["<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused1>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
TEXT_PIECES = ["\n", "\n\n", "▁▁", "▁▁▁", "\t\t", "<table>", "</h1>", "<s>"]
TRAINED = {
    "trained": {},
    "without_bytes": {"byte_fallback": False, "vocab_size": 120},
    "overlapping": {
        "user_defined_symbols": ["[a]", "<[a]>", "[b]", "▁▁", "<x>", "<x>y", "x>", "\n▁", "▁\n"],
        "control_symbols": ["<eos>>", "¶", "[a]["],
    },
    "renamed": {"bos_piece": "<s", "eos_piece": "<sos>", "unk_piece": "\ufffd", "pad_piece": "<so"},
    "with_prefix": {"add_dummy_prefix": True},
    "dead_marks": {"user_defined_symbols": ["  ", "a b", "x  ", "▁▁▁", "\x01", "👍🏽"]},
}
"""What is different in models that `trained` makes."""
FILES = {
    "gemma_1": DATA / "tokenizer/gemma1/tokenizer.rebuilt.model",
    "tiny": ROOT / "plugins/tiny/gemma_hub_tiny/checkpoint/tokenizer.model",
    "mistral": DATA / "tokenizer/mistral/mistral01.model",
    "test_model": DATA / "tokenizer/sentencepiece/test_model.model",
    "gemma3_test": DATA / "tokenizer/keras_hub/gemma3_test_vocab.spm",
    "gemma3n_test": DATA / "tokenizer/keras_hub/gemma3n_test_vocab.spm",
    "gemma4_test": DATA / "tokenizer/keras_hub/gemma4_test_vocab.spm",
    "gemma_export": DATA / "tokenizer/keras_hub/gemma_export_vocab.spm",
    "gemma_test": DATA / "tokenizer/keras_hub/gemma_test_vocab.spm",
    "no_special_token": DATA / "tokenizer/keras_hub/no_special_token_vocab.spm",
}
"""Vocabularies that others made, most of them not for Gemma."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Converted vocabularies go here, and not where the user's are."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GEMMA_HUB_CACHE", str(folder))
        yield folder


def trained(**changes) -> bytes:
    """A SentencePiece model with Gemma's settings and a few hundred pieces."""
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 1.0,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "unk_piece": "<unk>",
        "user_defined_symbols": [*MARKS, *TURNS, *TEXT_PIECES],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORY.split(". ")), model_writer=model, **(options | changes)
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def train():
    """`train(vocab_size=...)` gives the content of a tokenizer.model."""
    return trained


@pytest.fixture(scope="session")
def model() -> bytes:
    return trained()


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def gemma_1() -> Path:
    """Gemma's vocabulary of 256,000 pieces."""
    path = FILES["gemma_1"]
    if not path.is_file():
        pytest.skip("Gemma's 256,000-piece vocabulary is not part of the repository")
    return path


def vocabulary(name: str) -> bytes | None:
    """The content of a tokenizer.model that `TRAINED` or `FILES` names; None if it is absent."""
    if name in TRAINED:
        return trained(**TRAINED[name])
    return FILES[name].read_bytes() if FILES[name].is_file() else None


@pytest.fixture(scope="session")
def named():
    """`named("trained")` gives the content of a tokenizer.model, or skips the test."""

    def find(name: str) -> bytes:
        content = vocabulary(name)
        if content is None:
            pytest.skip(f"the vocabulary {name} is not part of the repository")
        return content

    return find


@pytest.fixture(scope="session")
def random_texts():
    """The module random_texts.py, which the script fuzz.py uses too."""
    path = Path(__file__).with_name("random_texts.py")
    spec = importlib.util.spec_from_file_location("tokenizer_random_texts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
