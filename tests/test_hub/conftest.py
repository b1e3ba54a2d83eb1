"""huggingface_hub, pointed at a local stand-in of the hub, with a cache for each test."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

REASON = "the core's tests pass without it"
TIMEOUT = 10  # seconds


def _module(name: str):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"hub_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_STAND_IN = _module("stand_in")


@pytest.fixture
def stand_in():
    with _STAND_IN.StandIn() as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hf" / "hub"


@pytest.fixture
def hub(stand_in, cache, tmp_path, monkeypatch):
    """The stand-in, asked by huggingface_hub in this process.

    That package reads its environment when it is imported, which may have been long ago, so its
    constants are changed instead. Processes of their own get the `environment`.
    """
    huggingface_hub = pytest.importorskip("huggingface_hub", reason=REASON)
    constants = importlib.import_module("huggingface_hub.constants")
    changes = {
        "ENDPOINT": stand_in.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": stand_in.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache.parent),
        "HF_TOKEN_PATH": str(cache.parent / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": False,
        "HF_HUB_ETAG_TIMEOUT": TIMEOUT,
        "HF_HUB_DOWNLOAD_TIMEOUT": TIMEOUT,
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value, raising=False)  # older versions lack some
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # Proxies are for other hosts; the client that may be there was made without this.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.chdir(tmp_path)
    close = getattr(huggingface_hub, "close_session", lambda: None)
    close()
    yield stand_in
    close()


@pytest.fixture
def environment(stand_in, cache):
    """What points a process of its own at the stand-in."""
    pytest.importorskip("huggingface_hub", reason=REASON)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": stand_in.url,
        "HF_HOME": str(cache.parent),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1,localhost",
        "COLUMNS": "200",
    }


@pytest.fixture
def offline(monkeypatch):
    """`offline()` is what HF_HUB_OFFLINE=1 does."""
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def impatient(monkeypatch):
    """What HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT do, in parts of a second."""
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", 0.3)


@pytest.fixture
def no_pauses(monkeypatch):
    """huggingface_hub waits seconds between its tries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def shards(tmp_path_factory, tokenizer_model):
    """{name: content} of a whole checkpoint in several shards, as `save_checkpoint` writes it."""
    folder = tmp_path_factory.mktemp("hub")
    config = _config()
    draw = np.random.default_rng(3).normal
    arrays = {
        name: draw(size=shape).astype(DTYPES["bfloat16"])
        for name, shape in parameter_shapes(config).items()
    }
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    target = folder / "checkpoint"
    files = [folder / "tokenizer.model"]
    save_checkpoint(target, config, ArrayWeights(arrays), files=files, max_shard_bytes=6000)
    return {file.name: file.read_bytes() for file in sorted(target.iterdir())}


@pytest.fixture(scope="session")
def single(shards, tmp_path_factory):
    """The same checkpoint in one file."""
    folder = tmp_path_factory.mktemp("single")
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    checkpoint = open_checkpoint(folder)
    target = folder.with_name("single-file")
    save_checkpoint(target, checkpoint.config, checkpoint.weights)
    kept = {name: content for name, content in shards.items() if "safetensors" not in name}
    return kept | {"model.safetensors": (target / "model.safetensors").read_bytes()}


def _config():
    return GemmaConfig(
        dtype="bfloat16",
        vocab_size=300,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
    )
