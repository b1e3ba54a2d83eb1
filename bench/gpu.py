"""The benchmark on a GPU: bfloat16, gemma-2b and gemma-7b shaped, and how often the host waits.

Usage: python bench/gpu.py FOLDER [--shape 2b --shape 7b] [--backend torch --backend flax]

Needs 22 GB of disk and a GPU of 40 GB for both shapes. Writes SHAPE.json, SHAPE.md and SHAPE.svg.
"""

import argparse
import os
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np

from gemma_hub import Gemma
from gemma_hub.bench.benchmark import run_bench
from gemma_hub.bench.checkpoints import SHAPES
from gemma_hub.bench.measuring import prompt
from gemma_hub.bench.plot import plot
from gemma_hub.bench.running import SHORT_PROMPT, Settings
from gemma_hub.plugins.registry import plugin_registry

NEW = 32
PEERS = Path(__file__).parent / "peers"


def gpu_backends(names: list[str]) -> list[str]:
    """Those whose default device is no CPU."""
    defaults = {name: plugin_registry().load(name).backend.devices()[0] for name in names}
    for name, device in defaults.items():
        print(f"{name}: {device}")
    return [name for name, device in defaults.items() if not device.startswith("cpu")]


def host_reads(backend: str, checkpoint: Path, vocab_size: int) -> float:
    """Arrays that the host reads for each new token, each of which waits for the GPU."""
    lm = Gemma.load(checkpoint, backend=backend)
    ids = prompt(1, SHORT_PROMPT, vocab_size).tolist()
    kind = type(lm.contract)
    with patch.object(kind, "to_numpy", autospec=True, side_effect=kind.to_numpy) as read:
        counts = []
        for new in (1, 1 + NEW):
            before = read.call_count
            lm.generate(input_ids=ids, max_new_tokens=new, eos_token_id=())
            counts.append(read.call_count - before)
    return float(np.diff(counts)[0]) / NEW


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--backend", action="append")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes, in turn
    backends = gpu_backends(arguments.backend or ["torch", "flax"])
    if not backends:
        print("No backend has a GPU here. Install PyTorch or JAX for the GPU of this machine.")
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for shape in arguments.shape or ("2b", "7b"):
        report = run_bench(
            Settings(), shape=shape, backends=backends, peers_dir=PEERS, cache=arguments.folder
        )
        checkpoint = arguments.folder / "checkpoints" / shape
        lines = [report.to_markdown()]
        for backend in backends:
            reads = host_reads(backend, checkpoint, report.config.vocab_size)
            lines.append(f"- {backend}: the host reads {reads:.2f} arrays for each new token\n")
        print("".join(lines))
        for suffix, text in (
            ("json", report.to_json()), ("md", "".join(lines)), ("svg", plot(report)),
        ):  # fmt: skip
            (arguments.folder / f"{shape}.{suffix}").write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
