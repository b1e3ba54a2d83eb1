"""A folder of zarr arrays: what is in it, whether all of it is there, and how to read it.

The arrays are folders of files, or entries of an OCDBT database in the folder (manifest.ocdbt),
which is a B-tree in files. tensorstore decodes that and whatever is compressed; a chunk that is a
file of plain values is mapped without it. The specs that tensorstore gets are made here, for files
of this folder only: no JSON of a checkpoint names a driver, a path or an address. tensorstore
itself refuses a database that refers to ".." or to absolute paths; links are checked here. It
decodes a chunk to the size that the array's metadata gives and no further.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.checkpoints.formats.file_listing import list_files, read_file
from gemma_hub.checkpoints.formats.ocdbt_listing import MANIFEST, list_database
from gemma_hub.checkpoints.formats.ocdbt_program import database_spec, explained
from gemma_hub.checkpoints.formats.readers import needed
from gemma_hub.checkpoints.formats.zarr_metadata import (
    MAX_METADATA_BYTES,
    METADATA_FILES,
    ZarrArray,
    parse_array,
)
from gemma_hub.checkpoints.mapped_file import map_file
from gemma_hub.errors import CheckpointError, first_ten, nearest
from gemma_hub.parameters import DTYPES, Index, Shape

_MOST_ARRAYS = 4_000  # no Gemma comes near it
_NODES_BYTES = 64 << 20  # of a database's B-tree that are kept in memory

# The most that bytes of zstd can stand for is a block of 128 KiB in 4 of them; gzip has less.
_EXPANSION = 1 << 15
_BLOCK = 1 << 17
_OVERHEAD = 1 << 20  # bytes that a chunk may have beside twice those of its values


class ZarrFolder:
    """The arrays of a folder, listed; no value is read until it is asked for.

    Attributes:
        path: the folder.
        files: {path within it, with "/": size} of all its files.
        versions: {name of an array: its version of zarr}.

    Raises:
        CheckpointError: the folder holds links to elsewhere, or what is no file; or its database
            is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = list_files(path)
        self._total = sum(self.files.values())
        self._entries = (
            list_database(path, tuple(METADATA_FILES)) if MANIFEST in self.files else None
        )
        keys = self.files if self._entries is None else self._entries
        self.versions = _versions(path, keys)
        self._under: dict[str, set[str]] = {name: set() for name in self.versions}
        for key in keys:
            for parent in _parents(key):
                if parent in self._under:
                    self._under[parent].add(key)

    def array(self, name: str) -> ZarrArray:
        """What an array says of itself, checked.

        Raises:
            CheckpointError: it is damaged, or not as Orbax writes it.
        """
        key = self._metadata_key(name)
        if self._entries is not None:
            content = (self._entries[key] or "").encode()
        elif self.files[key] > MAX_METADATA_BYTES:
            content = b" " * (MAX_METADATA_BYTES + 1)  # refused like any that is too long
        else:
            content = read_file(self.path / key)
        return parse_array(name, self.versions[name], content, str(self.path))

    def check_chunks(self, array: ZarrArray) -> None:
        """Check that every chunk of an array is there, and long enough to be one.

        zarr has no error for a chunk that is missing: it reads as zeros.

        Raises:
            CheckpointError: naming what is missing, left over, cut short or too large.
        """
        found = self._under[array.name] - {self._metadata_key(array.name)}
        # As many as there are keys, so that a huge grid takes no time.
        expected = list(itertools.islice(array.keys(), len(found) + 10))
        missing = [key for key in expected if key not in found]
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {first_ten(missing)}, of the {array.number_of_chunks:,} chunks "
                f"of {array.name}, which zarr would read as zeros. Get the checkpoint again. If "
                "an old Orbax left out what is zero, save it again with a new one."
            )
        if left := found.difference(expected):
            raise CheckpointError(
                f"{self.path} holds {first_ten(left)}, which the shape {array.shape} of "
                f"{array.name} has no place for. It is left over from another save."
            )
        largest = 2 * array.chunk_nbytes + _OVERHEAD
        for key in expected:
            size = self.files[key] if self._entries is None else min(self._total, largest)
            self._check_size(array, key, size, largest)
        if self._entries is not None:
            self._check_ends(expected, largest)

    def read(self, array: ZarrArray, index: Index = None) -> np.ndarray:
        """An array, or the part of it that `index` selects; only chunks that have some of it.

        A view of the file, writable for the caller, where its values are all in one as they are.

        Raises:
            CheckpointError: a chunk is damaged.
        """
        if array.is_raw and array.number_of_chunks == 1 and self._entries is None:
            whole = self._mapped(array)
            return np.asarray(whole if index is None else whole[index])
        opened = self._opened(array)
        with _translated(f"{array.name} in {self.path}"):
            part = opened if index is None else opened[_plain(index, array.shape)]
            return np.asarray(part.read().result())

    def _metadata_key(self, name: str) -> str:
        version = self.versions[name]
        return f"{name}/{next(f for f, number in METADATA_FILES.items() if number == version)}"

    def _check_size(self, array: ZarrArray, key: str, size: int, largest: int) -> None:
        nbytes = array.chunk_nbytes
        if array.is_raw and self._entries is None and size != nbytes:
            raise CheckpointError(
                f"{self.path / key} has {size:,} bytes; {array.dtype} {array.chunks} has "
                f"{nbytes:,}. Get the checkpoint again."
            )
        if size == 0 or size > largest or nbytes > _EXPANSION * size + _BLOCK:
            raise CheckpointError(
                f"{self.path} says that {key} is {array.dtype} {array.chunks}, which cannot have "
                f"{size:,} bytes. Get the checkpoint again."
            )

    def _check_ends(self, keys: list[str], largest: int) -> None:
        """Read the last byte of entries of the database, to find files that were cut short."""
        where = self.path / MANIFEST
        with _translated(where):
            opening = needed("tensorstore", "orbax").KvStore.open
            store = opening(self._kvstore(""), context=self._context).result()
        ends = [store.read(key, byte_range=slice(-1, None)) for key in keys]
        past = [store.read(key, byte_range=slice(largest, largest + 1)) for key in keys]
        for key, end, byte in zip(keys, ends, past, strict=True):
            with _translated(f"{key} in {where}"):
                end.result()
            if byte.exception() is None:
                raise CheckpointError(
                    f"{key} in {where} has more than {largest:,} bytes, too many for its array. "
                    "Get the checkpoint again."
                )

    def _mapped(self, array: ZarrArray) -> np.ndarray:
        path = self.path / array.key((0,) * len(array.shape))
        try:
            with path.open("rb") as file:
                pages = map_file(file)
            return np.ndarray(array.shape, DTYPES[array.dtype], buffer=pages)
        except (OSError, ValueError, TypeError) as error:  # it was changed since it was checked
            raise CheckpointError(f"{path} cannot be read ({error}).") from error

    def _opened(self, array: ZarrArray) -> Any:
        spec = {
            "driver": "zarr" if array.version == 2 else "zarr3",
            "kvstore": self._kvstore(f"{array.name}/"),
            "fill_missing_data_reads": False,
        }
        with _translated(f"{array.name} in {self.path}"):
            opening = needed("tensorstore", "orbax").open
            opened = opening(spec, open=True, read=True, context=self._context).result()
        if tuple(opened.shape) != array.shape or opened.dtype.name != array.dtype:
            raise CheckpointError(f"{array.name} in {self.path} was changed while it was opened.")
        return opened

    def _kvstore(self, path: str) -> dict[str, Any]:
        """tensorstore's spec of what is under a path in the folder, or in its database."""
        if self._entries is None:
            return {"driver": "file", "path": f"{self.path}/{path}"}
        return {**database_spec(str(self.path)), "path": path, "cache_pool": "cache_pool#nodes"}

    @cached_property
    def _context(self) -> Any:
        """What tensorstore may use: it keeps no values, and has few chunks in memory at a time."""
        limits = {
            "cache_pool": {"total_bytes_limit": 0},
            "cache_pool#nodes": {"total_bytes_limit": _NODES_BYTES},
            "data_copy_concurrency": {"limit": 2},
            "file_io_concurrency": {"limit": 4},
        }
        return needed("tensorstore", "orbax").Context(limits)


class StoredArrays:
    """`Weights` over some arrays of a folder, under other names.

    Args:
        folder: that has them.
        arrays: {name to give it: array}.
    """

    def __init__(self, folder: ZarrFolder, arrays: Mapping[str, ZarrArray]) -> None:
        self._folder, self._arrays = folder, dict(arrays)

    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def shape(self, name: str) -> Shape:
        return self._array(name).shape

    def dtype(self, name: str) -> str:
        return self._array(name).dtype

    def read(self, name: str, index: Index = None) -> np.ndarray:
        return self._folder.read(self._array(name), index)

    def check(self) -> None:
        """Check the chunks of every array; see `ZarrFolder.check_chunks`."""
        for array in self._arrays.values():
            self._folder.check_chunks(array)

    def _array(self, name: str) -> ZarrArray:
        if name not in self._arrays:
            hint = nearest(name, self._arrays)
            raise CheckpointError(f"There is no array {name!r}. {hint}".rstrip())
        return self._arrays[name]


def _versions(folder: Path, keys: Iterable[str]) -> dict[str, int]:
    versions: dict[str, int] = {}
    for key in keys:
        name, _, file = key.rpartition("/")
        if file in METADATA_FILES and name:
            if name in versions:
                raise CheckpointError(f"{folder} has {name} in two versions of zarr.")
            versions[name] = METADATA_FILES[file]
    if len(versions) > _MOST_ARRAYS:
        raise CheckpointError(f"{folder} holds more than {_MOST_ARRAYS:,} arrays.")
    return versions


@contextmanager
def _translated(what: object) -> Iterator[None]:
    """tensorstore's errors as ours."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{what} cannot be read: {explained(error)}. Get the checkpoint again."
        ) from error


def _plain(index: Index, shape: Shape) -> tuple[slice | int, ...]:
    """An index that tensorstore takes as NumPy does: no negative numbers, no steps."""
    entries = index if isinstance(index, tuple) else (index,)
    plain: list[slice | int] = []
    for entry, size in zip(entries, shape, strict=False):
        if isinstance(entry, slice):
            start, stop, _ = entry.indices(size)
            plain.append(slice(start, max(start, stop)))
        else:
            assert isinstance(entry, int)
            plain.append(entry % size)
    return tuple(plain)


def _parents(key: str) -> Iterator[str]:
    """The names of the folders that a key is in."""
    at = key.find("/")
    while at >= 0:
        yield key[:at]
        at = key.find("/", at + 1)
