"""Loading makes no second copy of the weights.

A child process loads a bfloat16 checkpoint of about 200 MB through the public door while a thread
watches its private memory (RssAnon: pages that are not a file's).
"""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma_hub import GemmaConfig
from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.parameters import ArrayWeights, parameter_shapes

CONFIG = GemmaConfig(
    vocab_size=30_000,
    hidden_size=512,
    intermediate_size=4096,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=128,
    dtype="bfloat16",
)
LARGEST = CONFIG.vocab_size * CONFIG.hidden_size * 2
WEIGHTS = CONFIG.num_parameters * 2
SLACK = 20e6  # Python objects, thread stacks, the allocator's own

CHILD = """
import json, sys, threading, time
from gemma_hub import Gemma

def private_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

path, warm, backend = sys.argv[1:]
Gemma.load(warm, backend=backend).forward([[2, 3]])  # imports, compilers and thread pools
peak = start = private_bytes()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, private_bytes())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
lm = Gemma.load(path, backend=backend)
done = True
thread.join()
print(json.dumps({"peak": max(peak, private_bytes()) - start, "end": private_bytes() - start}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint to measure with, and a tiny one to warm up with."""
    folder = tmp_path_factory.mktemp("memory")
    small = GemmaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        dtype="bfloat16",
    )
    for name, config in (("large", CONFIG), ("small", small)):
        arrays = {
            key: np.full(shape, 0.01, ml_dtypes.bfloat16)
            for key, shape in parameter_shapes(config).items()
        }
        save_checkpoint(folder / name, config, ArrayWeights(arrays))
    return folder / "large", folder / "small"


def measure(checkpoints: tuple[Path, Path], backend: str) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, *map(str, checkpoints), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_torch_maps_the_file(checkpoints: tuple[Path, Path]) -> None:
    assert measure(checkpoints, "torch")["peak"] < SLACK


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_flax_holds_the_weights_once_and_one_tensor_more(checkpoints: tuple[Path, Path]) -> None:
    assert measure(checkpoints, "flax")["peak"] < WEIGHTS + LARGEST + SLACK
