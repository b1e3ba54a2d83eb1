"""Files of weights, mapped: their pages, and `Weights` over the tensors of several of them."""

import mmap
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from gemma_hub.errors import CheckpointError, nearest
from gemma_hub.parameters import Index, Shape

# Python names it from 3.13 on; this is its value on x86-64 and ARM.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)


def map_file(file: BinaryIO) -> mmap.mmap:
    """The file's pages, private: arrays over them are writable and the file never changes.

    Raises:
        ValueError: it is empty.
        OSError: it cannot be mapped.
    """
    if sys.platform == "linux":
        # Otherwise the kernel sets memory aside for a copy of the whole file, and refuses a model
        # larger than the machine's memory although nobody writes to it.
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def map_path(path: Path, kind: str) -> mmap.mmap:
    """The pages of the file at `path`, as `map_file` gives them.

    Args:
        path: the file.
        kind: what it should be, for messages: "HDF5".

    Raises:
        CheckpointError: it is not a file (a pipe would be waited for), empty, or cannot be opened.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; expected {kind}. Get the file again.")
    try:
        with path.open("rb") as file:
            return map_file(file)
    except ValueError as error:
        raise CheckpointError(f"{path} is empty; expected {kind}. Get the file again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror or error}).") from error


class _Tensor(Protocol):
    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> str: ...


class TensorFile(Protocol):
    """An open file of tensors."""

    @property
    def tensors(self) -> Mapping[str, _Tensor]:
        """{name: its shape and the name of its type}."""
        ...

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """One tensor, or the part of it that `index` selects."""
        ...


class FileWeights:
    """`Weights` over all tensors of files that have no name in common."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self._files = {name: file for file in files for name in file.tensors}

    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def shape(self, name: str) -> Shape:
        return self._file(name).tensors[name].shape

    def dtype(self, name: str) -> str:
        return self._file(name).tensors[name].dtype

    def read(self, name: str, index: Index = None) -> np.ndarray:
        return self._file(name).read(name, index)

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            hint = nearest(name, self._files)
            raise CheckpointError(f"There is no tensor {name!r}. {hint}".rstrip())
        return self._files[name]
