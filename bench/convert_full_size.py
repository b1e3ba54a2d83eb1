"""A gemma-2b-shaped model there and back, and a gemma-7b-shaped plan. Needs 16 GB of disk.

Usage: python bench/convert_full_size.py FOLDER [--through FORMAT]

The 2b model is random, bfloat16, 5 GB. Prints seconds and the most private memory that each
conversion held, which must stay below the largest tensor of either side plus 300 MB.
"""

import argparse
import json
import math
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np

from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.conversion import convert, describe, plan_conversion, tensor_hashes
from gemma_hub.parameters import DTYPES, Index, Shape, parameter_shapes

ALLOWED = 300_000_000  # bytes of private memory beside the largest tensor


class RandomWeights:
    """bfloat16 weights that are made when they are read."""

    def __init__(self, config: GemmaConfig) -> None:
        self._shapes = parameter_shapes(config)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def read(self, name: str, index: Index = None) -> np.ndarray:
        rng = np.random.default_rng(list(name.encode()))
        bits = rng.integers(0, 1 << 16, size=self._shapes[name], dtype=np.uint16)
        # Exponents around 1, so that every value is finite.
        array = ((bits & 0x80FF) | 0x3F00).view(DTYPES["bfloat16"])
        return array if index is None else array[index]


class PeakMemory:
    """The most private memory of this process while the block runs, sampled every 5 ms."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = _private()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(0.005):
            self.peak = max(self.peak, _private())

    @property
    def grown(self) -> int:
        return self.peak - self.start


def _private() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell a process's private memory")


def there_and_back(folder: Path, through: str) -> bool:
    config = GemmaConfig.preset("gemma-2b")
    first, other, back = (folder / name for name in ("first", "other", "back"))
    save_checkpoint(first, config, RandomWeights(config), overwrite=True)
    is_good = True
    for source, target, to in ((first, other, through), (other, back, "huggingface")):
        started = time.perf_counter()
        with PeakMemory() as memory:
            record = convert(source, target, to, overwrite=True)
        seconds = time.perf_counter() - started
        nbytes = (math.prod(s) * DTYPES[d].itemsize for s, d in record.tensors.values())
        largest = max(*nbytes, config.vocab_size * config.hidden_size * 2)
        is_good &= memory.grown <= largest + ALLOWED
        _say(
            f"2b {record.source_format} -> {to}: {record.nbytes / 1e9:.2f} GB in {seconds:.1f} s, "
            f"private memory {memory.grown / 1e6:.0f} MB (largest tensor {largest / 1e6:.0f} MB)"
        )
    is_equal = tensor_hashes(first) == tensor_hashes(back)
    _say(f"2b there and back: {'bit-equal' if is_equal else 'DIFFERENT'}")
    for path in (first, other, back):
        shutil.rmtree(path)
    return is_good and is_equal


def plan_7b(folder: Path, through: str) -> bool:
    """Headers of a sharded 7b model over files with holes: nothing can be read, only planned."""
    config = GemmaConfig.preset("gemma-7b")
    target = folder / "headers"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shapes = list(parameter_shapes(config).items())
    halves = [shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]]
    places = {}
    for number, half in enumerate(halves, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        header, end = {}, 0
        for tensor, shape in half:
            start, end = end, end + math.prod(shape) * 2
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            places[tensor] = name
        text = json.dumps(header).encode()
        with (target / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_text(json.dumps(config.to_dict()))
    started = time.perf_counter()
    description, plan = describe(target), plan_conversion(target, through)
    _say(
        f"7b: inspected ({description.num_parameters:,} parameters, {len(description.problems)} "
        f"problems) and planned ({len(plan.tensors)} tensors of {through}, "
        f"{plan.nbytes / 1e9:.2f} GB) in {time.perf_counter() - started:.2f} s"
    )
    shutil.rmtree(target)
    return not description.problems and not plan.objections


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--through", default="gemma_pytorch")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    planned = plan_7b(arguments.folder, arguments.through)
    return 0 if there_and_back(arguments.folder, arguments.through) and planned else 1


if __name__ == "__main__":
    sys.exit(main())
