"""The training code is a script beside the package, so its folder goes on the path here."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parents[1]
DATA = PROJECT.parents[2] / "shared" / "data"
CORPUS = DATA / "corpus" / "fairy_tales.txt"
QUERIES = DATA / "classification" / "snips"


@pytest.fixture
def training_path(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT))


@pytest.fixture(scope="session")
def corpus_file() -> Path:
    if not CORPUS.is_file():
        pytest.skip("the corpus is not part of the repository")
    return CORPUS


@pytest.fixture(scope="session")
def queries_folder() -> Path:
    if not QUERIES.is_dir():
        pytest.skip("the queries are not part of the repository")
    return QUERIES


@pytest.fixture
def held_out_queries(training_path, queries_folder):
    from training import queries

    return queries.read(queries_folder, "validate")


@pytest.fixture(scope="session")
def shipped_checkpoint():
    """By name, a checkpoint's folder, figures and card."""
    from gemma_hub_tiny.plugin import gemma_hub_checkpoints

    def of(name: str) -> SimpleNamespace:
        (folder,) = (Path(s.path) for s in gemma_hub_checkpoints() if s.name == name)
        return SimpleNamespace(
            folder=folder,
            figures=json.loads((folder / "training.json").read_text(encoding="utf-8")),
            card=(folder / "README.md").read_text(encoding="utf-8"),
        )

    return of


@pytest.fixture
def small_base(training_path, tmp_path) -> Path:
    """A checkpoint of a model without training, small enough to learn something in seconds."""
    from gemma_hub.checkpoints import save_checkpoint
    from gemma_hub.config import GemmaConfig
    from gemma_hub.parameters import ArrayWeights, parameter_shapes
    from training import vocabulary

    config = GemmaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    weights = ArrayWeights(
        {
            name: (0.1 * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in parameter_shapes(config).items()
        }
    )
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(3000)]
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(vocabulary.train(" ".join(words[i : i + 10]) for i in range(0, 3000, 10)))
    save_checkpoint(tmp_path / "base", config, weights, files=[tokenizer])
    return tmp_path / "base"
