"""The files of an Orbax checkpoint around its arrays: where they are, the tree, and writing them.

An array has the keys of the tree on the way to it, joined by ".", as its name. Of the files beside
the arrays only _METADATA, the tree as JSON, is read; _sharding, array_metadatas and the rest say
where values were on the devices. Written are arrays of zarr 2 without compression, each one file of
its values, which Orbax restores and which `ZarrFolder` maps.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.checkpoints.folder import listing
from gemma_hub.checkpoints.formats.file_listing import read_file
from gemma_hub.checkpoints.formats.ocdbt_listing import MANIFEST
from gemma_hub.checkpoints.formats.zarr_metadata import METADATA_FILES
from gemma_hub.checkpoints.output import flush, sync_folder
from gemma_hub.config import parse_json_object
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import DTYPES, Shape, Weights

TREE = "_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"
_MAX_TREE_BYTES = 8 << 20
_ARRAYS = ("jax.Array", "jax.ArrayImpl", "np.ndarray", "scalar")  # value types that are stored
_KEYS_OF_DICTIONARIES = 2  # the key type of Orbax
_ZARR_WORDS = {"float64": "<f8", "float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2"}
_WRITTEN_AT_ONCE = 16 << 20  # bytes

# Where a folder is looked through for an array, or for the folder that has the checkpoint.
_LOOKED_AT = 100  # entries of one folder
_DEEPEST = 6
_OTHER_WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


# -- finding ---------------------------------------------------------------------------------------


def find_checkpoints(path: Path) -> list[Path]:
    """The folder itself where it holds a tree of arrays, else those of its folders that do.

    Orbax puts the tree of a step in "default" and the like, and Google's downloads have it in a
    folder such as "2b" beside the tokenizer.

    Raises:
        OSError: a folder cannot be read.
    """
    if _is_marked(path):
        return [path]
    entries = _some_entries(path)
    if any(entry.suffix in _OTHER_WEIGHTS for entry in entries):
        return []
    found = [folder for entry in _folders(entries) for folder in _marked(entry)]
    return found or ([path] if _has_array(path, _DEEPEST) else [])


def _marked(path: Path) -> list[Path]:
    """The folder itself if it says that it has a tree, else those of its folders that do."""
    if _is_marked(path):
        return [path]
    return [entry for entry in _folders(_some_entries(path)) if _is_marked(entry)]


def _is_marked(path: Path) -> bool:
    return (path / TREE).is_file() or (path / MANIFEST).is_file()


def checkpoint_folder(path: Path) -> Path:
    """The one folder with a tree of arrays at `path`, with no link on the way to it.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointError: there are several, or the only one was not saved to its end.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"There is no checkpoint at {path}.")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file; an Orbax checkpoint is a folder. Pass the folder, {path.parent}."
        )
    try:
        found = find_checkpoints(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if len(found) > 1:
        names = ", ".join(str(folder.relative_to(path)) for folder in found[:10])
        raise CheckpointError(f"{path} holds several checkpoints: {names}. Pass one of them.")
    if _UNFINISHED in path.name:
        raise CheckpointError(f"{path} was not saved to its end. Take an earlier step.")
    if not found:
        raise CheckpointNotFoundError(
            f"{path} holds no Orbax checkpoint: no {TREE}, no {MANIFEST}, and no folder with one "
            f"of {', '.join(METADATA_FILES)}. Pass the folder that has it."
        )
    return found[0].resolve()


def _has_array(path: Path, depth: int) -> bool:
    """Whether there is an array in one of the first folders; the first Orbax marked nothing."""
    entries = _some_entries(path)
    return any(entry.name in METADATA_FILES for entry in entries) or (
        depth > 0 and any(_has_array(entry, depth - 1) for entry in _folders(entries)[:2])
    )


def _some_entries(path: Path) -> list[Path]:
    return sorted(entry for entry, _ in zip(path.iterdir(), range(_LOOKED_AT), strict=False))


def _folders(entries: Iterable[Path]) -> list[Path]:
    return [
        entry
        for entry in entries
        if entry.is_dir()
        and not entry.is_symlink()
        and not entry.name.startswith(".")
        and _UNFINISHED not in entry.name
    ]


# -- the tree --------------------------------------------------------------------------------------


def check_tree(folder: Path, files: Mapping[str, int], arrays: Iterable[str]) -> None:
    """Check that the arrays that there are, and those that _METADATA has, are the same.

    Args:
        folder: of the checkpoint.
        files: {path: size} of what is in it.
        arrays: names of the arrays that were found.

    Raises:
        CheckpointError: _METADATA is damaged, or names other arrays.
    """
    unmerged = [name for name in files if name.endswith(f"/{MANIFEST}")]
    if unmerged and MANIFEST not in files:
        raise CheckpointError(
            f"{folder} has {unmerged[0]} and no {MANIFEST}: it was not saved, or not copied, to "
            "its end. Get the checkpoint again."
        )
    if TREE not in files:  # as the first Orbax had it
        return
    path = folder / TREE
    if files[TREE] > _MAX_TREE_BYTES:
        raise CheckpointError(f"{path} is too large. Get the checkpoint again.")
    tree = parse_json_object(read_file(path), str(path), CheckpointError).get("tree_metadata")
    if not isinstance(tree, dict) or not tree:
        raise CheckpointError(f"{path} has no tree_metadata. Get the checkpoint again.")
    named, found = {name for leaf in tree.values() for name in _names(path, leaf)}, set(arrays)
    problems = {
        f"In {TREE}, and not there": named - found,
        f"There, and not in {TREE}": found - named,
    }
    if any(problems.values()):
        raise CheckpointError(
            f"{path} and the arrays beside it do not fit.\n"
            + listing(problems)
            + "  Something is missing, or is left over from another save; get all of it again."
        )


def _names(path: Path, leaf: Any) -> Iterator[str]:
    """The name of a leaf of the tree, if it is stored as an array."""
    try:
        keys = [entry["key"] for entry in leaf["key_metadata"]]
        value = leaf["value_metadata"]
        kind, is_left_out = value["value_type"], value.get("skip_deserialize", False)
        name = ".".join(keys)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has an entry that is not as Orbax writes it. Get the checkpoint again."
        ) from error
    if kind in _ARRAYS and not is_left_out:
        yield name


# -- writing ---------------------------------------------------------------------------------------


def write_arrays(
    folder: Path, weights: Weights, keys: Mapping[str, tuple[str, ...]]
) -> Iterator[int]:
    """Write arrays and the tree that has them, each flushed to disk, one in memory at a time.

    Args:
        folder: where to.
        weights: the arrays.
        keys: {name in `weights`: keys from the root of the tree to it}.

    Yields:
        The number of bytes of each piece of values.

    Raises:
        CheckpointError: an array reads as another than was announced.
        OSError: the disk is full, or cannot be written.
    """
    made = {folder}
    for name, path in keys.items():
        place = folder / ".".join(path)
        place.mkdir(parents=True)
        made |= {parent for parent in (place, *place.parents) if parent.is_relative_to(folder)}
        shape, dtype = weights.shape(name), weights.dtype(name)
        _write_json(place / ".zarray", _zarray(shape, dtype))
        yield from _write_values(place / ".".join("0" * len(shape)), weights, name)
    _write_json(folder / TREE, _tree(keys.values()))
    for place in made:
        sync_folder(place)


def _write_values(path: Path, weights: Weights, name: str) -> Iterator[int]:
    array = weights.read(name)
    if array.shape != weights.shape(name) or array.dtype != DTYPES[weights.dtype(name)]:
        raise CheckpointError(
            f"{name} was announced as {weights.dtype(name)} {weights.shape(name)} and reads as "
            f"{array.dtype} {array.shape}; the reader of the source is wrong."
        )
    values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    with path.open("wb") as file:
        for start in range(0, values.size, _WRITTEN_AT_ONCE):
            yield file.write(values[start : start + _WRITTEN_AT_ONCE].data)
        flush(file)


def _zarray(shape: Shape, dtype: str) -> dict[str, Any]:
    return {
        "chunks": list(shape),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _ZARR_WORDS[dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }


def _tree(keys: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """The content of _METADATA. Arrays of NumPy: Orbax restores them on any device, or on none."""
    leaves = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": _KEYS_OF_DICTIONARIES} for key in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for path in keys
    }
    return {
        "tree_metadata": leaves,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As Orbax has its JSON: on one line."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, separators=(",", ":")))
        flush(file)


def total_bytes(weights: Weights) -> int:
    """Bytes of all arrays."""
    return sum(
        math.prod(weights.shape(name)) * DTYPES[weights.dtype(name)].itemsize
        for name in weights.names()
    )
