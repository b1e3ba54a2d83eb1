"""What the checkpoint "tiny" promises: its shape, its files, and what its card says of them."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gemma_hub import Gemma
from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.inputs import ModelInputs
from gemma_hub.tokenizers import GemmaTokenizer
from gemma_hub_tiny.plugin import gemma_hub_checkpoints

FOLDER = Path(gemma_hub_checkpoints()[0].path)
FIGURES = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "training.json",
}


def test_the_plugin_names_the_folder_that_ships():
    spec = gemma_hub_checkpoints()[0]
    assert spec.name == "tiny"
    assert {path.name for path in Path(spec.path).iterdir()} == FILES


def test_the_config_takes_the_paths_on_which_ports_go_wrong():
    config = open_checkpoint(FOLDER).config
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.tie_word_embeddings
    assert 3_500_000 < config.num_parameters < 4_500_000


def test_it_is_small_and_bfloat16():
    checkpoint = open_checkpoint(FOLDER)
    weights = checkpoint.weights
    assert checkpoint.dtype == checkpoint.config.dtype == "bfloat16"
    assert {weights.dtype(name) for name in weights.names()} == {"bfloat16"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000


def test_the_norms_have_learned():
    weights = open_checkpoint(FOLDER).weights
    for name in weights.names():
        if name.endswith("norm.weight"):
            assert np.abs(weights.read(name).astype(np.float32)).max() > 0.05, name


def test_special_ids_are_those_of_gemma_1():
    tokenizer = GemmaTokenizer.from_pretrained(FOLDER)
    expected = {
        "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<2mass>": 5, "[@BOS@]": 6,
        "<unused0>": 7, "<unused98>": 105, "<start_of_turn>": 106, "<end_of_turn>": 107,
        "\n": 108, "\n\n": 109, "<0x00>": 110, "<0xFF>": 365,
    }  # fmt: skip
    assert {piece: tokenizer.token_to_id(piece) for piece in expected} == expected
    assert tokenizer.special_token_ids == {*range(108)}
    config = open_checkpoint(FOLDER).config
    assert tokenizer.vocab_size == config.vocab_size == 4096
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert ids == (config.pad_token_id, config.eos_token_id, config.bos_token_id)


def test_any_text_comes_back():
    tokenizer = GemmaTokenizer.from_pretrained(FOLDER)
    text = "Once  upon\ta time:\r\n\n\n\n«日本» 🧙 1234 <bos>"
    ids = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    assert tokenizer.decode(ids) == text


# -- the card --------------------------------------------------------------------------------------


def test_the_card_has_the_hash_and_size_of_every_file():
    lines = re.findall(r"^\| (\S+) \| ([\d,]+) \| `([0-9a-f]{64})` \|$", CARD, flags=re.MULTILINE)
    listed = {name: (int(size.replace(",", "")), digest) for name, size, digest in lines}
    files = [path for path in FOLDER.iterdir() if path.name != "README.md"]
    assert listed == {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


def test_the_card_has_the_figures():
    held_out = FIGURES["held_out"]
    assert f"{held_out['nats_per_token']:.4f} nats per token" in CARD
    assert f"{held_out['bits_per_byte']:.4f} bits per byte" in CARD
    assert FIGURES["corpus_sha256"] in CARD
    for sample in FIGURES["samples"]:
        for line in (sample["prompt"] + sample["text"]).strip().split("\n"):
            assert f"> {line}".rstrip() in CARD


def test_it_learned_and_did_not_memorize():
    curve = FIGURES["curve"]
    assert min(point["held_out"] for point in curve) < 4.0 < curve[0]["held_out"]
    # bfloat16 costs little: the figures of the files are near those of the training run.
    last = curve[-1]["held_out"]
    assert FIGURES["held_out"]["nats_per_token"] == pytest.approx(last, abs=0.01)
    assert last < min(point["held_out"] for point in curve) + 0.05


@pytest.mark.parametrize(("backend", "dtype"), [("torch", "float32"), ("numpy", "float64")])
@pytest.mark.parametrize("index", range(len(FIGURES["samples"])))
def test_the_samples_come_out_again(backend, dtype, index):
    pytest.importorskip(f"gemma_hub_{backend}")
    sample = dict(FIGURES["samples"][index])
    prompt, text = sample.pop("prompt"), sample.pop("text")
    if backend == "numpy" and "seed" in sample:
        pytest.skip("the reference is slow; it checks the greedy samples")
    lm = Gemma.load(FOLDER, backend=backend, dtype=dtype)
    assert lm.generate(prompt, **sample).text == text


def test_the_held_out_loss_is_what_the_reference_finds(training_path, corpus_file):
    """On the first held-out rows. The card's figure comes from torch in float32.

    Float32 logits of scale 10 are off by about 1e-5 at most, and their mean loss over some hundred
    tokens by less; the recorded figure is rounded at 5e-7. Hence 1e-5.
    """
    backend = pytest.importorskip("gemma_hub_numpy.backend").NumpyBackend()
    from training import corpus

    held_out = FIGURES["held_out"]
    tokenizer = GemmaTokenizer.from_pretrained(FOLDER)
    _, stories = corpus.split(corpus.read(corpus_file))
    rows, size = corpus.held_out_rows(
        stories,
        lambda text: tokenizer.encode(text, add_special_tokens=False, allow_special=False),
        length=FIGURES["settings"]["length"],
        bos=tokenizer.bos_token_id,
    )
    assert size == held_out["bytes"]
    assert sum(len(row) - 1 for row in rows) == held_out["tokens"]

    checkpoint = open_checkpoint(FOLDER)
    model = backend.build(
        checkpoint.config, TaskSpec(), checkpoint.weights, BuildOptions(dtype="float64")
    )
    losses = []
    for row in rows[: held_out["checked_rows"]]:
        inputs = ModelInputs.prepare(checkpoint.config, [row[:-1]])
        logits = model.to_numpy(model.forward(inputs).logits)[0].astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        losses.extend(-log_probs[np.arange(len(row) - 1), row[1:]])
    assert np.mean(losses) == pytest.approx(held_out["checked_nats_per_token"], abs=1e-5)
