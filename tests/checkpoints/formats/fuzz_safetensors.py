"""Damage headers, indexes and links of a small checkpoint: each is refused, or loads as it was.

A CheckpointError or a ConfigError within 1 s, or a load with the values of the undamaged folder.

python tests/checkpoints/formats/fuzz_safetensors.py --runs 30000
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from gemma_hub.checkpoints import describe_checkpoint, save_checkpoint
from gemma_hub.checkpoints.formats.huggingface import HuggingFace
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, ConfigError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

LIMIT = 1.0  # seconds
INDEX = "model.safetensors.index.json"
HUGE = [-(2**63), -1, 0, 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
ODD = [None, True, 1.5, 1e400, "", "7", [], {}, [[]], "\ud800"]
WORDS = "F32 F16 BF16 F64 F8_E4M3 F4 I8 I64 BOOL C64 f16 V2 object".split() + ["", None, 7]
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
        def rewritten(content: bytes) -> bytes:
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            change(header, draw)
            text = json.dumps(header).encode()
            return len(text).to_bytes(8, "little") + text + content[8 + length :]

        rewrite(draw.choice(sorted(folder.glob("model*.safetensors"))), rewritten)

    return apply


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


def raw_header(folder: Path, draw: random.Random) -> None:
    """The bytes before the tensors: the length, keys given twice, nesting, anything."""

    def rewritten(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        head, tail = content[8 : 8 + length], content[8 + length :]
        match draw.randrange(7):
            case 0:
                wrong = [*HUGE, length - 1, length + 1, len(content), 100_000_001]
                length = draw.choice(wrong) % 2**64
                return length.to_bytes(8, "little") + head + tail
            case 1:  # the first key again, with the entry of the last
                start = head.index(b'"model')
                key = head[start : head.index(b'"', start + 1)]
                last = head[head.rindex(b'"model') :].split(b":", 1)[1].rstrip()
                head = head.rstrip()[:-1] + b"," + key + b'":' + last
            case 2:
                head = draw.choice([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 50_000, b"", b"null"])
            case 3:
                at = draw.randrange(len(content))
                return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :][: at * 9]
            case 4:
                at = draw.randrange(len(head))
                head = head[:at] + bytes([draw.randrange(256)]) + head[at + 1 :]
            case 5:
                return content[: draw.randrange(len(content))]
            case 6:
                return content + b"\0" * draw.choice([1, 8, 4096])
        return len(head).to_bytes(8, "little") + head + tail

    rewrite(draw.choice(sorted(folder.glob("model*.safetensors"))), rewritten)


# -- the index, and files --------------------------------------------------------------------------


def index(folder: Path, draw: random.Random) -> None:
    path = folder / INDEX
    content = json.loads(path.read_text()) if path.is_file() else {"weight_map": {"x": "x"}}
    places = content["weight_map"]
    name = draw.choice(sorted(places))
    match draw.randrange(7):
        case 0 | 1:
            places[name] = draw.choice([*FILES, *places.values(), *ODD, *HUGE])
        case 2:
            del places[name]
        case 3:
            places[draw.choice(["x", "", name + "x", "lm_head.weight"])] = places[name]
        case 4:
            content["weight_map"] = draw.choice([*ODD, list(places), {}])
        case 5:
            file = draw.choice(FILES)
            content["weight_map"] = dict.fromkeys(places, file)
        case 6:
            text = draw.choice(["", "[" * 100_000, "9" * 50_000, '{"weight_map":' * 9999, "\ud800"])
            rewrite(path, lambda _: text.encode("utf-8", "surrogatepass"))
            return
    rewrite(path, lambda _: json.dumps(content).encode())


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


CHANGES: list[Change] = [
    *map(with_header, (dtype_word, shape, offsets, names, more, odd_entry)),
    raw_header, index, files, links,
]  # fmt: skip


# -- running ---------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    # A new file each time: what is mapped must not be cut short under its reader.
    content = change(path.read_bytes() if path.is_file() else b"")
    path.unlink(missing_ok=True)
    path.write_bytes(content)


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
    for name, size in (("one", 10**9), ("shards", 350)):
        save_checkpoint(root / name, config, weights, max_shard_bytes=size)
    assert len(list((root / "shards").glob("*.safetensors"))) == 3
    for folder in (root / "one", root / "shards"):
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
        (folder / "folder.safetensors").mkdir()
        (folder / "outside.safetensors").symlink_to(root / "one" / "model.safetensors")
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


def check(folder: Path, expected: ArrayWeights) -> str:
    """Open and read all; what came of it."""
    problems = describe_checkpoint(folder).problems
    try:
        opened = HuggingFace().open(folder)
    except (CheckpointError, ConfigError) as error:
        assert str(error)
        assert problems
        return "refused"
    assert not problems
    stored = {}
    for path in {*folder.glob("model*.safetensors"), folder / "outside.safetensors"}:
        stored |= load_file(path) if path.is_file() else {}
    for name in expected.names():
        array = opened.weights.read(name)
        assert array.shape == expected.shape(name), name
        assert array.tobytes() == expected.read(name).tobytes(), name
        assert array.dtype == stored[name].dtype, name
    return "loaded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, outcomes, slowest = random.Random(arguments.seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        folders, expected = source(root)
        for run in range(arguments.runs):
            folder = copied(draw.choice(folders), root / "run" / "checkpoint")
            change = draw.choice(CHANGES)
            change(folder, draw)
            start = time.perf_counter()
            try:
                outcome = check(folder, expected)
            except BaseException:
                print(f"run {run} of seed {arguments.seed}: {change}", file=sys.stderr)
                raise
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            if seconds > LIMIT:
                print(f"run {run} of seed {arguments.seed} took {seconds:.1f} s: {change}")
                return 1
            assert change is not links or outcome == "loaded"
            outcomes[outcome] += 1
    print(f"{arguments.runs} runs: {dict(outcomes)}; slowest {slowest * 1000:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
