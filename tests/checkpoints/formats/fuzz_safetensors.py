"""Damage headers, indexes and links of a small checkpoint: each is refused, or loads as it was.

A CheckpointError or a ConfigError within 1 s, or a load with the values of the undamaged folder.

python tests/checkpoints/formats/fuzz_safetensors.py --runs 30000
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mutations import damaged, main, replace
from safetensors import safe_open

from gemma_hub.checkpoints import describe_checkpoint, save_checkpoint
from gemma_hub.checkpoints.formats.huggingface import HuggingFace
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, ConfigError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

INDEX, OUTSIDE = "model.safetensors.index.json", "outside.safetensors"
HUGE = [-(2**63), -1, 0, 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
ODD = [None, True, 1.5, 1e400, "", "7", [], {}, [[]], "\ud800"]
TYPES = {"F16": "float16", "BF16": "bfloat16"}
WORDS = [*"F32 F16 BF16 F64 F8_E4M3 F4 I8 I64 BOOL C64 f16 V2 object".split(), "", None, 7]
FILES = """
    ../model.safetensors /etc/passwd ../config.json config.json . .. model.safetensors x.safetensors
    ./model-00001-of-00003.safetensors folder.safetensors loop.safetensors pipe.safetensors
    outside.safetensors tokenizer.model MODEL-00001-OF-00003.SAFETENSORS
""".split()
Change = Callable[[Path, random.Random], None]


# -- headers ---------------------------------------------------------------------------------------


def with_header(change: Callable[[dict[str, Any], random.Random], None]) -> Change:
    """A change of the parsed header of one file."""

    def apply(folder: Path, draw: random.Random) -> None:
        path = some_file(folder, draw)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header, draw)
        text = json.dumps(header).encode()
        replace(path, len(text).to_bytes(8, "little") + text + content[8 + length :])

    return apply


def some_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.glob("model*.safetensors")))


def entry(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = header[draw.choice(sorted(set(header) - {"__metadata__"}))]
    return found


def dtype_word(header: dict[str, Any], draw: random.Random) -> None:
    entry(header, draw)["dtype"] = draw.choice(WORDS)


def shape(header: dict[str, Any], draw: random.Random) -> None:
    sizes = entry(header, draw)["shape"]
    match draw.randrange(5):
        case 0:
            sizes[draw.randrange(len(sizes))] = draw.choice(HUGE + ODD)
        case 1:
            sizes.reverse()
        case 2:
            sizes[:] = draw.choices(HUGE, k=draw.randrange(5))
        case 3:
            sizes.insert(draw.randrange(len(sizes) + 1), draw.choice([1, *HUGE]))
        case 4:
            sizes[:] = [1] * 100_000


def offsets(header: dict[str, Any], draw: random.Random) -> None:
    place = entry(header, draw)["data_offsets"]
    match draw.randrange(5):
        case 0:
            place[draw.randrange(2)] += draw.choice([-64, -2, -1, 1, 2, 64])
        case 1:
            place[draw.randrange(2)] = draw.choice(HUGE + ODD)
        case 2:
            place.reverse()
        case 3:
            place[:] = entry(header, draw)["data_offsets"]  # an overlap, and a gap
        case 4:
            shift = draw.choice([-8, 8, 2**32, 2**63])
            place[:] = [number + shift for number in place]


def names(header: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(sorted(header))
    new = draw.choice(["", "x", "x" * 100_000, "\x00", "lm_head.weight", f"model.{name}", "é"])
    header[new] = header.pop(name)


def more(header: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(["x", "lm_head.weight", "score.weight", "a.rotary_emb.inv_freq"])
    size = draw.choice([0, 0, 2**63, 7])
    at = draw.choice([0, 2, 2**40])
    header[name] = {"dtype": draw.choice(WORDS), "shape": [size], "data_offsets": [at, at]}


def odd_entry(header: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(sorted(header))
    if draw.random() < 0.5 or not isinstance(header[name], dict):
        header[name] = draw.choice(HUGE + ODD)
    else:
        key = draw.choice([*header[name], "more"])
        header[name][key] = draw.choice(HUGE + ODD)


def header_bytes(folder: Path, draw: random.Random) -> None:
    """The length and the header's text, byte by byte."""
    path = some_file(folder, draw)
    content = path.read_bytes()
    structure = [range(8 + int.from_bytes(content[:8], "little"))]
    words = [b'"F16"', b'"BF16"', b'"F32"', b'"shape"', b"null", b"1e9", b"-1", b"]", b"}", b'"']
    bombs = (b"[", b'{"a":', b"9", b'"')
    replace(path, damaged(content, draw, structure, order="little", words=words, bombs=bombs))


def header_text(folder: Path, draw: random.Random) -> None:
    """A wrong length, a key given twice, nesting, more data than the header says."""
    path = some_file(folder, draw)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head, tail = content[8 : 8 + length], content[8 + length :]
    match draw.randrange(5):
        case 0:
            wrong = [*HUGE, length - 1, length + 1, len(content), 100_000_001]
            replace(path, (draw.choice(wrong) % 2**64).to_bytes(8, "little") + head + tail)
            return
        case 1:  # the first key again, with the entry of the last
            start = head.index(b'"model')
            key = head[start : head.index(b'"', start + 1)]
            last = head[head.rindex(b'"model') :].split(b":", 1)[1].rstrip()
            head = head.rstrip()[:-1] + b"," + key + b'":' + last
        case 2:
            head = draw.choice([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 50_000, b"", b"null"])
        case 3:
            replace(path, content[: draw.randrange(len(content))])
            return
        case 4:
            tail += b"\0" * draw.choice([1, 8, 4096])
    replace(path, len(head).to_bytes(8, "little") + head + tail)


# -- the index, and files --------------------------------------------------------------------------


def index(folder: Path, draw: random.Random) -> None:
    path = folder / INDEX
    content = json.loads(path.read_text()) if path.is_file() else {"weight_map": {"x": "x"}}
    places = content["weight_map"]
    name, other = draw.choice(sorted(places)), draw.choice(sorted(places))
    match draw.randrange(9):
        case 0 | 1:
            places[name] = draw.choice([*FILES, *places.values(), *ODD, *HUGE])
        case 2:
            del places[name]
        case 3:
            places[draw.choice(["x", "", name + "x", "lm_head.weight"])] = places[name]
        case 4:
            content["weight_map"] = draw.choice([*ODD, list(places), {}])
        case 5:
            content["weight_map"] = dict.fromkeys(places, draw.choice(FILES))
        case 6:
            text = draw.choice(["", "[" * 100_000, "9" * 50_000, '{"weight_map":' * 9999, "\ud800"])
            replace(path, text.encode("utf-8", "surrogatepass"))
            return
        case 7:
            places[name], places[other] = places[other], places[name]
        case 8:
            places[name] = draw.choice("mé\u0001\ud800🙂") * draw.choice([1, 300, 9999])
            places[name] += ".safetensors"
    replace(path, json.dumps(content).encode())


def index_bytes(folder: Path, draw: random.Random) -> None:
    path = folder / INDEX
    content = path.read_bytes() if path.is_file() else b'{"weight_map": {"x": "x.safetensors"}}'
    words = [b'"model', b".safetensors", b"00002", b"/", b"..", b"null", b"}", b'"', b"\\u0000"]
    structure = [range(len(content))]
    replace(path, damaged(content, draw, structure, order="big", words=words, bombs=(b"[", b"{")))


def files(folder: Path, draw: random.Random) -> None:
    """One weights' file, or the index, becomes something else than a file."""
    path = draw.choice(sorted(folder.glob("model*")))
    content = path.read_bytes()
    path.unlink()
    match draw.randrange(5):
        case 0:
            path.symlink_to(path.name)
        case 1:
            path.symlink_to("nowhere")
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.write_bytes(b"" if draw.random() < 0.5 else content[: len(content) // 2])


def links(folder: Path, draw: random.Random) -> None:
    """As a hub cache has them: links to files elsewhere, which must load."""
    blobs = folder.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    for path in sorted(folder.glob("*")):
        if path.is_file() and not path.is_symlink():
            blob = blobs / f"{draw.randrange(10**9):x}"
            path.rename(blob)
            path.symlink_to(blob if draw.random() < 0.5 else os.path.relpath(blob, folder))


CHANGES: dict[str, Change] = {
    "header: type": with_header(dtype_word),
    "header: shape": with_header(shape),
    "header: offsets": with_header(offsets),
    "header: names": with_header(names),
    "header: one more": with_header(more),
    "header: odd entry": with_header(odd_entry),
    "header: bytes": header_bytes,
    "header: text": header_text,
    "index: entries": index,
    "index: bytes": index_bytes,
    "files": files,
    "links": links,
}


# -- running ---------------------------------------------------------------------------------------


def source(root: Path) -> tuple[list[Path], ArrayWeights]:
    """A folder with one file, one with three, and their weights; no two tensors are alike."""
    config = GemmaConfig(
        vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=2, dtype="float16",
    )  # fmt: skip
    draw = np.random.default_rng(3).normal
    shapes = parameter_shapes(config)
    arrays = {name: draw(size=shape).astype(np.float16) for name, shape in shapes.items()}
    weights = ArrayWeights(arrays)
    for name, size in (("one", 10**9), ("shards", 230)):
        save_checkpoint(root / name, config, weights, max_shard_bytes=size)
    assert len(list((root / "shards").glob("*.safetensors"))) == 3
    for folder in (root / "one", root / "shards"):
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
        (folder / "folder.safetensors").mkdir()
        (folder / OUTSIDE).symlink_to(root / "one" / "model.safetensors")
        os.mkfifo(folder / "pipe.safetensors")
    return [root / "one", root / "shards"], weights


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to.parent, ignore_errors=True)
    to.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_symlink() or (path.is_file() and path.suffix):
            shutil.copy2(path, to / path.name, follow_symlinks=False)
        elif path.is_dir():
            (to / path.name).mkdir()
        else:
            os.mkfifo(to / path.name)
    return to


class SafetensorsFuzzer:
    """A folder with one file, and one with three shards and an index."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders, self._expected = source(root)

    def damage(self, draw: random.Random) -> str:
        self._folder = copied(draw.choice(self._folders), self._root / "run" / "checkpoint")
        # Byte by byte there is more to find than by any other way.
        names = draw.choices(list(CHANGES), [4 if "bytes" in name else 1 for name in CHANGES])
        CHANGES[names[0]](self._folder, draw)
        self._must_load = names[0] == "links"
        return names[0]

    def check(self) -> str:
        problems = describe_checkpoint(self._folder).problems
        try:
            opened = HuggingFace().open(self._folder)
        except (CheckpointError, ConfigError) as error:
            assert str(error)
            assert problems
            assert not self._must_load
            return "refused"
        assert not problems
        files = {"model.safetensors"}
        if (self._folder / INDEX).is_file():
            files = set(json.loads((self._folder / INDEX).read_text())["weight_map"].values())
        stored: dict[str, str] = {}
        for name in files:
            with safe_open(self._folder / name, framework="np") as file:
                stored |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        for name in self._expected.names():
            array, expected = opened.weights.read(name), self._expected.read(name)
            assert array.shape == expected.shape, name
            assert array.tobytes() == expected.tobytes(), name
            # The embedding may go by the name of the head that it is tied to.
            assert array.dtype.name == TYPES[stored.get(name) or stored["lm_head.weight"]], name
        return "loaded"


if __name__ == "__main__":
    main(SafetensorsFuzzer, __doc__, runs=2000)
