"""Damage small Keras presets in many ways: each gives a CheckpointError, or a load, in 1 s.

The files are opened in forked processes, so that a crash, a hang or a fill-up of memory would be
counted too, and its seed printed. With libhdf5 as the reader about one file in 200 did that.

python tests/checkpoints/formats/fuzz_keras.py --runs 30000
python tests/checkpoints/formats/fuzz_keras.py --seed 1234 --runs 1    # that one again
"""

import argparse
import ast
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from gemma_hub.checkpoints.formats.hdf5_file import Hdf5File
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.checkpoints.formats.keras import KerasPreset
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

LIMIT = 1.0  # seconds for one file
HANGS = 20.0  # seconds after which a process is ended
BATCH = 200
MEMORY = 4 << 30  # bytes of address space of a process
RECORDED = Path(__file__).with_name("keras_hub")
NUMBERS = [0, 1, 2, 8, 16, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 8, 2**64 - 1]
VALUES = [0, 1, -1, 2, 3, 10**6, 2**63, 1e308, 0.5, None, "", "x", True, False, [], {}, [[[]]]]
FILES = ["../x.weights.h5", "/etc/passwd", "config.json", "", None, 7, [], ["a.weights.h5"] * 2]


def source(dtype: str) -> Opened:
    config = GemmaConfig(
        vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=2, dtype=dtype,
    )  # fmt: skip
    draw = np.random.default_rng(3).normal
    shapes = parameter_shapes(config)
    arrays = {name: draw(size=shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    return Opened(path=Path(), config=config, task="causal_lm", weights=ArrayWeights(arrays))


def folders(root: Path) -> list[Path]:
    """Our own presets, whole and in shards, and keras-hub's."""
    made = []
    for name, dtype, size in (("one", "bfloat16", None), ("shards", "float16", 300)):
        made.append(root / name)
        made[-1].mkdir()
        KerasPreset().write(made[-1], source(dtype), WriteOptions(max_shard_bytes=size))
    for recorded in ("float32", "bfloat16_sharded"):
        made.append(root / recorded)
        shutil.copytree(RECORDED / recorded, made[-1])
    return made


def structure(path: Path) -> list[int]:
    """Offsets of the bytes that are not a tensor's and not zero, which are the ones that matter."""
    content = path.read_bytes()
    is_data = np.zeros(len(content), bool)
    for tensor in Hdf5File(path).tensors.values():
        is_data[tensor.start : tensor.start + tensor.nbytes] = True
    return [i for i, byte in enumerate(content) if byte and not is_data[i]]


def addresses(content: bytes) -> list[int]:
    """Offsets of the 8-byte words that could be addresses: below the size, and aligned."""
    words = np.frombuffer(content[: len(content) // 8 * 8], "<u8")
    return [8 * int(i) for i in np.flatnonzero((words > 0) & (words < len(content)))]


def damaged(content: bytes, spots: list[int], words: list[int], draw: random.Random) -> bytes:
    """`content` with one to eight mutations, most of them at `spots` and at the `words`."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 8])):
        at = draw.choice(spots) if draw.random() < 0.8 else draw.randrange(len(content))
        match draw.randrange(9):
            case 0 | 1:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 2:
                data[at : at + 1] = bytes([content[at] ^ 1 << draw.randrange(8)])
            case 3:
                number, size = draw.choice(NUMBERS), draw.choice([1, 2, 4, 8])
                data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
            case 4 | 5:  # one structure where another should be, also a cycle
                one, other = draw.choice(words), draw.choice(words)
                data[one : one + 8] = content[other : other + 8]
            case 6:  # an address of anything
                one = draw.choice(words)
                data[one : one + 8] = draw.choice([at, at // 8 * 8, len(content)]).to_bytes(
                    8, "little"
                )
            case 7:
                start, size = draw.randrange(len(content)), draw.choice([8, 40, 300, 3000])
                data[at : at + size] = content[start : start + size]
            case 8:
                if draw.random() < 0.5:
                    del data[draw.randrange(len(data) + 1) :]
                else:
                    del data[at : at + draw.choice([1, 8, 100])]
    return bytes(data)


def damaged_json(content: bytes, draw: random.Random) -> bytes:
    """The object with one value, at any depth, replaced, removed or added."""
    if draw.random() < 0.2:
        data = bytearray(content)
        at = draw.randrange(len(data))
        data[at : at + draw.choice([1, 1, 9])] = draw.choice([b"", b"[", b"\xff", b"{" * 9000])
        return bytes(data)
    whole = table = json.loads(content)
    while draw.random() < 0.8:
        inner = [value for value in table.values() if isinstance(value, dict) and value]
        if not inner:
            break
        table = draw.choice(inner)
    key = draw.choice(sorted(table))
    match draw.randrange(3):
        case 0:
            table[key] = draw.choice([*VALUES, *FILES, *table.values()])
        case 1:
            del table[key]
        case 2:
            table[draw.choice(["x", key + "_1", "/layers", ""])] = draw.choice(
                [*VALUES, table[key]]
            )
    return json.dumps(whole).encode()


class Preset:
    """A folder: its files, without those below it, and its tensors."""

    def __init__(self, folder: Path) -> None:
        self.files = [Target(path) for path in sorted(folder.iterdir()) if path.is_file()]
        self.expected = contents(KerasPreset().open(folder))


class Target:
    """One file of a preset, and what is known of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, path.read_bytes()
        self.is_json = path.suffix == ".json"
        self.spots = [] if self.is_json else structure(path)
        self.words = [] if self.is_json else addresses(self.content)

    def damaged(self, draw: random.Random) -> bytes:
        if self.is_json:
            return damaged_json(self.content, draw)
        return damaged(self.content, self.spots, self.words, draw)


def check(folder: Path, expected: dict[str, bytes]) -> str:
    """Open and read all; what came of it."""
    try:
        opened = KerasPreset().open(folder)
    except CheckpointError:
        return "refused"
    found = contents(opened)
    return "loaded" if found == expected else "loaded, with other values"


def contents(opened: Opened) -> dict[str, bytes]:
    shapes, arrays = parameter_shapes(opened.config, opened.task), {}
    for name, shape in shapes.items():
        array = opened.weights.read(name)
        assert array.shape == shape, name
        arrays[name] = array.tobytes()
    return arrays


def one_run(presets: list[Preset], root: Path, seed: int) -> tuple[str, float]:
    draw = random.Random(seed)
    preset = draw.choice(presets)
    files = [file for file in preset.files if not file.is_json or draw.random() < 0.1]
    target = draw.choice(files)
    folder = root / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for other in preset.files:
        (folder / other.path.name).write_bytes(
            target.damaged(draw) if other is target else other.content
        )
    start = time.perf_counter()
    outcome = check(folder, preset.expected)
    return f"{target.path.suffix} {outcome}", time.perf_counter() - start


def worker(presets: list[Preset], root: Path, seeds: range, pipe: int) -> None:
    """Say each seed before its run, and what came of it after."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for seed in seeds:
        os.write(pipe, f"{seed}\n".encode())
        try:
            outcome, seconds = one_run(presets, root, seed)
        except BaseException as error:  # noqa: BLE001  # anything else than a CheckpointError
            outcome, seconds = f"FAILED with {type(error).__name__}: {error}"[:300], 0.0
        outcome = f"FAILED: took {seconds:.1f} s" if seconds > LIMIT else outcome
        os.write(pipe, f"{(outcome, seconds)!r}\n".encode())


def in_a_process(presets: list[Preset], root: Path, seeds: range) -> list[tuple[str, float]]:
    """The outcomes of the runs of one process; after a crash or a hang, of those up to it."""
    reader, writer = os.pipe()
    if (process := os.fork()) == 0:
        try:
            worker(presets, root, seeds, writer)
        finally:
            os._exit(0)
    os.close(writer)
    text, is_hanging = b"", False
    while True:
        ready, _, _ = select.select([reader], [], [], HANGS)
        if not ready:
            is_hanging = True
            os.kill(process, signal.SIGKILL)
            break
        if not (piece := os.read(reader, 1 << 16)):
            break
        text += piece
    os.close(reader)
    _, status = os.waitpid(process, 0)
    lines = text.decode().splitlines()
    outcomes = [ast.literal_eval(line) for line in lines if line.startswith("(")]
    if is_hanging or status:
        outcomes.append(("FAILED: hangs" if is_hanging else f"FAILED: crash, {status}", HANGS))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts, slowest, seed = Counter[str](), 0.0, arguments.seed
    end = arguments.seed + arguments.runs
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        presets = [Preset(folder) for folder in folders(root)]
        while seed < end:
            seeds = range(seed, min(seed + BATCH, end))
            for outcome, seconds in in_a_process(presets, root, seeds):
                if outcome.startswith("FAILED"):
                    print(f"seed {seed}: {outcome}", flush=True)
                    outcome = "FAILED"
                else:
                    slowest = max(slowest, seconds)
                counts[outcome] += 1
                seed += 1
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(
        f"{arguments.runs} runs: {dict(sorted(counts.items()))}; slowest {slowest * 1000:.0f} ms, "
        f"most memory of a process {memory} MiB"
    )
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
