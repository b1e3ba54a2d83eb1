"""Damage small Orbax checkpoints in many ways: each gives a CheckpointError or a load, in 1 s.

python tests/checkpoints/formats/fuzz_orbax.py --runs 20000

A load must have the very values, unless what was damaged was the values themselves (neither a file
of plain values nor zstd without its checksum can tell) or a database was forged, with a checksum
that fits, to say that a value is where another is. The reader of OCDBT and zstd is C++, so the
work is done in processes of their own, with little memory: one that dies is a failure. The seconds
are those of the processor, so that others on the machine do not count.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tensorstore

from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.checkpoints.formats.orbax import Orbax
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, ConfigError
from gemma_hub.parameters import ArrayWeights, parameter_shapes

LIMIT = 1.0  # seconds
MEMORY = 3 << 30  # bytes of address space of a process, most of it tensorstore's own
BATCH = 250
MAGICS = (bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de"), bytes.fromhex("0cdb1234"))
NUMBERS = [-1, 0, 1, 2, 3, 4, 7, 2**31, 2**40, 2**63, 2**64 - 1, 1e300, 2.0, True]
WORDS = [
    "", ".", "..", "../x", "/etc/passwd", "a/b", "zstd", "gzip", "blosc", "C", "F", "<f4", "<f2",
    "<f8", "bfloat16", "|O", "float32", "float16", "bytes", "crc32c", "sharding_indexed",
    "http://localhost:1/", "file:///etc/", "default", "v2", "big", "little", "x" * 70_000,
]  # fmt: skip
VALUES = [*NUMBERS, *WORDS, None, [], {}, [1], [0], [4, 4], [2**40, 2**40], {"driver": "http"}]


# -- the checkpoints -------------------------------------------------------------------------------

DATABASE = {"max_inline_value_bytes": 1}
# What Orbax makes of its settings, and what it made once.
KINDS = {
    "files, zarr 2": {},
    "files, zarr 2, chunks": {"rows": 2},
    "files, zarr 2, gzip": {"compression": "gzip"},
    "files, zarr 2, raw chunks": {"compression": None, "rows": 1},
    "files, zarr 3": {"version": 3},
    "files, zarr 3, shards": {"version": 3, "rows": 2, "shard_rows": 1},
    "files, zarr 3, raw": {"version": 3, "compression": None},
    "database, zarr 2": {"database": {"max_inline_value_bytes": 1024}},
    "database, zarr 2, chunks": {"database": DATABASE, "rows": 2},
    "database, zarr 2, raw": {"database": DATABASE, "compression": None},
    "database, zarr 3": {"database": DATABASE, "version": 3},
}


def source() -> Opened:
    config = GemmaConfig(
        vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=2, dtype="float32",
    )  # fmt: skip
    draw = np.random.default_rng(3).normal
    shapes = parameter_shapes(config)
    arrays = {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Opened(path=Path(), config=config, task="causal_lm", weights=ArrayWeights(arrays))


def written_by_tensorstore(
    folder: Path,
    opened: Opened,
    layout: str = "nested",
    *,
    version: int = 2,
    database: dict[str, object] | None = None,
    compression: str | None = "zstd",
    rows: int | None = None,
    shard_rows: int | None = None,
) -> Path:
    """A checkpoint as Orbax writes it, of what `Orbax` has for `opened`.

    Args:
        folder: which it makes.
        opened: the model.
        layout: of the tree.
        version: of zarr.
        database: settings of an OCDBT database to put all in; None for folders of files.
        compression: of the chunks.
        rows: of a chunk, on the first axis; None for all.
        shard_rows: of a chunk within a shard, in version 3.
    """
    form, options = Orbax(), WriteOptions(layout=layout)
    folder.mkdir()
    form.write(folder, opened, options)
    tree = json.loads((folder / "_METADATA").read_text())
    tree |= {"use_ocdbt": database is not None, "use_zarr3": version == 3}
    (folder / "_METADATA").write_text(json.dumps(tree))
    base = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": base, "config": database} if database else base
    context = tensorstore.Context()
    # One version of the database, so that no file of it is of one that is past.
    transaction = tensorstore.Transaction(atomic=True) if database else None
    weights = form.tensors(opened, options)
    for name in weights.names():
        array = weights.read(name)
        path = name.replace("/", ".") if layout == "nested" else ".".join(name.rsplit("/", 1))
        shutil.rmtree(folder / path)
        chunks = [min(rows or array.shape[0], array.shape[0]), *array.shape[1:]]
        inner = [shard_rows or chunks[0], *chunks[1:]]
        spec = {
            "driver": "zarr" if version == 2 else "zarr3",
            "kvstore": {**kvstore, "path": f"{path}/" if database else f"{folder}/{path}/"},
            "metadata": (_zarr_2 if version == 2 else _zarr_3)(array, chunks, inner, compression),
            "store_data_equal_to_fill_value": True,
        }
        opening = tensorstore.open(spec, create=True, context=context, transaction=transaction)
        opening.result().write(array).result()
    if transaction:
        transaction.commit_sync()
    return folder


def _zarr_2(array, chunks, inner, compression):
    compressor = {"id": compression, "level": 1} if compression else None
    dtype = {"float32": "<f4", "float16": "<f2"}.get(array.dtype.name, "bfloat16")
    return {"shape": [*array.shape], "chunks": chunks, "compressor": compressor, "dtype": dtype}


def _zarr_3(array, chunks, inner, compression):
    codecs: list[dict[str, object]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if compression:
        codecs.append({"name": compression, "configuration": {"level": 3}})
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    shard = {"chunk_shape": inner, "codecs": codecs, "index_codecs": index}
    return {"shape": [*array.shape], "data_type": array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "codecs": [{"name": "sharding_indexed", "configuration": shard}]}  # fmt: skip


def checkpoints(root: Path) -> list[Path]:
    """One of each kind: ours, files and databases, zarr 2 and 3, whole and in chunks."""
    opened = source()
    for layout in Orbax.layouts:
        (root / layout).mkdir()
        Orbax().write(root / layout, opened, WriteOptions(layout=layout))
    plain, packed = (
        {"compression": None, "max_inline_value_bytes": 100},
        {"max_inline_value_bytes": 1},
    )
    kinds = {
        "files-2": {},
        "files-2-gzip-chunks": {"compression": "gzip", "rows": 1, "layout": "flat"},
        "files-3": {"version": 3, "rows": 2, "shard_rows": 1},
        "database-2": {"database": plain},
        "database-2-raw": {"database": plain, "compression": None, "layout": "stacked"},
        "database-2-zstd": {"database": packed, "rows": 2},
        "database-3": {"database": plain, "version": 3, "layout": "flat"},
    }  # fmt: skip
    for name, settings in kinds.items():
        written_by_tensorstore(root / name, opened, **settings)
    return sorted(root.iterdir())


# -- the damage ------------------------------------------------------------------------------------


def damaged(content: bytes, draw: random.Random) -> bytes:
    """`content` with one to four mutations of its bytes."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(7):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([draw.choice([0, 1, 127, 128, 255])])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + draw.randrange(1, 40)]
            case 4:
                data[at:at] = bytes([draw.randrange(256)]) * draw.choice([1, 2, 40, 5000])
            case 5:
                data[at : at + 8] = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(
                    8, "little"
                )
            case 6:
                start = draw.randrange(len(content) + 1)
                data[at:at] = content[start : start + draw.randrange(1, 100)]
    return bytes(data)


def damaged_json(content: bytes, draw: random.Random) -> bytes:
    """JSON with one value changed, added or taken away; or mutated bytes."""
    if draw.random() < 0.25:
        return damaged(content, draw)
    tree = json.loads(content)
    node, parents = tree, []
    while isinstance(node, (dict, list)) and node and draw.random() < 0.9:
        key = draw.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
        parents.append((node, key))
        node = node[key]
    if not parents:
        return json.dumps(draw.choice(VALUES)).encode()
    parent, key = parents[-1]
    match draw.randrange(6):
        case 0 | 1 | 2:
            parent[key] = draw.choice(VALUES)
        case 3:
            del parent[key]
        case 4 if isinstance(node, (int, float)):
            parent[key] = node + draw.choice([-2, -1, 1, 2, 24])
        case 4:
            parent[key] = [node, node]
        case 5:
            deep = draw.choice([1, 50, 100_000])
            return content.replace(b":", b":" + b"[" * deep, 1)
    return json.dumps(tree).encode()


def damaged_node(content: bytes, draw: random.Random) -> bytes:
    """A file of a database with the manifest, or the first node of its tree, damaged."""
    start, length = node_in(content)
    end = start + length
    return content[:start] + damaged(content[start:end], draw) + content[end:]


def forged_node(content: bytes, draw: random.Random) -> bytes:
    """The same, of the length that others have it as and with its checksum, so that it is read."""
    start, length = node_in(content)
    node = content[start : start + length]
    new = (damaged(node, draw) + node)[:length]
    new = node[:12] + new[12:-4]
    return content[:start] + new + crc32c(new).to_bytes(4, "little") + content[start + length :]


def node_in(content: bytes) -> tuple[int, int]:
    """Where the manifest or the first node starts, and its length."""
    start = min(at for magic in MAGICS if (at := content.find(magic)) >= 0)
    return start, int.from_bytes(content[start + 4 : start + 12], "little")


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = TABLE[(value ^ byte) & 255] ^ value >> 8
    return value ^ 0xFFFFFFFF


def table_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


TABLE = [table_entry(value) for value in range(256)]


def damage(folder: Path, draw: random.Random) -> tuple[str, Path, bytes | None]:
    """What to do to one file of a folder: (kind, file, its new content or None to remove it)."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "config" not in p.name)
    by_kind: dict[str, list[Path]] = {}
    for path in files:
        for kind in kinds_of(path):
            by_kind.setdefault(kind, []).append(path)
    kind = draw.choice(sorted(by_kind))
    path = draw.choice(by_kind[kind])
    content = path.read_bytes()
    if draw.random() < 0.03:
        return f"no {kind}", path, None
    return kind, path, CHANGES[kind](content, draw)


def kinds_of(path: Path) -> list[str]:
    if path.name in {".zarray", "zarr.json", "_METADATA"}:
        return ["json"]
    has_node = any(magic in path.read_bytes() for magic in MAGICS)
    return ["tree", "forged tree"] * has_node + ["values"] * (path.name != "manifest.ocdbt")


CHANGES = {
    "json": damaged_json, "tree": damaged_node, "forged tree": forged_node, "values": damaged,
}  # fmt: skip


# -- the runs --------------------------------------------------------------------------------------


def outcome(folder: Path, expected: ArrayWeights) -> str:
    """Open and read all; what came of it."""
    try:
        opened = Orbax().open(folder)
        is_same = True
        for name in expected.names():
            array = opened.weights.read(name)
            assert array.shape == expected.shape(name), name
            is_same = is_same and array.tobytes() == expected.read(name).tobytes()
    except (CheckpointError, ConfigError) as error:
        assert str(error)
        return "refused"
    return "same" if is_same else "differs"


def processor_seconds() -> float:
    """Of this process and those that it started and that ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def batch(root: Path, seed: int, start: int, count: int) -> tuple[Counter[str], float, list[str]]:
    """Some runs in a process of its own: outcomes, the slowest's seconds, and what went wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    outcomes, slowest, faults = Counter[str](), 0.0, list[str]()
    expected = source().weights
    assert isinstance(expected, ArrayWeights)
    with tempfile.TemporaryDirectory() as own:
        shutil.copytree(root, own, dirs_exist_ok=True)
        made = sorted(Path(own).iterdir())
        for run in range(start, start + count):
            draw = random.Random(f"{seed}-{run}")
            folder = draw.choice(made)
            kind, path, new = damage(folder, draw)
            content = path.read_bytes()
            path.unlink()
            if new is not None:
                path.write_bytes(new)
            begin = processor_seconds()
            found = outcome(folder, expected)
            seconds = processor_seconds() - begin
            path.write_bytes(content)
            outcomes[f"{kind} {found}"] += 1
            slowest = max(slowest, seconds)
            if seconds > LIMIT:
                faults.append(f"run {run}: {seconds:.1f} s for {folder.name}/{path.name}")
            if found == "differs" and kind not in ("values", "forged tree"):
                faults.append(
                    f"run {run}: other values from {folder.name}/{path.name}: {new[:2000]!r}"
                )
    return outcomes, slowest, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes, slowest, faults = Counter[str](), 0.0, list[str]()
    with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor(2) as pool:
        pool.submit(checkpoints, Path(root)).result()
        starts = range(0, arguments.runs, BATCH)
        jobs = {
            start: pool.submit(
                batch, Path(root), arguments.seed, start, min(BATCH, arguments.runs - start)
            )
            for start in starts
        }
        for start, job in jobs.items():
            try:
                found, seconds, wrong = job.result()
            except BrokenProcessPool:
                print(f"A process died in runs {start} to {start + 2 * BATCH}.")
                return 1
            outcomes += found
            slowest, faults = max(slowest, seconds), faults + wrong
    print(
        f"{arguments.runs} runs: {dict(sorted(outcomes.items()))}; slowest {slowest * 1000:.0f} ms"
    )
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
