"""save_checkpoint: weights to a folder in the Hugging Face layout, whole or not at all."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemma_hub.checkpoints.folder import INDEX_FILE, SINGLE_FILE, is_weight_file, listing
from gemma_hub.checkpoints.output import (
    check_target,
    copy_file,
    flush,
    whole_folder,
    write_json,
)
from gemma_hub.checkpoints.reader import EMBEDDING, read_eos_token_ids
from gemma_hub.checkpoints.safetensors_file import FORMAT_DTYPES
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import DTYPES, Weights, parameter_shapes, shape_origin

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total) while weights are written."""

MAX_SHARD_BYTES = 5_000_000_000
"""Size above which weights go to several files."""

_FORMAT_WORDS = {name: word for word, name in FORMAT_DTYPES.items()}
_GENERATION_CONFIG = "generation_config.json"
_ALIGNMENT = 64  # bytes, a line of the processor's cache: rows of a mapped weight are read faster
_WRITTEN_AT_ONCE = 16 << 20  # bytes


def save_checkpoint(
    path: str | Path,
    config: GemmaConfig,
    weights: Weights,
    *,
    task: str = "causal_lm",
    files: Sequence[str | Path] | Mapping[str, Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a checkpoint that `open_checkpoint` and Transformers read.

    Everything goes to a hidden folder beside `path`, which is renamed when it is complete: after a
    failure there is the old checkpoint, or none. One tensor at a time is held in memory.

    Args:
        path: the folder to make.
        config: written to config.json, with the type of the weights.
        weights: exactly the parameters that `config` and `task` call for.
        task: what the weights are for, a key of `gemma_hub.config.ARCHITECTURES`; config.json
            names the class of Transformers that has this head.
        files: files to copy beside them, such as tokenizer.model, or {name to give it: file}. A
            generation_config.json among them is kept as it is; without one it is made from the
            ids in `config`.
        max_shard_bytes: size above which the weights go to several files.
        overwrite: replace an existing checkpoint folder, as a whole. A folder that holds anything
            else than a checkpoint's files is never replaced.
        progress: told how far the writing is.
        records: {name: JSON object} of further files to write, such as a probe.

    Raises:
        CheckpointError: the weights do not fit `config`, `path` exists, or it cannot be written.
        CheckpointNotFoundError: one of `files` does not exist.
    """
    sizes = _checked_sizes(config, weights, task)
    copies = _checked_copies(files)
    # The real folder, so that the hidden one is on the same disk also where `path` is a link.
    target = Path(path).expanduser().resolve()
    check_target(target, overwrite, lambda folder: (folder / "config.json").is_file())
    try:
        with whole_folder(target) as hidden:
            write_folder(hidden, config, weights, task, copies, max_shard_bytes, progress)
            for name, record in (records or {}).items():
                write_json(hidden / name, record)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. The weights need "
            f"{sum(sizes.values()):,} bytes of disk. What was there before is still there."
        ) from error


# -- checks, before anything is written ------------------------------------------------------------


def _checked_sizes(config: GemmaConfig, weights: Weights, task: str) -> dict[str, int]:
    """{name: bytes} of what `config` calls for, in file order; an error if `weights` differ."""
    shapes, there = parameter_shapes(config, task), set(weights.names())
    problems = {
        "Missing": [name for name in shapes if name not in there],
        "Unexpected": [name for name in there if name not in shapes],
        "Misshapen": [
            f"{name} is {weights.shape(name)}, expected {shape} from "
            f"{shape_origin(config, name, task)}"
            for name, shape in shapes.items()
            if name in there and weights.shape(name) != shape
        ],
        "Of another type": [
            f"{name} is {weights.dtype(name)}, expected {' or '.join(DTYPES)}"
            for name in shapes
            if name in there and weights.dtype(name) not in DTYPES
        ],
    }
    if any(problems.values()):
        raise CheckpointError(
            "The weights are not those that the config calls for; nothing was written.\n"
            + listing(problems).rstrip()
        )
    return {
        name: math.prod(shape) * DTYPES[weights.dtype(name)].itemsize
        for name, shape in shapes.items()
    }


def _checked_copies(files: Sequence[str | Path] | Mapping[str, Path]) -> dict[str, Path]:
    """{name in the checkpoint: file to copy}."""
    named = files.items() if isinstance(files, Mapping) else [(Path(f).name, f) for f in files]
    copies: dict[str, Path] = {}
    for name, file in named:
        path = Path(file).expanduser()
        if not path.is_file():
            raise CheckpointNotFoundError(f"There is no file {path} to copy into the checkpoint.")
        if name in copies or name == "config.json" or is_weight_file(name):
            raise CheckpointError(
                f"{path} cannot be copied into the checkpoint: it has another file of that name."
            )
        copies[name] = path
    return copies


# -- writing ---------------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    config: GemmaConfig,
    weights: Weights,
    task: str,
    files: Mapping[str, Path],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint's files into an empty folder, each flushed to disk.

    Args:
        folder: where they go. What a failure leaves there is the caller's to remove.
        config: as for `save_checkpoint`, and so are the others.
        weights: as there.
        task: as there.
        files: {name in the checkpoint: file to copy}.
        max_shard_bytes: as there.
        progress: as there.

    Raises:
        CheckpointError: the weights do not fit `config`, or a generation_config.json is damaged.
        OSError: the folder cannot be written.
    """
    sizes = _checked_sizes(config, weights, task)
    write_companions(folder, config, weights, task, files)
    _write_weights(folder, weights, sizes, max_shard_bytes, progress)


def write_companions(
    folder: Path, config: GemmaConfig, weights: Weights, task: str, files: Mapping[str, Path]
) -> None:
    """Write all that belongs beside the weights: config.json, generation_config.json and copies.

    Raises:
        CheckpointError: the generation_config.json among `files` is damaged.
    """
    write_json(folder / "config.json", _config_json(config, weights, task))
    write_json(folder / _GENERATION_CONFIG, _generation_json(config))
    for name, source in files.items():
        copy_file(source, folder / name)
    read_eos_token_ids(folder, config)  # so that a damaged file is not copied


def _config_json(config: GemmaConfig, weights: Weights, task: str) -> dict[str, Any]:
    return dataclasses.replace(config, dtype=weights.dtype(EMBEDDING)).to_dict(task)


def _generation_json(config: GemmaConfig) -> dict[str, Any]:
    written = config.to_dict()
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: written[key] for key in keys if written[key] is not None}


def _write_weights(
    folder: Path,
    weights: Weights,
    sizes: Mapping[str, int],
    max_shard_bytes: int,
    progress: Progress | None,
) -> None:
    """The weight files, and the index where there are several."""
    shards = split_into_shards(sizes, max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [SINGLE_FILE] if len(shards) == 1 else names
    total, done = sum(sizes.values()), 0
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            for written in _write_safetensors(file, weights, shard):
                done += written
                if progress:
                    progress(done, total)
            flush(file)
    if len(shards) > 1:
        places = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / INDEX_FILE, index)


def split_into_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in file order, a new shard where the next tensor would go past the size."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_safetensors(file: BinaryIO, weights: Weights, names: Sequence[str]) -> Iterator[int]:
    """Write one file, yielding the number of bytes of each piece of tensor data.

    The format: the header's length as 8 bytes, little-endian; the header as JSON, padded with
    spaces; the tensors without a gap.
    """
    # The widest types first: then every tensor starts at a multiple of its item size.
    ordered = sorted(names, key=lambda name: -DTYPES[weights.dtype(name)].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in ordered:
        shape, dtype = weights.shape(name), weights.dtype(name)
        end = start + math.prod(shape) * DTYPES[dtype].itemsize
        entry = {"dtype": _FORMAT_WORDS[dtype], "shape": shape, "data_offsets": [start, end]}
        header[name] = entry
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        array = weights.read(name)
        if array.shape != weights.shape(name) or array.dtype != DTYPES[weights.dtype(name)]:
            raise CheckpointError(
                f"{name} was announced as {weights.dtype(name)} {weights.shape(name)} and reads as "
                f"{array.dtype} {array.shape}; the backend's export is wrong."
            )
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for i in range(0, data.size, _WRITTEN_AT_ONCE):
            yield file.write(data[i : i + _WRITTEN_AT_ONCE].data)
