"""Damage a small Flax checkpoint in many ways: each gives a CheckpointError, or a load, in 1 s.

python tests/checkpoints/formats/fuzz_msgpack.py --runs 30000
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from gemma_hub.checkpoints.formats import msgpack_file
from gemma_hub.checkpoints.formats.flax_msgpack import FlaxMsgpack
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, ConfigError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

LIMIT = 1.0  # seconds
# First bytes of every kind of value, and the ends of what a length can say.
CODES = bytes([0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0xE0, 0xFF, 0x00, 0x7F])
LENGTHS = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31, 2**32 - 1]
WORDS = [b"float32", b"bfloat16", b"float64", b"object", b"int8", b"V2", b"model", b"layers"]


def source() -> Opened:
    config = GemmaConfig(
        vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=2, dtype="float16",
    )  # fmt: skip
    draw = np.random.default_rng(3).normal
    shapes = parameter_shapes(config)
    arrays = {name: draw(size=shape).astype(np.float16) for name, shape in shapes.items()}
    return Opened(path=Path(), config=config, task="causal_lm", weights=ArrayWeights(arrays))


def damaged(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """`content` with one to four mutations; `other` is a file to splice in parts of."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(8):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([draw.choice(CODES)])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + draw.randrange(1, 40)]
            case 4:
                size = draw.choice([1, 2, 4])
                length = draw.choice(LENGTHS) % (1 << 8 * size)
                data[at : at + draw.choice([0, size])] = length.to_bytes(size, "big")
            case 5:
                start = draw.randrange(len(other))
                data[at:at] = other[start : start + draw.randrange(1, 200)]
            case 6:
                data[at : at + 7] = draw.choice(WORDS)
            case 7:
                bomb = draw.choice(
                    [b"\x81\xa1a", b"\x91", b"\xdf\xff\xff\xff\xff", b"\xc7\x00\x01"]
                )
                data[at:at] = bomb * draw.choice([1, 40, 5000])
    return bytes(data)


def damaged_index(content: bytes, draw: random.Random) -> bytes:
    index = json.loads(content)
    places = index["weight_map"]
    name = draw.choice(sorted(places))
    names = ["../x.msgpack", "/etc/passwd", "config.json", "", None, 7, [], *places.values()]
    match draw.randrange(4):
        case 0:
            places[name] = draw.choice(names)
        case 1:
            del places[name]
        case 2:
            places[draw.choice(["model/x", "", "/", name + "/x"])] = places.pop(name)
        case 3:
            return damaged(content, content, draw)
    return json.dumps(index).encode()


def folders(root: Path) -> list[Path]:
    """A single file, one in chunks, and shards."""
    made = []
    for name, chunk, size in (("one", 1 << 30, None), ("chunks", 20, None), ("shards", 30, 150)):
        folder = root / name
        folder.mkdir()
        msgpack_file.MAX_CHUNK_BYTES = chunk
        FlaxMsgpack().write(folder, source(), WriteOptions(max_shard_bytes=size))
        made.append(folder)
    return made


def check(folder: Path, expected: ArrayWeights) -> str:
    """Open and read all; what came of it."""
    try:
        opened = FlaxMsgpack().open(folder)
        for name in opened.weights.names():
            array = opened.weights.read(name)
            assert array.shape == expected.shape(name), name
    except (CheckpointError, ConfigError) as error:
        assert str(error)
        return "refused"
    return "loaded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, outcomes, slowest = random.Random(arguments.seed), Counter[str](), 0.0
    expected = source().weights
    with tempfile.TemporaryDirectory() as root:
        made = folders(Path(root))
        for _ in range(arguments.runs):
            folder = draw.choice(made)
            targets = [*sorted(folder.glob("*.msgpack")), *folder.glob("*.index.json")]
            target = draw.choice(targets)
            content, other = target.read_bytes(), draw.choice(targets).read_bytes()
            is_index = target.suffix == ".json"
            new = damaged_index(content, draw) if is_index else damaged(content, other, draw)
            # A new file each time: what is mapped must not be cut short under its reader.
            target.unlink()
            target.write_bytes(new)
            start = time.perf_counter()
            outcomes[check(folder, expected)] += 1
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            if seconds > LIMIT:
                print(f"{seconds:.1f} s for {new[:200]!r}")
                return 1
            target.unlink()
            target.write_bytes(content)
    print(f"{arguments.runs} runs: {dict(outcomes)}; slowest {slowest * 1000:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
