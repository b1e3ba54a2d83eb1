"""HDF5 files as Keras has them: every link is checked, and tensors are mapped, not read by HDF5.

libhdf5 reads the structure only. Keras stores every variable as one unbroken stretch of bytes, and
no other storage is accepted, so there are no filters to unpack and nothing outside the file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from gemma_hub.checkpoints.formats.readers import needed
from gemma_hub.checkpoints.output import flush
from gemma_hub.checkpoints.safetensors_file import _map
from gemma_hub.errors import CheckpointError, nearest
from gemma_hub.parameters import DTYPES, Index, Shape, Weights

_DEEPEST = 16  # groups within one another; Keras has 6
# What h5py raises when libhdf5 or NumPy meets something that makes no sense.
_DAMAGES = (
    AttributeError, KeyError, MemoryError, NotImplementedError, OSError, OverflowError,
    RecursionError, RuntimeError, SystemError, TypeError, ValueError,
)  # fmt: skip
_LAYOUTS = {0: "compact", 1: "contiguous", 2: "chunked", 3: "virtual"}  # HDF5's own numbers
_WRITTEN_AT_ONCE = 16 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Hdf5Tensor:
    """One dataset of a file.

    Attributes:
        dtype: a key of `DTYPES`, or the file's own word for a type that a parameter cannot have.
        shape: as the file has it.
        start: offset of its first byte in the file.
        pages: the whole file, mapped copy-on-write.
    """

    dtype: str
    shape: Shape
    start: int
    pages: mmap

    def read(self, index: Index = None) -> np.ndarray:
        """The tensor, or the part that `index` selects: a view of the map."""
        dtype = DTYPES[self.dtype]
        array = np.ndarray(self.shape, dtype, buffer=self.pages, offset=self.start)
        selection: Index | EllipsisType = ... if index is None else index
        part = np.asarray(array[selection])
        return part.copy() if self.start % dtype.itemsize else part


class Hdf5Weights:
    """`Weights` over the datasets of mapped files."""

    def __init__(self, tensors: Mapping[str, Hdf5Tensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        return self._tensor(name).dtype

    def read(self, name: str, index: Index = None) -> np.ndarray:
        return self._tensor(name).read(index)

    def _tensor(self, name: str) -> Hdf5Tensor:
        if name not in self._tensors:
            hint = nearest(name, self._tensors)
            raise CheckpointError(f"There is no tensor {name!r}. {hint}".rstrip())
        return self._tensors[name]


# -- reading ---------------------------------------------------------------------------------------


def read_hdf5(path: Path, most: int) -> dict[str, Hdf5Tensor]:
    """{path in the file: tensor} of all datasets in an HDF5 file. No tensor is read.

    Args:
        path: the file.
        most: number of groups and datasets above which the file is refused.

    Raises:
        CheckpointError: the file is missing, cut short or damaged, leads out of itself, or stores
            a dataset in another way than Keras does.
    """
    h5py = needed("h5py", "keras")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; expected HDF5. Get the file again.")
    try:
        with path.open("rb") as file:
            pages = _map(file)
        # Nothing is written and nothing read later on, so other programs need not be kept out.
        with h5py.File(path, "r", locking=False) as root:
            if root.userblock_size:
                raise _refused(path, "begins with bytes that are not HDF5 (a user block)")
            return {
                name: _tensor(h5py, path, name, dataset, pages)
                for name, dataset in _datasets(h5py, path, root, most)
            }
    except CheckpointError:
        raise
    except _DAMAGES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} is not a complete HDF5 file ({reason}). Get the file again."
        ) from error


def _datasets(h5py: Any, path: Path, root: Any, most: int) -> Iterator[tuple[str, Any]]:
    """Every dataset of a file with its path, none reached by a link that could lead out of it."""
    groups, seen = [("", root)], 0
    while groups:
        prefix, group = groups.pop()
        for key in group:
            name, seen = prefix + key, seen + 1
            if seen > most:
                raise _refused(path, f"holds more than {most:,} groups and datasets")
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise _refused(path, f"has {name!r} as a {type(link).__name__} to elsewhere")
            item = group[key]
            if isinstance(item, h5py.Dataset):
                yield name, item
            elif not isinstance(item, h5py.Group):
                raise _refused(path, f"holds {name!r}, which is a {type(item).__name__}")
            elif name.count("/") >= _DEEPEST:
                raise _refused(path, f"has groups more than {_DEEPEST} deep ({name[:100]!r})")
            else:
                groups.append((name + "/", item))


def _tensor(h5py: Any, path: Path, name: str, dataset: Any, pages: mmap) -> Hdf5Tensor:
    properties = dataset.id.get_create_plist()
    layout = _LAYOUTS.get(properties.get_layout(), "unknown")
    if layout != "contiguous":
        raise _refused(path, f"stores {name!r} in a {layout} layout, not a contiguous one")
    if properties.get_external_count():
        raise _refused(path, f"stores {name!r} in another file")
    shape, dtype = dataset.shape, _dtype(dataset)
    start = dataset.id.get_offset()
    if shape is None or start is None:
        raise _refused(path, f"has {name!r} without a value")
    shape = tuple(int(size) for size in shape)
    end = start + math.prod(shape) * dataset.dtype.itemsize
    if end > len(pages):
        raise CheckpointError(
            f"{path} has {len(pages):,} bytes and {name!r} should end at byte {end:,}; the file "
            "was cut short. Get the file again."
        )
    return Hdf5Tensor(dtype, shape, start, pages)


def _dtype(dataset: Any) -> str:
    """Name of a dataset's type. Keras marks bfloat16, which HDF5 does not know, by an attribute."""
    stored = dataset.dtype
    mark = dataset.attrs.get("dtype")
    if mark is not None:
        mark = mark.decode("ascii", "replace") if isinstance(mark, bytes) else str(mark)
        is_bfloat16 = mark == "bfloat16" and stored == np.dtype("V2")
        return mark if is_bfloat16 else f"{stored.str} marked as {mark[:40]!r}"
    names = [name for name, dtype in DTYPES.items() if dtype == stored and stored.kind == "f"]
    return names[0] if names else str(stored.str)


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}. Keras writes no such file, and it is not read. Get the file from its "
        "source, or save it again with Keras."
    )


# -- writing ---------------------------------------------------------------------------------------


def write_hdf5(path: Path, weights: Weights, names: list[str]) -> Iterator[int]:
    """Write one file of these tensors, yielding the number of bytes of each piece of tensor data.

    HDF5 writes the structure and sets the space aside; the data then goes to where it belongs like
    in any other file, so that a full disk is an OSError and memory holds one tensor.
    """
    h5py = needed("h5py", "keras")
    places: dict[str, int] = {}
    # "earliest" is what Keras's files have: the same bytes with every version of h5py.
    with h5py.File(path, "w", libver="earliest") as file:
        for name in names:
            places[name] = _set_aside(h5py, file, name, weights.shape(name), weights.dtype(name))
    with path.open("r+b") as data_file:
        for name in names:
            array = np.ascontiguousarray(weights.read(name))
            data = array.reshape(-1).view(np.uint8)
            data_file.seek(places[name])
            for i in range(0, data.size, _WRITTEN_AT_ONCE):
                yield data_file.write(data[i : i + _WRITTEN_AT_ONCE].data)
            del array, data
        flush(data_file)


def _set_aside(h5py: Any, file: Any, name: str, shape: Shape, dtype: str) -> int:
    """Make a dataset that is not filled; returns the offset of its first byte in the file."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    stored = np.dtype("V2") if dtype == "bfloat16" else DTYPES[dtype].newbyteorder("<")
    dataset = file.create_dataset(name, shape, stored, dcpl=properties)
    if dtype == "bfloat16":
        dataset.attrs["dtype"] = "bfloat16"
    return int(dataset.id.get_offset())
