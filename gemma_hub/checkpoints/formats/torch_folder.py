"""The tensors in files of torch.save, one or several: as `Weights`, and from `Weights`."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from gemma_hub.checkpoints.folder import FileNames, check_index_against_files, weight_files
from gemma_hub.checkpoints.formats.interface import Progress
from gemma_hub.checkpoints.formats.torch_file import TorchFile
from gemma_hub.checkpoints.formats.torch_writer import nbytes, write_torch
from gemma_hub.checkpoints.output import flush, write_json
from gemma_hub.checkpoints.writer import split_into_shards
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, nearest
from gemma_hub.parameters import Index, Shape, Weights, parameter_axes

TORCH_FILES = FileNames("pytorch_model", ".bin")
"""What Transformers calls them, and gemma_pytorch where there are several."""

_PEEKED = 64 << 10  # bytes
_FAR = 100  # parameters


class TorchWeights:
    """`Weights` over the tensors of files: {name: (file, name there)}."""

    def __init__(self, places: Mapping[str, tuple[TorchFile, str]]) -> None:
        self._places = dict(places)

    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def shape(self, name: str) -> Shape:
        file, stored = self._place(name)
        return file.tensors[stored].shape

    def dtype(self, name: str) -> str:
        file, stored = self._place(name)
        return file.tensors[stored].dtype

    def read(self, name: str, index: Index = None) -> np.ndarray:
        file, stored = self._place(name)
        return file.read(stored, index)

    def is_same(self, one: str, other: str) -> bool:
        """Whether two names are of one tensor, stored once."""
        (file, stored), (other_file, other_stored) = self._place(one), self._place(other)
        return file is other_file and file.tensors[stored] == file.tensors[other_stored]

    def _place(self, name: str) -> tuple[TorchFile, str]:
        if name not in self._places:
            hint = nearest(name, self._places)
            raise CheckpointError(f"There is no tensor {name!r}. {hint}".rstrip())
        return self._places[name]


def open_files(folder: Path) -> TorchWeights:
    """The tensors of the files in a folder, all of which fit the index if there is one.

    Raises:
        CheckpointError: a file is missing, damaged, or not what the index says.
    """
    found = weight_files(folder, TORCH_FILES)
    files = [TorchFile(path) for path in found.paths]
    check_index_against_files(folder, found.index, files, TORCH_FILES)
    return TorchWeights({name: (file, name) for file in files for name in file.tensors})


def check_number(path: Path, names: Collection[str], config: GemmaConfig, task: str) -> None:
    """Check that there are about as many tensors as the config calls for.

    Raises:
        CheckpointError: there are far fewer: too few for a list of what is missing.
    """
    expected = len(parameter_axes(config, task))
    if expected > 2 * len(names) + _FAR:  # gemma_pytorch has one tensor for three parameters
        raise CheckpointError(
            f"{path} has {len(names):,} tensors, and a model of {config.num_hidden_layers:,} "
            f"layers has {expected:,} parameters. Check that the config and the weights belong "
            "together."
        )


def write_files(
    folder: Path,
    weights: Weights,
    names: FileNames,
    max_shard_bytes: int,
    progress: Progress | None = None,
    *,
    has_index: bool = False,
) -> None:
    """Write the single file; or shards and their index, where one file does not do.

    Args:
        folder: where they go.
        weights: the tensors.
        names: of the files.
        max_shard_bytes: size above which there are several.
        progress: told how far the writing is.
        has_index: whether one shard has an index, too.
    """
    sizes = {name: nbytes(weights, name) for name in weights.names()}
    shards = split_into_shards(sizes, max_shard_bytes)
    has_index = has_index or len(shards) > 1
    files = names.shards(len(shards)) if has_index else [names.single]
    total, done = sum(sizes.values()), 0
    for name, shard in zip(files, shards, strict=True):
        with (folder / name).open("wb") as file:
            for written in write_torch(file, weights, shard):
                done += written
                if progress:
                    progress(done, total)
            flush(file)
    if has_index:
        places = {tensor: f for f, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / names.index, index)


def begins_with_any(path: Path, words: tuple[bytes, ...]) -> bool:
    """Whether one of the words is in the first part of a file: an index, or a file of torch.save.

    The names of the tensors are in the first record of the latter.
    """
    with path.open("rb") as file:
        start = file.read(_PEEKED)
    return any(word in start for word in words)
