"""HDF5 files as Keras has them: scanned and mapped here for reading, laid out by h5py for writing.

libhdf5 is not asked to read a file: damaged ones make it crash, hang, take gigabytes of memory, or
open other files. Keras's files need little of the format, and the scan knows no more: a superblock
of version 0, groups with a symbol table, datasets in one unbroken stretch of bytes. Links by name,
chunks, filters, storage elsewhere and types by reference are refused. Every structure is read once,
and no two may share bytes, so there are no cycles. Names are those of HDF5's own specification.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from gemma_hub.checkpoints.formats.readers import needed
from gemma_hub.checkpoints.mapped_file import map_path
from gemma_hub.checkpoints.output import flush
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, Index, Shape, Weights

# No preset comes near these; the limits keep a damaged file from taking the time.
_MAX_STEPS = 120_000  # structures, messages and links; Keras has up to 500 a layer
_MAX_DEPTH = 16  # of groups within one another; Keras has 6
_MAX_NAME = 255  # bytes
_MAX_AXES = 32

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = 96  # bytes, the root group's entry included
_ENTRY = 40  # bytes of an entry of a symbol table node
_UNDEFINED = 2**64 - 1  # the address of what is not there

# Types of header messages.
_DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE = 0x01, 0x03, 0x08, 0x0C
_CONTINUATION, _SYMBOL_TABLE = 0x10, 0x11
_IGNORED = (0x00, 0x04, 0x05, 0x0D, 0x0E, 0x12)  # nothing, fill values, a comment, times of change
_REFUSED = {
    0x02: "links of HDF5's newer kind", 0x06: "links of HDF5's newer kind",
    0x07: "its values in another file", 0x0B: "a filter, such as compression",
    0x15: "attributes of HDF5's newer kind",
}  # fmt: skip
_SHARED = 0x02  # flag of a message whose content is elsewhere

_LAYOUTS = ("compact", "contiguous", "chunked", "virtual")  # by HDF5's numbers
_FLOAT, _TEXT, _OPAQUE, _VARIABLE = 1, 3, 5, 9  # classes of datatypes, as in _CLASSES
_CLASSES = (
    "integers", "floats of another kind", "times", "texts", "bit fields", "opaque", "compounds",
    "references", "enumerations", "variable lengths", "arrays", "complex numbers",
)  # fmt: skip
# {the datatype message without its first byte, which has the class: name}, little-endian IEEE.
_FLOATS = {
    bytes.fromhex("200f00 02000000 0000 1000 0a 05 00 0a 0f000000"): "float16",
    bytes.fromhex("201f00 04000000 0000 2000 17 08 00 17 7f000000"): "float32",
    bytes.fromhex("203f00 08000000 0000 4000 34 0b 00 34 ff030000"): "float64",
}
# HDF5 has no bfloat16. Keras stores two opaque bytes, and a text in this attribute.
_MARK = b"dtype\0"

_WRITTEN_AT_ONCE = 16 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Hdf5Tensor:
    """One dataset of a file.

    Attributes:
        dtype: a key of `DTYPES`, or a description of a type that a parameter cannot have.
        shape: as the file has it.
        start: offset of its first byte in the file.
        nbytes: its size.
    """

    dtype: str
    shape: Shape
    start: int
    nbytes: int


class Hdf5File:
    """An HDF5 file, checked and mapped; no tensor is read until it is asked for.

    Attributes:
        path: the file.
        pages: the whole file, mapped copy-on-write.
        tensors: {names from the root, joined by "/": tensor} of every dataset.

    Raises:
        CheckpointError: the file is missing, cut short or damaged, or stores something in another
            way than Keras does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pages = map_path(path, "HDF5")
        try:
            self.tensors = _Scanner(memoryview(self.pages)).tensors()
        except _Malformed as error:
            raise CheckpointError(
                f"{path} is not a complete HDF5 file as Keras writes it: {error}. Get the file "
                "again, or save it again with Keras."
            ) from error

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """A tensor, or the part that `index` selects: a view of the map, writable for the caller.

        Writing into it changes this process's pages only, never the file. A tensor that starts at
        no multiple of its item size is copied.
        """
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        array = np.ndarray(tensor.shape, dtype, buffer=self.pages, offset=tensor.start)
        selection: Index | EllipsisType = ... if index is None else index
        part = np.asarray(array[selection])
        return part if part.flags.aligned else part.copy()


# -- scanning --------------------------------------------------------------------------------------


class _Malformed(Exception):
    """What is wrong, and where."""


class _Scanner:
    """Walks the structures of one file from its root group."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._steps = data, 0
        self._taken: dict[int, tuple[int, str]] = {}  # {first byte: the one after the last, what}
        self._collections: dict[int, dict[int, memoryview]] = {}

    def tensors(self) -> dict[str, Hdf5Tensor]:
        """Every dataset under its path."""
        found: dict[str, Hdf5Tensor] = {}
        objects = [("", self._superblock(), 0)]
        while objects:
            path, address, depth = objects.pop()
            messages = self._messages(address, path)
            tables = [content for kind, content in messages if kind == _SYMBOL_TABLE]
            if not tables:
                found[path] = self._dataset(messages, path)
                continue
            if depth == _MAX_DEPTH:
                raise _Malformed(f"it has more than {_MAX_DEPTH} groups within one another")
            for name, link in self._links(tables[0], path).items():
                objects.append((f"{path}/{name}" if path else name, link, depth + 1))
        self._check_overlaps()
        return found

    def _superblock(self) -> int:
        """Address of the root group."""
        block = self._take(0, _SUPERBLOCK, "the superblock")
        _expect(block, _SIGNATURE, "it is a file")
        if block[8] != 0:
            raise _Malformed(f"its superblock is of version {block[8]}, expected 0")
        if (block[13], block[14]) != (8, 8):
            raise _Malformed("its addresses and lengths are not of 8 bytes")
        if _number(block, 24):
            raise _Malformed("it says that it begins elsewhere in the file (a user block)")
        end = _number(block, 40)
        if end != len(self._data):
            what = "cut short" if end > len(self._data) else "appended to"
            raise _Malformed(f"it was {what}: {len(self._data):,} bytes, not {end:,}")
        if _number(block, 48) != _UNDEFINED:
            raise _Malformed("it names a driver, as files in several parts do")
        return _number(block, 64)

    # -- objects -----------------------------------------------------------------------------------

    def _messages(self, address: int, path: str) -> list[tuple[int, memoryview]]:
        """(type, content) of what an object header says, where it matters."""
        what = f"the header of {path or 'the root group'}"
        prefix = self._take(address, 16, what)
        if prefix[0] != 1:
            raise _Malformed(f"{what} is not of version 1")
        blocks = [self._take(address + 16, _number(prefix, 8, 4), what)]
        messages: list[tuple[int, memoryview]] = []
        for block in blocks:  # a message may add another
            at = 0
            while at + 8 <= len(block):
                self._step()
                kind, size = _number(block, at, 2), _number(block, at + 2, 2)
                content, flags = block[at + 8 : at + 8 + size], block[at + 4]
                at += 8 + size
                if at > len(block):
                    raise _Malformed(f"{what} ends in the middle of a message")
                if kind in _IGNORED:
                    continue
                if kind in _REFUSED or flags & _SHARED:
                    raise _Malformed(f"{what} has {_REFUSED.get(kind, 'a part elsewhere')}")
                if kind == _CONTINUATION:
                    blocks.append(self._take(_number(content, 0), _number(content, 8), what))
                else:
                    messages.append((kind, content))
        single = [kind for kind, _ in messages if kind != _ATTRIBUTE]
        if sorted(single) not in ([_SYMBOL_TABLE], [_DATASPACE, _DATATYPE, _LAYOUT]):
            raise _Malformed(f"{what} is neither a group's nor a dataset's")
        return messages

    def _dataset(self, messages: list[tuple[int, memoryview]], path: str) -> Hdf5Tensor:
        parts = dict(messages)
        shape, layout = _shape(parts[_DATASPACE], path), parts[_LAYOUT]
        marks = [self._mark(content, path) for kind, content in messages if kind == _ATTRIBUTE]
        dtype, itemsize = _dtype(parts[_DATATYPE], [mark for mark in marks if mark is not None])
        version, kind = _number(layout, 0, 1), _number(layout, 1, 1)
        word = _LAYOUTS[kind] if kind < len(_LAYOUTS) else "unknown"
        if version != 3 or word != "contiguous":
            raise _Malformed(
                f"{path} has a {word} layout of version {version}, expected contiguous and 3"
            )
        start, nbytes = _number(layout, 2), _number(layout, 10)
        if start == _UNDEFINED:
            raise _Malformed(f"{path} has no values")
        if nbytes != math.prod(shape) * itemsize:
            raise _Malformed(f"{path} is {dtype} {shape} and has {nbytes} bytes")
        self._take(start, nbytes, path)
        return Hdf5Tensor(dtype, shape, start, nbytes)

    def _mark(self, attribute: memoryview, path: str) -> bytes | None:
        """The text in the attribute of that name; None for another attribute."""
        version = _number(attribute, 0, 1)
        sizes = [_number(attribute, at, 2) for at in (2, 4, 6)]  # name, datatype, dataspace
        if version not in (1, 3):
            raise _Malformed(f"{path} has an attribute of version {version}, expected 1 or 3")
        at, pieces = 8 if version == 1 else 9, []
        for size in sizes:
            pieces.append(attribute[at : at + size])
            at += -(-size // 8) * 8 if version == 1 else size
        name, datatype, dataspace = pieces
        if name != _MARK:
            return None
        value, kind = attribute[at:], _number(datatype, 0, 1) & 0x0F
        if kind == _VARIABLE and not _shape(dataspace, path):
            value = self._heap_object(_number(value, 4), _number(value, 12, 4))
        elif kind != _TEXT or _shape(dataspace, path):
            raise _Malformed(f"{path} has an attribute 'dtype' that is no text")
        return bytes(value[:_MAX_NAME]).rstrip(b"\0 ")

    # -- groups ------------------------------------------------------------------------------------

    def _links(self, table: memoryview, path: str) -> dict[str, int]:
        """{name: address of the object} in a group."""
        what = f"the links of {path or 'the root group'}"
        names = self._local_heap(_number(table, 8), what)
        links: dict[str, int] = {}
        for node in self._leaves(_number(table, 0), what):
            head = self._take(node, 8, what)
            _expect(head, b"SNOD\x01", f"{what} have a node")
            size = _number(head, 6, 2) * _ENTRY
            entries = self._take(node + 8, size, what)
            for at in range(0, size, _ENTRY):
                self._step()
                name = _name(names, _number(entries, at), what)
                if _number(entries, at + 16, 4) not in (0, 1):  # 2 is a link by name
                    raise _Malformed(f"{what} have {name!r}, which leads elsewhere by a name")
                if name in links:
                    raise _Malformed(f"{what} have {name!r} twice")
                links[name] = _number(entries, at + 8)
        return links

    def _leaves(self, address: int, what: str) -> list[int]:
        """Addresses of the symbol table nodes under a node of a B-tree."""
        head = self._take(address, 24, what)
        _expect(head, b"TREE\x00", f"{what} have a tree")
        nodes, level = [(address, head)], head[5]
        while True:
            children: list[int] = []
            for node, head in nodes:
                _expect(head, b"TREE\x00" + bytes([level]), f"{what} have a branch")
                # A key, and then a child and a key for each.
                pairs = self._take(node + 24, 8 + 16 * _number(head, 6, 2), what)
                self._step(len(pairs) // 16)
                children += [_number(pairs, at) for at in range(8, len(pairs), 16)]
            if level == 0:
                return children
            level -= 1
            nodes = [(child, self._take(child, 24, what)) for child in children]

    def _local_heap(self, address: int, what: str) -> memoryview:
        """The names of a group's links, one after another."""
        head = self._take(address, 32, what)
        _expect(head, b"HEAP\x00", f"{what} have a heap")
        return self._take(_number(head, 24), _number(head, 8), what)

    # -- pieces of the file ------------------------------------------------------------------------

    def _heap_object(self, address: int, index: int) -> memoryview:
        """An object of a global heap collection. Datasets share these, so they are kept."""
        if address not in self._collections:
            what = "a collection of texts"
            head = self._peek(address, 16, what)
            _expect(head, b"GCOL\x01", f"there is {what}")
            self._collections[address] = objects = {}
            heap, at = self._take(address, _number(head, 8), what), 16
            while at + 16 <= len(heap) and (number := _number(heap, at, 2)):
                self._step()
                size = _number(heap, at + 8)
                objects[number] = heap[at + 16 : at + 16 + size]
                at += 16 + -(-size // 8) * 8
        if index not in self._collections[address]:
            raise _Malformed(f"a collection of texts has no number {index}")
        return self._collections[address][index]

    def _take(self, start: int, size: int, what: str) -> memoryview:
        """Bytes that nothing else may take."""
        self._step()
        if start in self._taken:  # a cycle ends here
            raise _Malformed(f"{self._taken[start][1]} and {what} share bytes")
        self._taken[start] = start + size, what
        return self._peek(start, size, what)

    def _peek(self, start: int, size: int, what: str) -> memoryview:
        if start + size > len(self._data):
            raise _Malformed(f"{what} would end at byte {start + size:,} of {len(self._data):,}")
        return self._data[start : start + size]

    def _step(self, count: int = 1) -> None:
        self._steps += count
        if self._steps > _MAX_STEPS:
            raise _Malformed(f"it has more than {_MAX_STEPS:,} structures")

    def _check_overlaps(self) -> None:
        for (_, (stop, one)), (start, (_, other)) in itertools.pairwise(
            sorted(self._taken.items())
        ):
            if start < stop:
                raise _Malformed(f"{one} and {other} share bytes")


def _expect(block: memoryview, signature: bytes, what: str) -> None:
    if bytes(block[: len(signature)]) != signature:
        raise _Malformed(f"{what} that does not begin like one")


def _number(block: memoryview, at: int, size: int = 8) -> int:
    if at + size > len(block):
        raise _Malformed("a structure ends before a number that it should have")
    return int.from_bytes(block[at : at + size], "little")


def _name(names: memoryview, start: int, what: str) -> str:
    piece = bytes(names[start : start + _MAX_NAME + 1])
    content, end, _ = piece.partition(b"\0")
    try:
        name = content.decode("utf-8")
    except UnicodeDecodeError:
        name = ""
    if not end or "/" in name or name in ("", "."):
        raise _Malformed(f"{what} have a name that is none: {content[:40]!r}")
    return name


def _shape(dataspace: memoryview, path: str) -> Shape:
    version, rank = _number(dataspace, 0, 1), _number(dataspace, 1, 1)
    if version != 1 or rank > _MAX_AXES:
        raise _Malformed(f"{path} has a shape of version {version} with {rank} axes")
    return tuple(_number(dataspace, 8 + 8 * axis) for axis in range(rank))


def _dtype(datatype: memoryview, marks: list[bytes]) -> tuple[str, int]:
    """A type's name or description, and the bytes of an item."""
    kind, itemsize = _number(datatype, 0, 1) & 0x0F, _number(datatype, 4, 4)
    name = _FLOATS.get(bytes(datatype[1:20]), "") if kind == _FLOAT else ""
    if kind == _OPAQUE and itemsize == 2 and marks == [b"bfloat16"]:
        return "bfloat16", itemsize
    if not name:
        word = _CLASSES[kind] if kind < len(_CLASSES) else "something unknown"
        name = f"{word} of {itemsize} bytes"
    if marks:
        name += f", marked as {marks[0][:40].decode('ascii', 'replace')!r}"
    return name, itemsize


# -- writing ---------------------------------------------------------------------------------------


def write_hdf5(path: Path, weights: Weights, names: Sequence[str]) -> Iterator[int]:
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
