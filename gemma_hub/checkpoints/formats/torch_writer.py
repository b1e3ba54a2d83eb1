"""Writing files that `torch.load` reads, mapped or not, with weights_only. No torch here.

The archive is torch's own: nothing compressed, every record at a multiple of 64 bytes, the pickle
of protocol 2, and one storage for each tensor.
"""

import math
import struct
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from gemma_hub.checkpoints.formats import zip_records as z
from gemma_hub.checkpoints.formats.torch_file import (
    BYTE_ORDER,
    DATA,
    ORDERED_DICT,
    PICKLE,
    REBUILD,
    STORAGES,
    VERSION,
)
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, Shape, Weights

LARGE = z.FULL32
"""Sizes and offsets from this one on go to the zip64 fields."""
MAX_TENSORS = 5_000
"""In one file; the reader has a limit, too."""

_FOLDER = "archive"  # as in torch, where a file has no name
_ALIGNMENT = 64
_PADDING = b"FB"  # id of torch's extra field that holds nothing
_ZIP_VERSION = 45
_FIRST_DAY = 0x21  # of zip's calendar: the same bytes whenever they are written
_WRITTEN_AT_ONCE = 16 << 20  # bytes
_CLASSES = {dtype: name for name, dtype in STORAGES.items()}


def write_torch(
    file: BinaryIO, weights: Weights, names: Sequence[str], wrapper: str | None = None
) -> Iterator[int]:
    """Write {name: tensor} as `torch.save` does, one tensor in memory at a time.

    Args:
        file: where to; empty, and open for seeking.
        weights: the tensors.
        names: of those to write.
        wrapper: a key; the file then holds {wrapper: {name: tensor}}.

    Yields:
        The number of bytes of each piece of tensor data.

    Raises:
        CheckpointError: a tensor reads as another than was announced, or there are too many.
    """
    if len(names) > MAX_TENSORS:
        raise CheckpointError(
            f"{len(names):,} tensors are too many for one file, which holds {MAX_TENSORS:,}. "
            "Write several, by a smaller max_shard_bytes."
        )
    entries = [
        _written(file, PICKLE, _pickle(weights, names, wrapper)),
        _written(file, BYTE_ORDER, b"little"),
    ]
    for i, name in enumerate(names):
        size = nbytes(weights, name)
        entries.append((yield from _write_record(file, f"{DATA}{i}", size, _pieces(weights, name))))
    entries.append(_written(file, VERSION, b"3\n"))
    _write_directory(file, entries)


def nbytes(weights: Weights, name: str) -> int:
    """Size of a tensor in a file."""
    return math.prod(weights.shape(name)) * DTYPES[weights.dtype(name)].itemsize


def _pieces(weights: Weights, name: str) -> Iterator[memoryview]:
    """The bytes of a tensor, part by part."""
    array = weights.read(name)
    if array.shape != weights.shape(name) or array.dtype != DTYPES[weights.dtype(name)]:
        raise CheckpointError(
            f"{name} was announced as {weights.dtype(name)} {weights.shape(name)} and reads as "
            f"{array.dtype} {array.shape}; the reader of the source is wrong."
        )
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for i in range(0, data.size, _WRITTEN_AT_ONCE):
        yield data[i : i + _WRITTEN_AT_ONCE].data


# -- the archive -----------------------------------------------------------------------------------


def _written(file: BinaryIO, name: str, content: bytes) -> bytes:
    """Write a record at once; its entry in the directory."""
    writing = _write_record(file, name, len(content), [memoryview(content)])
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return bytes(end.value)


def _write_record(
    file: BinaryIO, name: str, size: int, pieces: Iterable[memoryview]
) -> Generator[int, None, bytes]:
    """Write a record, yielding the size of each piece; returns its entry in the directory."""
    path = f"{_FOLDER}/{name}".encode()
    start = file.tell()
    is_large = size >= LARGE
    shown = z.FULL32 if is_large else size
    extra = _numbers_field([size, size] if is_large else [])
    # The padding has a head of its own.
    padding = -(start + z.LOCAL.size + len(path) + len(extra) + 4) % _ALIGNMENT
    extra += _PADDING + struct.pack("<H", padding) + b"Z" * padding

    def header(crc: int) -> bytes:
        return z.LOCAL.pack(
            z.LOCAL_SIGNATURE, _ZIP_VERSION, 0, 0, 0, _FIRST_DAY, crc, shown, shown,
            len(path), len(extra),
        )  # fmt: skip

    file.write(header(0) + path + extra)
    crc = 0
    for piece in pieces:
        file.write(piece)
        crc = zlib.crc32(piece, crc)
        yield len(piece)
    end = file.tell()
    file.seek(start)
    file.write(header(crc))
    file.seek(end)
    return _entry(path, crc, size, start)


def _entry(path: bytes, crc: int, size: int, start: int) -> bytes:
    large = [number for number in (size, size, start) if number >= LARGE]
    sizes = [z.FULL32 if number >= LARGE else number for number in (size, size)]
    extra = _numbers_field(large)
    return (
        z.CENTRAL.pack(
            z.CENTRAL_SIGNATURE, _ZIP_VERSION, _ZIP_VERSION, 0, 0, 0, _FIRST_DAY, crc, *sizes,
            len(path), len(extra), 0, 0, 0, 0, z.FULL32 if start >= LARGE else start,
        )
        + path
        + extra
    )  # fmt: skip


def _numbers_field(numbers: Sequence[int]) -> bytes:
    """The extra field of zip64 with these numbers; nothing without any."""
    if not numbers:
        return b""
    return struct.pack(f"<2H{len(numbers)}Q", z.ZIP64_FIELD, 8 * len(numbers), *numbers)


def _write_directory(file: BinaryIO, entries: Sequence[bytes]) -> None:
    start, directory, count = file.tell(), b"".join(entries), len(entries)
    end = start + len(directory)
    file.write(directory)
    # The zip64 end is always there, as in torch's files.
    file.write(
        z.END64.pack(
            z.END64_SIGNATURE, z.END64.size - 12, _ZIP_VERSION, _ZIP_VERSION, 0, 0, count, count,
            len(directory), start,
        )
    )  # fmt: skip
    file.write(z.LOCATOR.pack(z.LOCATOR_SIGNATURE, 0, end, 1))
    shown = min(count, z.FULL16)
    place = z.FULL32 if start >= LARGE else start
    file.write(z.END.pack(z.END_SIGNATURE, 0, 0, shown, shown, len(directory), place, 0))


# -- the pickle ------------------------------------------------------------------------------------


def _pickle(weights: Weights, names: Sequence[str], wrapper: str | None) -> bytes:
    items = b"".join(
        _text(name) + _tensor(weights.shape(name), weights.dtype(name), str(i))
        for i, name in enumerate(names)
    )
    table = b"}(" + items + b"u"  # a dict, and what is in it
    if wrapper is not None:
        table = b"}" + _text(wrapper) + table + b"s"
    return b"\x80\x02" + table + b"."


def _tensor(shape: Shape, dtype: str, key: str) -> bytes:
    """A call of torch's function that makes a tensor of a storage."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    storage = _tuple(
        _text("storage"),
        _global(f"torch.{_CLASSES[dtype]}"),
        _text(key),
        _text("cpu"),
        _number(math.prod(shape)),
    )
    arguments = _tuple(
        storage + b"Q",  # what the persistent id stands for
        _number(0),
        _tuple(*map(_number, shape)),
        _tuple(*map(_number, strides)),
        b"\x89",  # False: it requires no gradient
        _global(ORDERED_DICT) + b")R",  # no hooks
    )
    return _global(REBUILD) + arguments + b"R"


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<L", len(raw)) + raw


def _number(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + bytes([value])
    if value < 1 << 31:
        return b"J" + struct.pack("<l", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()
