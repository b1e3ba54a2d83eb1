"""A checkpoint that takes no time, and a folder of peers that need no framework."""

import pytest

from gemma_hub.bench.checkpoints import random_checkpoint
from gemma_hub.config import GemmaConfig

GOOD = """
import numpy as np

DISTRIBUTIONS = ("numpy", "no-such-distribution")

def start(request):
    print("frameworks print to standard output")

def load(request):
    return lambda ids, new: np.zeros((len(ids), new), int)
"""
TABLE = """
[good]
script = "good.py"

[wrong]
script = "wrong.py"

[short]
script = "short.py"

[dead]
script = "dead.py"

[homeless]
script = "good.py"
requirements = ["./no-such-folder"]
"""


@pytest.fixture(scope="session")
def tiny_config() -> GemmaConfig:
    return GemmaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=48,
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_config):
    return random_checkpoint(tmp_path_factory.mktemp("bench") / "random", tiny_config)


@pytest.fixture
def peers_dir(tmp_path):
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "peers.toml").write_text(TABLE)
    (folder / "good.py").write_text(GOOD)
    (folder / "wrong.py").write_text(GOOD.replace("np.zeros", "np.no_such_name"))
    (folder / "short.py").write_text(GOOD.replace("new), int", "new - 1), int"))
    (folder / "dead.py").write_text(GOOD + "\nimport os\nos.kill(os.getpid(), 9)\n")
    return folder
