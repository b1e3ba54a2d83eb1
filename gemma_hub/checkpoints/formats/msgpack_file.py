"""One file of `flax.serialization`, mapped and scanned: the part of msgpack that arrays need.

A file is one map of maps. An array is an extension of type 1, a NumPy scalar one of type 3, whose
payload is msgpack again: [shape, name of the type, bytes]. An array of more than 2**30 bytes is a
map {"__msgpack_chunked_array__": true, "shape": {"0": ...}, "chunks": {"0": array, ...}}. Nothing
else is read: no lists, no texts, no objects. The scan looks at headers only, and is bounded.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import BinaryIO

import numpy as np

from gemma_hub.checkpoints.mapped_file import map_path
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, Index, Shape, Weights

MAX_CHUNK_BYTES = 1 << 30
"""Size above which an array is written in chunks, as flax does."""

# No Gemma comes near these; the limits keep a damaged file from taking the time or the memory.
_MAX_VALUES = 10_000
_MAX_DEPTH = 32
_MAX_PATH = 512
_MAX_DIMENSIONS = 32

_CHUNKED, _SHAPE, _CHUNKS = "__msgpack_chunked_array__", "shape", "chunks"
_ARRAY, _SCALAR = 1, 3
_WRITTEN_AT_ONCE = 16 << 20  # bytes

# {first byte: (bytes of the length or number, bytes before the content)}, by kind.
_EXTENSION = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSION = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_STRING = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BINARY = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_MAP = {0xDE: 2, 0xDF: 4}
_LIST = {0xDC: 2, 0xDD: 4}
_UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_SIGNED = {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FALSE, _TRUE = 0xC2, 0xC3


@dataclass(frozen=True, slots=True)
class MsgpackArray:
    """One array of a file.

    Attributes:
        dtype: a key of `DTYPES`.
        shape: as the file has it.
        pieces: (offset, size) in bytes of its content; several where it is chunked.
    """

    dtype: str
    shape: Shape
    pieces: tuple[tuple[int, int], ...]


_Node = dict[str, "_Node"] | MsgpackArray | int


class MsgpackFile:
    """A file of `flax.serialization`, checked and mapped; no array is read until it is asked for.

    Attributes:
        path: the file.
        pages: the whole file, mapped copy-on-write.
        tensors: {keys from the root, joined by "/": array}.

    Raises:
        CheckpointError: the file is missing, cut short, or holds something else than arrays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pages = map_path(path, "msgpack")
        try:
            self.tensors = _flat(_Scanner(memoryview(self.pages)).tree())
        except _Malformed as error:
            raise CheckpointError(
                f"{path} is not a complete msgpack file of arrays as Flax writes it: {error}. "
                "Get the file again."
            ) from error

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """An array, or the part of it that `index` selects.

        A view of the map, writable for the caller; a copy where the array is chunked, or where
        the part starts at no multiple of its item size.
        """
        array = self.tensors[name]
        dtype = DTYPES[array.dtype]
        views = [
            np.ndarray((nbytes // dtype.itemsize,), dtype, buffer=self.pages, offset=start)
            for start, nbytes in array.pieces
        ]
        whole = views[0] if len(views) == 1 else np.concatenate(views)
        selection: Index | EllipsisType = ... if index is None else index
        part = np.asarray(whole.reshape(array.shape)[selection])
        return part if part.flags.aligned else part.copy()


# -- scanning --------------------------------------------------------------------------------------


class _Malformed(Exception):
    """What is wrong, and where."""


class _Scanner:
    """Reads the headers of one file from its start to its end."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at, self._end, self._values = data, 0, len(data), 0

    def tree(self) -> dict[str, _Node]:
        """The whole file."""
        root = self._node("", 0)
        if not isinstance(root, dict):
            raise _Malformed("it holds one value; expected a map of names to arrays")
        if self._at != self._end:
            raise _Malformed(f"it goes on after its end, {self._end - self._at} bytes too long")
        return root

    def _node(self, path: str, depth: int) -> _Node:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise _Malformed(f"it holds more than {_MAX_VALUES:,} values")
        start, code = self._at, self._byte()
        if code & 0xF0 == 0x80 or code in _MAP:
            return self._map(path, depth, code)
        if code in _EXTENSION or code in _FIXED_EXTENSION:
            return self._extension(path, code)
        if code in (_FALSE, _TRUE):
            return code - _FALSE
        self._at = start
        return self._integer(f"at {path or 'its start'}")

    def _map(self, path: str, depth: int, code: int) -> dict[str, _Node]:
        if depth == _MAX_DEPTH:
            raise _Malformed(f"it has more than {_MAX_DEPTH} maps within one another")
        count = self._number(_MAP[code]) if code in _MAP else code & 0x0F
        if count > (self._end - self._at) // 2:  # a key and a value have a byte each
            raise _Malformed(f"a map at {path or 'its start'} says that it has {count} entries")
        table: dict[str, _Node] = {}
        for _ in range(count):
            key = self._string(f"a key of the map at {path or 'its start'}")
            inner = f"{path}/{key}" if path else key
            if len(inner) > _MAX_PATH:
                raise _Malformed(f"a name has more than {_MAX_PATH} characters")
            if key in table:
                raise _Malformed(f"it has {inner} twice")
            table[key] = self._node(inner, depth + 1)
        return table

    def _extension(self, path: str, code: int) -> MsgpackArray:
        size = _FIXED_EXTENSION.get(code) or self._number(_EXTENSION[code])
        kind = self._byte()
        end = self._at + size
        if end > self._end:
            raise _Malformed(f"{path} has {size} bytes, which go past the end of the file")
        if kind not in (_ARRAY, _SCALAR):
            raise _Malformed(f"{path} is an extension of type {kind}; expected an array")
        self._expect_list(3, path)
        shape = self._array_shape(path)
        dtype = self._string(f"the type of {path}")
        if dtype not in DTYPES:
            raise _Malformed(f"{path} is {dtype[:40]!r}; expected {', '.join(DTYPES)}")
        code = self._byte()
        if code not in _BINARY:
            raise _Malformed(f"{path} has no bytes where its content should be")
        nbytes = self._number(_BINARY[code])
        if self._at + nbytes != end or math.prod(shape) * DTYPES[dtype].itemsize != nbytes:
            raise _Malformed(f"{path} is {dtype} {shape} and has {nbytes} bytes")
        piece = (self._at, nbytes)
        self._at = end
        return MsgpackArray(dtype, shape, (piece,))

    def _expect_list(self, length: int, path: str) -> None:
        if self._byte() != 0x90 | length:
            raise _Malformed(f"{path} is not [shape, type, bytes]")

    def _array_shape(self, path: str) -> Shape:
        code = self._byte()
        if code & 0xF0 != 0x90 and code not in _LIST:
            raise _Malformed(f"{path} has no list where its shape should be")
        length = self._number(_LIST[code]) if code in _LIST else code & 0x0F
        if length > _MAX_DIMENSIONS:
            raise _Malformed(f"{path} has {length} axes; expected at most {_MAX_DIMENSIONS}")
        return tuple(self._integer(f"in the shape of {path}") for _ in range(length))

    def _integer(self, where: str) -> int:
        """A whole number from 0 up; all others are named and refused."""
        code = self._byte()
        if code < 0x80:
            return code
        if code in _UNSIGNED:
            return self._number(_UNSIGNED[code])
        if code in _SIGNED:
            value = int.from_bytes(self._bytes(_SIGNED[code]), "big", signed=True)
            if value >= 0:
                return value
        if code in _SIGNED or code >= 0xE0:
            raise _Malformed(f"there is a negative number {where}")
        raise _Malformed(f"there is a value {where} that is no array (0x{code:02x})")

    def _string(self, what: str) -> str:
        code = self._byte()
        if code & 0xE0 == 0xA0:
            length = code & 0x1F
        elif code in _STRING:
            length = self._number(_STRING[code])
        else:
            raise _Malformed(f"{what} is not a text (0x{code:02x})")
        if length > 4 * _MAX_PATH:
            raise _Malformed(f"{what} has {length} bytes")
        try:
            return str(self._bytes(length), "utf-8")
        except UnicodeDecodeError as error:
            raise _Malformed(f"{what} is not UTF-8") from error

    def _number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "big")

    def _byte(self) -> int:
        at = self._at
        if at == self._end:
            raise _Malformed(f"it ends after {at} bytes, in the middle of a value")
        self._at = at + 1
        return self._data[at]

    def _bytes(self, size: int) -> memoryview:
        start, self._at = self._at, self._at + size
        if self._at > self._end:
            raise _Malformed(f"it ends after {self._end} bytes, in the middle of a value")
        return self._data[start : self._at]


def _flat(tree: Mapping[str, _Node]) -> dict[str, MsgpackArray]:
    arrays: dict[str, MsgpackArray] = {}
    for name, array in _arrays(tree):
        if name in arrays:  # as the key "a/b", and as "b" in the map "a"
            raise _Malformed(f"it has {name} twice")
        arrays[name] = array
    return arrays


def _arrays(tree: Mapping[str, _Node], prefix: str = "") -> Iterator[tuple[str, MsgpackArray]]:
    """The arrays in a tree, under their keys from the root; chunks put together."""
    for key, node in tree.items():
        name = f"{prefix}{key}"
        if isinstance(node, dict) and _CHUNKED in node:
            node = _unchunked(name, node)
        if isinstance(node, dict):
            yield from _arrays(node, f"{name}/")
        elif isinstance(node, MsgpackArray):
            yield name, node
        else:
            raise _Malformed(f"{name} is a number; expected an array")


def _unchunked(name: str, node: Mapping[str, _Node]) -> MsgpackArray:
    shape, chunks = node.get(_SHAPE), node.get(_CHUNKS)
    if set(node) != {_CHUNKED, _SHAPE, _CHUNKS} or not isinstance(shape, dict):
        raise _Malformed(f"{name} is chunked and has not the parts of a chunked array")
    if not isinstance(chunks, dict) or not chunks or len(shape) > _MAX_DIMENSIONS:
        raise _Malformed(f"{name} is chunked and has no chunks")
    sizes = [shape.get(str(i)) for i in range(len(shape))]
    arrays = [chunks.get(str(i)) for i in range(len(chunks))]
    dims = tuple(size for size in sizes if isinstance(size, int))
    pieces = [array for array in arrays if isinstance(array, MsgpackArray)]
    if len(dims) < len(sizes) or len(pieces) < len(arrays):
        raise _Malformed(f"the chunks of {name} are not numbered from 0, or are no arrays")
    dtypes = {piece.dtype for piece in pieces}
    dtype = pieces[0].dtype
    nbytes = sum(piece.pieces[0][1] for piece in pieces)
    if len(dtypes) > 1 or math.prod(dims) * DTYPES[dtype].itemsize != nbytes:
        raise _Malformed(f"{name} is {dtype} {dims} and its chunks do not fit that")
    return MsgpackArray(dtype, dims, tuple(piece.pieces[0] for piece in pieces))


# -- writing ---------------------------------------------------------------------------------------


def write_msgpack(file: BinaryIO, weights: Weights, names: list[str]) -> Iterator[int]:
    """Write tensors as `flax.serialization.to_bytes` does, one in memory at a time.

    Args:
        file: where to.
        weights: the tensors.
        names: of those to write; "/" separates the keys of the maps.

    Yields:
        The number of bytes of each piece of tensor data.

    Raises:
        CheckpointError: a tensor reads as another than was announced.
    """
    tree: dict[str, object] = {}
    for name in names:
        *parents, last = name.split("/")
        table = tree
        for key in parents:
            inner = table.setdefault(key, {})
            assert isinstance(inner, dict)
            table = inner
        table[last] = name
    yield from _write_tree(file, weights, tree)


def _write_tree(file: BinaryIO, weights: Weights, tree: Mapping[str, object]) -> Iterator[int]:
    file.write(_map_header(len(tree)))
    for key, value in tree.items():
        file.write(_string_bytes(key))
        if isinstance(value, dict):
            yield from _write_tree(file, weights, value)
        else:
            yield from _write_tensor(file, weights, str(value))


def _write_tensor(file: BinaryIO, weights: Weights, name: str) -> Iterator[int]:
    array = weights.read(name)
    if array.shape != weights.shape(name) or array.dtype != DTYPES[weights.dtype(name)]:
        raise CheckpointError(
            f"{name} was announced as {weights.dtype(name)} {weights.shape(name)} and reads as "
            f"{array.dtype} {array.shape}; the reader of the source is wrong."
        )
    flat = np.ascontiguousarray(array).reshape(-1)
    if array.nbytes <= MAX_CHUNK_BYTES:
        yield from _write_array(file, array.shape, flat)
        return
    length = max(1, MAX_CHUNK_BYTES // array.dtype.itemsize)
    file.write(_map_header(3) + _string_bytes(_CHUNKED) + bytes([_TRUE]))
    file.write(_string_bytes(_SHAPE) + _map_header(array.ndim))
    for i, size in enumerate(array.shape):
        file.write(_string_bytes(str(i)) + _integer_bytes(size))
    starts = range(0, flat.size, length)
    file.write(_string_bytes(_CHUNKS) + _map_header(len(starts)))
    for i, start in enumerate(starts):
        file.write(_string_bytes(str(i)))
        chunk = flat[start : start + length]
        yield from _write_array(file, chunk.shape, chunk)


def _write_array(file: BinaryIO, shape: Shape, flat: np.ndarray) -> Iterator[int]:
    # The shortest header that there is for each length, as msgpack's own writers have it.
    head = b"\x93" + bytes([0x90 | len(shape)]) + b"".join(map(_integer_bytes, shape))
    head += _string_bytes(flat.dtype.name)
    head += _sized(_BINARY, flat.nbytes)
    size = len(head) + flat.nbytes
    fixed = {length: code for code, length in _FIXED_EXTENSION.items()}
    file.write((bytes([fixed[size]]) if size in fixed else _sized(_EXTENSION, size)) + b"\x01")
    file.write(head)
    data = flat.view(np.uint8)
    for i in range(0, data.size, _WRITTEN_AT_ONCE):
        yield file.write(data[i : i + _WRITTEN_AT_ONCE].data)


def _map_header(count: int) -> bytes:
    return bytes([0x80 | count]) if count < 16 else _sized(_MAP, count)


def _string_bytes(text: str) -> bytes:
    raw = text.encode()
    return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else _sized(_STRING, len(raw))) + raw


def _integer_bytes(value: int) -> bytes:
    return bytes([value]) if value < 128 else _sized(_UNSIGNED, value)


def _sized(codes: Mapping[int, int], value: int) -> bytes:
    """The first code whose number has bytes enough, and the number."""
    code, size = next(item for item in codes.items() if value < 1 << 8 * item[1])
    return bytes([code]) + value.to_bytes(size, "big")
