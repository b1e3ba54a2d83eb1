"""One GGUF file, mapped: its key-values, and views of its tensors without copying.

The reader of the gguf package takes the file's word for every number, and loops in Python over
every element of every array. This one believes nothing: each length is held against the bytes that
are left before it is used, so that a damaged or hostile file is an error at once.

The format, little-endian: "GGUF"; version; number of tensors; number of key-values; the
key-values; for each tensor its name, sizes (the fastest first), type and offset; padding to the
alignment; the tensors' data, to which the offsets are relative, one after another, each padded to
the alignment with zeros. Nothing else may be in the file, so that damage to its header, which has
no checksum, cannot move the tensors.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.checkpoints.formats.readers import needed
from gemma_hub.checkpoints.mapped_file import map_path
from gemma_hub.errors import CheckpointError, first_ten, nearest
from gemma_hub.parameters import DTYPES, Index, Shape

MAGIC = b"GGUF"
READ_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "float32"}
"""{the format's word for a type: the type its tensors are given in}."""

Value = str | int | float | bool | np.ndarray | list[bytes]
"""A text, a number, an array of numbers, or an array of texts, which are left as they are."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {  # {the format's number for a type of value: the type}
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_HEAD = struct.Struct("<4sIQQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_VERSIONS = (2, 3)
_Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", (32,))])

# More would be a damaged file; the limits keep such a file from taking time and memory.
_MAX_HEADER = 256 << 20  # bytes
_MAX_KEYS, _MAX_TEXTS = 10_000, 1_000_000
MAX_TENSORS = 1_000
_MAX_KEY, _MAX_NAME, _MAX_TEXT = 1_000, 250, 16 << 20  # bytes
_MAX_DIMENSIONS = 4
_ALIGNMENTS = tuple(2**n for n in range(3, 17))


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        kind: the format's word for its type, such as "Q8_0".
        shape: the slowest axis first, as everywhere but in the file.
        start: offset of its first byte in the file.
        nbytes: its size there.
    """

    kind: str
    shape: Shape
    start: int
    nbytes: int


class GgufFile:
    """A GGUF file that was checked and mapped: `Weights` under the names that it has itself.

    `read` gives views that are writable; what is written never reaches the file. Tensors of type
    Q8_0 are computed when they are read.

    Attributes:
        path: the file.
        metadata: its key-values.
        tensors: {name: tensor}.

    Raises:
        CheckpointError: the file is missing, cut short, not a GGUF, or one with tensors of a type
            that is not read; or the gguf package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = needed("gguf", "gguf")
        self._pages = map_path(path, "a GGUF")
        header = _Header(path, self._pages)
        self.metadata: Mapping[str, Value] = header.key_values()
        self.tensors = self._placed(header)

    def _placed(self, header: "_Header") -> dict[str, GgufTensor]:
        """The tensors, which fill the rest of the file."""
        types = {int(kind): kind.name for kind in self._gguf.GGMLQuantizationType}
        stated = header.tensors()
        unread = {
            f"{name} ({types.get(kind, f'number {kind}')})"
            for name, (_, kind, _) in stated.items()
            if types.get(kind) not in READ_TYPES
        }
        if unread:
            raise CheckpointError(
                f"{self.path} holds tensors of types that are not read: {first_ten(unread)}; "
                f"expected {', '.join(READ_TYPES)}. Get the model as a BF16 or F16 file; what was "
                "rounded to fewer bits cannot be turned back."
            )
        alignment = self._alignment()
        start = base = self._padding_end(header.position, alignment)
        tensors: dict[str, GgufTensor] = {}
        for name, (shape, kind, offset) in stated.items():
            block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(kind)]
            if shape[-1] % block:
                raise _damaged(self.path, f"{name} has rows of {shape[-1]}, no multiple of {block}")
            nbytes = math.prod(shape) // block * size
            if base + offset != start or start + nbytes > len(self._pages):
                raise _damaged(
                    self.path,
                    f"{name} would be {nbytes:,} bytes at {base + offset:,} of the file's "
                    f"{len(self._pages):,}; the tensor before it, padded to a multiple of "
                    f"{alignment}, ends at {start:,}",
                )
            tensors[name] = GgufTensor(types[kind], shape, start, nbytes)
            start = self._padding_end(start + nbytes, alignment)
        if len(self._pages) > start:
            raise _damaged(self.path, f"it goes on for {len(self._pages) - start:,} bytes too many")
        return tensors

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in _ALIGNMENTS:
            raise _damaged(
                self.path,
                f"general.alignment is {shown(alignment)}; expected a power of 2 from "
                f"{_ALIGNMENTS[0]} to {_ALIGNMENTS[-1]}",
            )
        return alignment

    def _padding_end(self, position: int, alignment: int) -> int:
        """The next multiple of the alignment, or the file's end; what is before it is zero."""
        end = -(-position // alignment) * alignment
        if any(self._pages[position:end]):
            raise _damaged(self.path, f"the padding at byte {position:,} is not zero")
        return end

    # -- Weights -----------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        return READ_TYPES[self._tensor(name).kind]

    def read(self, name: str, index: Index = None) -> np.ndarray:
        tensor = self._tensor(name)
        if tensor.kind == "Q8_0":
            return self._dequantised(tensor, index)
        dtype = DTYPES[READ_TYPES[tensor.kind]]
        array = np.ndarray(tensor.shape, dtype, buffer=self._pages, offset=tensor.start)
        return array if index is None else np.asarray(array[index])

    def raw_bytes(self, name: str) -> np.ndarray:
        """The stored bytes, as a uint8 view."""
        tensor = self._tensor(name)
        return np.ndarray((tensor.nbytes,), np.uint8, buffer=self._pages, offset=tensor.start)

    def _dequantised(self, tensor: GgufTensor, index: Index) -> np.ndarray:
        """Q8_0: each 32 values of a row are one float16 scale times 32 int8, in float32."""
        shape = (*tensor.shape[:-1], tensor.shape[-1] // 32)
        blocks = np.ndarray(shape, _Q8_0_BLOCK, buffer=self._pages, offset=tensor.start)
        values = blocks["values"].astype(np.float32)
        with np.errstate(all="ignore"):  # a damaged scale is an infinity, as it is in a float
            values *= blocks["scale"].astype(np.float32)[..., np.newaxis]
        values = values.reshape(tensor.shape)
        return values if index is None else np.asarray(values[index])

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self.tensors:
            hint = nearest(name, self.tensors)
            raise CheckpointError(f"{self.path} has no tensor {name!r}. {hint}".rstrip())
        return self.tensors[name]


class _Header:
    """What is before the tensors' data, read from front to back.

    Attributes:
        position: of the next byte.
    """

    def __init__(self, path: Path, pages: mmap) -> None:
        self._path, self._pages = path, pages
        self._end = min(len(pages), _MAX_HEADER)
        self._texts_left = _MAX_TEXTS
        self.position = 0
        magic, version, self._n_tensors, self._n_keys = _HEAD.unpack_from(
            pages, self._taken(_HEAD.size)
        )
        if magic != MAGIC:
            raise _damaged(path, f"it starts with {magic!r}, not {MAGIC!r}")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "it is big-endian" if swapped else f"its version is {version}"
            raise CheckpointError(
                f"{path}: {what}; expected a little-endian GGUF of version 2 or 3. Convert it "
                "with the tools of a current llama.cpp."
            )
        if self._n_keys > _MAX_KEYS or self._n_tensors > MAX_TENSORS:
            raise _damaged(
                path, f"it announces {self._n_keys:,} key-values and {self._n_tensors:,} tensors"
            )

    def key_values(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for _ in range(self._n_keys):
            key = self._text(_MAX_KEY)
            if key in values:
                raise _damaged(self._path, f"the key {key!r} is there twice")
            values[key] = self._value(key, self._number(_U32))
        return values

    def tensors(self) -> dict[str, tuple[Shape, int, int]]:
        """{name: (shape, number of its type, offset)}, after the key-values."""
        tensors: dict[str, tuple[Shape, int, int]] = {}
        for _ in range(self._n_tensors):
            name = self._text(_MAX_NAME)
            dimensions = self._number(_U32)
            if name in tensors or not 1 <= dimensions <= _MAX_DIMENSIONS:
                problem = "is there twice" if name in tensors else f"has {dimensions} dimensions"
                raise _damaged(self._path, f"the tensor {name!r} {problem}")
            sizes = [self._number(_U64) for _ in range(dimensions)]
            # Past this, sizes would not fit the numbers that NumPy counts with.
            if not all(sizes) or math.prod(sizes) >= 2**56:
                raise _damaged(self._path, f"the tensor {name!r} has the sizes {sizes}")
            tensors[name] = tuple(reversed(sizes)), self._number(_U32), self._number(_U64)
        return tensors

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._text(_MAX_TEXT)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            raise _damaged(self._path, f"{key!r} has a value of the unknown type {kind}")
        value: Any = np.frombuffer(
            self._pages, _NUMBERS[kind], 1, self._taken(np.dtype(_NUMBERS[kind]).itemsize)
        )[0].item()
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Value:
        kind, count = self._number(_U32), self._number(_U64)
        if kind == _STRING:
            return self._texts(key, count)
        if kind not in _NUMBERS:
            raise _damaged(self._path, f"{key!r} is an array of the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._pages, dtype, count, self._taken(count * dtype.itemsize))

    def _texts(self, key: str, count: int) -> list[bytes]:
        self._texts_left -= count
        if self._texts_left < 0:
            raise _damaged(self._path, f"{key!r} would have {count:,} texts")
        # There are 256,000 of them in a vocabulary, so that no call is made for each.
        pages, position, length = self._pages, self.position, _U64.unpack_from
        texts: list[bytes] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length(pages, position)[0]
                if position > self._end:
                    break
                texts.append(pages[start:position])
        except struct.error:
            position = self._end + 1
        self._taken(position - self.position)
        return texts

    def _text(self, most: int) -> str:
        size = self._number(_U64)
        start = self._taken(size)
        if size > most:
            raise _damaged(self._path, f"there is a text of {size:,} bytes at byte {start:,}")
        try:
            return self._pages[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _damaged(self._path, f"the text at byte {start:,} is not UTF-8") from error

    def _number(self, form: struct.Struct) -> int:
        value: int = form.unpack_from(self._pages, self._taken(form.size))[0]
        return value

    def _taken(self, size: int) -> int:
        """Position of the next `size` bytes, which are there."""
        start = self.position
        if size > self._end - start:
            raise _damaged(self._path, f"its header goes on for {size:,} bytes at byte {start:,}")
        self.position = start + size
        return start


def shown(value: Value | None) -> str:
    """A value in words for a message, however long it is."""
    if isinstance(value, np.ndarray | list):
        return f"an array of {len(value):,}"
    if isinstance(value, str) and len(value) > 80:
        return f"{value[:80]!r}..."
    return repr(value)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a complete GGUF file ({what}). Get the file again.")
