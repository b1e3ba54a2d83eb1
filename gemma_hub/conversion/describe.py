"""describe: what a checkpoint of any format holds and what is wrong with it, without raising."""

import dataclasses
import hashlib
import math
import os
from pathlib import Path

import numpy as np

from gemma_hub.checkpoints import Description, FileDescription, describe_checkpoint
from gemma_hub.checkpoints.description import TensorDescription
from gemma_hub.checkpoints.folder import is_weight_file
from gemma_hub.checkpoints.formats.interface import Opened, Progress
from gemma_hub.checkpoints.reader import EMBEDDING
from gemma_hub.conversion.opening import detect_format
from gemma_hub.errors import CheckpointError, GemmaHubError
from gemma_hub.parameters import DTYPES, Weights
from gemma_hub.plugins.registry import plugin_registry
from gemma_hub.source import resolved

_ORDINARY = "huggingface"
_HASHED_AT_ONCE = 16 << 20  # bytes


def describe(source: str | os.PathLike[str]) -> Description:
    """Describe a checkpoint, whatever its format and its state. No tensor is read.

    In a Hugging Face folder every problem is found; of another format, the first.
    """
    path = resolved(source)
    try:
        is_folder = path.is_dir() and any(is_weight_file(entry.name) for entry in path.iterdir())
        name = _ORDINARY if is_folder else detect_format(path)
    except (CheckpointError, OSError):
        name = _ORDINARY
    if name == _ORDINARY:
        return describe_checkpoint(path)
    try:
        return _described(plugin_registry().load_format(name).open(path), name)
    except (GemmaHubError, OSError) as error:
        return Description(
            str(path), None, "causal_lm", 0, None, (), (), _files(path), (str(error),), name
        )


def tensor_hashes(
    source: str | os.PathLike[str], progress: Progress | None = None
) -> dict[str, str]:
    """{canonical name: SHA-256} of every parameter's type, shape and bytes, all of which are read.

    The same parameter has the same hash in every format, so that two checkpoints can be compared
    by text.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    path = resolved(source)
    weights = plugin_registry().load_format(detect_format(path)).open(path).weights
    sizes = {name: _nbytes(weights, name) for name in weights.names()}
    hashes, done = {}, 0
    for name, nbytes in sizes.items():
        digest = hashlib.sha256(f"{weights.dtype(name)} {weights.shape(name)}".encode())
        data = np.ascontiguousarray(weights.read(name)).reshape(-1).view(np.uint8)
        for start in range(0, data.size, _HASHED_AT_ONCE):
            digest.update(data[start : start + _HASHED_AT_ONCE].data)
        hashes[name] = digest.hexdigest()
        done += nbytes
        if progress:
            progress(done, sum(sizes.values()))
    return hashes


def with_hashes(description: Description, hashes: dict[str, str]) -> Description:
    """The description with the hash of every tensor that has one."""
    tensors = tuple(
        dataclasses.replace(tensor, sha256=hashes.get(tensor.name))
        for tensor in description.tensors
    )
    return dataclasses.replace(description, tensors=tensors)


def _described(opened: Opened, name: str) -> Description:
    weights = opened.weights
    return Description(
        path=str(opened.path),
        config=opened.config.to_dict(opened.task),
        task=opened.task,
        num_parameters=sum(math.prod(weights.shape(n)) for n in weights.names()),
        dtype=weights.dtype(EMBEDDING),
        eos_token_ids=opened.config.eos_token_ids,
        tensors=tuple(
            TensorDescription(
                n, weights.shape(n), weights.dtype(n), _nbytes(weights, n), opened.path.name
            )
            for n in sorted(weights.names())
        ),
        files=_files(opened.path),
        problems=(),
        format=name,
        notes=(
            *opened.notes,
            *(f"{tensor} is left alone: {reason}." for tensor, reason in opened.dropped.items()),
        ),
    )


def _nbytes(weights: Weights, name: str) -> int:
    return math.prod(weights.shape(name)) * DTYPES[weights.dtype(name)].itemsize


def _files(path: Path) -> tuple[FileDescription, ...]:
    if path.is_file():
        return (FileDescription(path.name, path.stat().st_size),)
    found = sorted(entry for entry in path.rglob("*") if entry.is_file())
    return tuple(
        FileDescription(str(entry.relative_to(path)), entry.stat().st_size) for entry in found
    )
