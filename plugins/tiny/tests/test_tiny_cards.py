"""What the cards of the fine-tuned checkpoints say of their files."""

import hashlib
import re
from pathlib import Path

import pytest

from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.tokenizers import GemmaTokenizer
from gemma_hub_tiny.plugin import gemma_hub_checkpoints

TASKS = {"tiny-intents": "sequence_classification", "tiny-slots": "token_classification"}
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "training.json",
}


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


@pytest.fixture
def shipped(name, shipped_checkpoint):
    return shipped_checkpoint(name)


def test_the_plugin_names_three_checkpoints():
    assert [spec.name for spec in gemma_hub_checkpoints()] == ["tiny", *TASKS]


def test_it_is_whole_small_and_bfloat16(name, shipped):
    assert {path.name for path in shipped.folder.iterdir()} == FILES
    assert sum(path.stat().st_size for path in shipped.folder.iterdir()) <= 10_000_000
    checkpoint = open_checkpoint(shipped.folder, task=TASKS[name])
    weights = checkpoint.weights
    assert checkpoint.dtype == checkpoint.config.dtype == "bfloat16"
    assert {weights.dtype(tensor) for tensor in weights.names()} == {"bfloat16"}
    tokenizer = GemmaTokenizer.from_pretrained(shipped.folder)
    assert tokenizer.vocab_size == checkpoint.config.vocab_size


def test_the_card_has_the_hash_and_size_of_every_file(shipped):
    pattern = r"^\| (\S+) \| ([\d,]+) \| `([0-9a-f]{64})` \|$"
    lines = re.findall(pattern, shipped.card, flags=re.MULTILINE)
    listed = {name: (int(size.replace(",", "")), digest) for name, size, digest in lines}
    assert listed == {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in shipped.folder.iterdir()
        if path.name != "README.md"
    }


def test_the_card_has_the_hash_of_the_data(shipped, training_path):
    from training.queries import SHA256

    assert shipped.figures["data_sha256"] == SHA256
    for file, digest in SHA256.items():
        assert f"| {file} | `{digest}` |" in shipped.card


def test_it_comes_from_the_tiny_that_ships(shipped):
    base = Path(gemma_hub_checkpoints()[0].path) / "model.safetensors"
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    assert digest == shipped.figures["base_sha256"]
    assert digest in shipped.card


def test_the_weights_are_those_of_the_best_epoch(shipped):
    curve = shipped.figures["curve"]
    best = max(curve, key=lambda point: point["score"])
    assert best["epoch"] == shipped.figures["best_epoch"]
    for point in curve:
        assert (
            f"| {point['epoch']} | {point['loss']:.3f} | {abs(point['score']):.4f} |"
            in shipped.card
        )
