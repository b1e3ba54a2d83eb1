"""Damage small checkpoints of torch.save: each is refused, or loads with the weights that it had.

A CheckpointError or a ConfigError within 1 s, or a load. Damaged are the headers and the directory
of the archives, never the storages; the pickles in them, whose checksum is made to fit; and the
index. A damaged pickle may name another storage of the same size, so only shapes are sure then.

python tests/checkpoints/formats/fuzz_torch.py --runs 30000
"""

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
from mutations import damaged, main, replace

from gemma_hub.checkpoints.formats.gemma_pytorch import GemmaPytorch
from gemma_hub.checkpoints.formats.interface import CheckpointFormat, Opened, WriteOptions
from gemma_hub.checkpoints.formats.pytorch_bin import PytorchBin
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, ConfigError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

HEADERS = [
    b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08",
    b"\x08\0", b"\xff\xff\xff\xff", b"archive/data/0", b"archive/data/1", b"data.pkl", b"big",
]  # fmt: skip
# Every instruction of pickle that is read, some that are not, and what torch.save makes of them.
INSTRUCTIONS = [
    *(bytes([code]) for code in b"NKMJGX)]}(taesuqrhjcRQb.\x80\x85\x86\x87\x88\x89\x8aio0\x81\x93"),
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nCharStorage\n", b"ctorch\nHalfStorage\n",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_parameter\n", b"X\7\0\0\0storage",
    b"X\1\0\0\x000", b"X\1\0\0\x001", b"X\3\0\0\0cpu", b"q\0h\0", b"K\2K\4", b"\x8a\1\xff",
]  # fmt: skip
BOMBS = [b"(", b"]", b"}", b"N", b")", b"h\0", b"](", b"q\0h\0\x86", b"\x85", b"X\xff\xff\xff\x7f"]


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


def outside_storages(content: bytes) -> list[range]:
    """Where a file has no bytes of a tensor."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [info for info in archive.infolist() if "/data/" in info.filename]
        starts = []
        for info in records:
            name, extra = (content[info.header_offset + at] for at in (26, 28))
            starts.append(info.header_offset + 30 + name + extra)
    pieces = sorted(zip(starts, (info.file_size for info in records), strict=True))
    ends = [0, *(start + size for start, size in pieces)]
    return [
        range(*part) for part in zip(ends, [*(s for s, _ in pieces), len(content)], strict=True)
    ]


def with_damaged_pickle(content: bytes, draw: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                whole = [range(len(data))]
                data = damaged(
                    data, draw, whole, order="little", words=INSTRUCTIONS, bombs=BOMBS
                )  # fmt: skip
            new.writestr(info.filename, data)
    return buffer.getvalue()


def damaged_index(content: bytes, draw: random.Random) -> bytes:
    index = json.loads(content)
    places = index["weight_map"]
    name = draw.choice(sorted(places))
    files = ["../x.bin", "/etc/passwd", "config.json", "", None, 7, [], "loop.bin", "x\0.bin"]
    match draw.randrange(4):
        case 0:
            places[name] = draw.choice([*files, *places.values()])
        case 1:
            del places[name]
        case 2:
            places[draw.choice(["model.x", "", "/", name + "/x"])] = places.pop(name)
        case 3:
            return damaged(content, draw, [range(len(content))], order="big", bombs=(b"[", b"{"))
    return json.dumps(index).encode()


class TorchFuzzer:
    """Both formats, each in one file and in shards."""

    def __init__(self, root: Path) -> None:
        opened = source()
        self._expected = opened.weights
        self._folders: list[tuple[Path, CheckpointFormat]] = []
        for form in (PytorchBin(), GemmaPytorch()):
            for size in (None, 200):
                folder = root / f"{form.name}-{size}"
                folder.mkdir()
                form.write(folder, opened, WriteOptions(max_shard_bytes=size))
                (folder / "loop.bin").symlink_to("loop.bin")
                self._folders.append((folder, form))
            assert len(list(folder.glob("pytorch_model-*.bin"))) > 2
        self._undo: tuple[Path, bytes] | None = None
        self._is_sure = True

    def damage(self, draw: random.Random) -> str:
        if self._undo:
            replace(*self._undo)
        self._folder, self._form = draw.choice(self._folders)
        found = (*self._folder.glob("*.ckpt"), *self._folder.glob("pytorch_model*"))
        target = draw.choice(sorted(found))
        content = target.read_bytes()
        self._undo = target, content
        self._is_sure = target.suffix == ".json" or draw.random() < 0.5
        if target.suffix == ".json":
            replace(target, damaged_index(content, draw))
            return "index"
        if not self._is_sure:
            replace(target, with_damaged_pickle(content, draw))
            return "pickle"
        parts = outside_storages(content)
        replace(target, damaged(content, draw, parts, order="little", words=HEADERS))
        return "archive"

    def check(self) -> str:
        opened, reason = self._opened()
        if opened is None:
            assert 0 < len(reason) < 20_000
            return "refused"
        is_same = True
        for name in self._expected.names():
            array, expected = opened.weights.read(name), self._expected.read(name)
            assert array.shape == expected.shape, name
            is_same &= array.tobytes() == expected.tobytes()
        assert is_same or not self._is_sure
        return "loaded" if is_same else "loaded, another model"

    def _opened(self) -> tuple[Opened | None, str]:
        try:
            return self._form.open(self._folder), ""
        except (CheckpointError, ConfigError) as error:
            return None, str(error)


if __name__ == "__main__":
    main(TorchFuzzer, __doc__)
