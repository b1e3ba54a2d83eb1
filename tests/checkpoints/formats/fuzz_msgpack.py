"""Damage small Flax checkpoints: each is refused, or loads with the weights that it had.

A CheckpointError or a ConfigError within 1 s, or a load. Damaged are the headers in the weights'
files, never the arrays' own bytes, and the index.

python tests/checkpoints/formats/fuzz_msgpack.py --runs 30000
"""

import itertools
import json
import random
from pathlib import Path

import numpy as np
from mutations import damaged, main, replace

from gemma_hub.checkpoints.formats import msgpack_file
from gemma_hub.checkpoints.formats.flax_msgpack import FlaxMsgpack
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.checkpoints.formats.msgpack_file import MsgpackFile
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, ConfigError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

# First bytes of every kind of value, and words.
CODES = [0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0xE0, 0xFF, 0x00, 0x7F]
WORDS = [
    *(bytes([code]) for code in CODES), b"\xa7float32", b"\xa8bfloat16", b"\xa7float64",
    b"\xa6object", b"\xa4int8", b"\xa2V2", b"\xa5model", b"\xa6layers", b"\xa10", b"\xa11",
    b"\xb9__msgpack_chunked_array__", b"\xa5shape", b"\xa6chunks", b"\xa6k_proj", b"\xa6v_proj",
]  # fmt: skip
BOMBS = (
    b"\x81\xa1a",
    b"\x91",
    b"\xdf\xff\xff\xff\xff",
    b"\xc7\x00\x01",
    b"\xc9\xff\xff\xff\xff\x01",
)


def source() -> Opened:
    """A model in which no two arrays are alike."""
    config = GemmaConfig(
        vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=2, dtype="float16",
    )  # fmt: skip
    draw = np.random.default_rng(3).normal
    shapes = parameter_shapes(config)
    arrays = {name: draw(size=shape).astype(np.float16) for name, shape in shapes.items()}
    return Opened(path=Path(), config=config, task="causal_lm", weights=ArrayWeights(arrays))


def headers(path: Path) -> list[range]:
    """Where a file of weights has no bytes of an array."""
    arrays = MsgpackFile(path).tensors.values()
    pieces = sorted(piece for array in arrays for piece in array.pieces)
    ends = [0, *(start + size for start, size in pieces)]
    starts = [*(start for start, _ in pieces), path.stat().st_size]
    return [range(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def damaged_index(content: bytes, draw: random.Random) -> bytes:
    index = json.loads(content)
    places = index["weight_map"]
    name = draw.choice(sorted(places))
    files = ["../x.msgpack", "/etc/passwd", "config.json", "", None, 7, [], *places.values()]
    match draw.randrange(4):
        case 0:
            places[name] = draw.choice(files)
        case 1:
            del places[name]
        case 2:
            places[draw.choice(["model/x", "", "/", name + "/x"])] = places.pop(name)
        case 3:
            return damaged(content, draw, [range(len(content))], order="big", bombs=(b"[", b"{"))
    return json.dumps(index).encode()


class MsgpackFuzzer:
    """Three folders: a single file, one in chunks, and shards."""

    def __init__(self, root: Path) -> None:
        opened = source()
        self._expected = opened.weights
        self._folders: list[Path] = []
        for name, chunk, size in (("one", 2**30, None), ("chunks", 20, None), ("shards", 30, 150)):
            folder = root / name
            folder.mkdir()
            msgpack_file.MAX_CHUNK_BYTES = chunk
            FlaxMsgpack().write(folder, opened, WriteOptions(max_shard_bytes=size))
            self._folders.append(folder)
        assert len(list(self._folders[2].glob("*.msgpack"))) > 2
        files = itertools.chain(*(folder.glob("*.msgpack") for folder in self._folders))
        self._headers = {path: headers(path) for path in files}
        self._undo: tuple[Path, bytes] | None = None

    def damage(self, draw: random.Random) -> str:
        if self._undo:
            replace(*self._undo)
        self._folder = draw.choice(self._folders)
        targets = [*self._folder.glob("*.msgpack"), *self._folder.glob("*.index.json")]
        target = draw.choice(sorted(targets))
        content = target.read_bytes()
        self._undo = target, content
        if target.suffix == ".json":
            replace(target, damaged_index(content, draw))
            return "index"
        parts = self._headers[target]
        new = damaged(content, draw, parts, order="big", words=WORDS, bombs=BOMBS)
        replace(target, new)
        return f"header ({self._folder.name})"

    def check(self) -> str:
        try:
            opened = FlaxMsgpack().open(self._folder)
        except (CheckpointError, ConfigError) as error:
            assert len(str(error)) < 20_000
            return "refused"
        for name in self._expected.names():
            array, expected = opened.weights.read(name), self._expected.read(name)
            assert array.shape == expected.shape, name
            assert array.tobytes() == expected.tobytes(), name
        return "loaded"


if __name__ == "__main__":
    main(MsgpackFuzzer, __doc__)
