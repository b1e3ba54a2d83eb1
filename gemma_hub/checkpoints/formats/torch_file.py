"""One file of `torch.save`, mapped: what tensors it holds, and views of them. No torch here.

Such a file is a zip archive of one folder: data.pkl, a pickle of the saved value in which a tensor
is a call with the key of its storage, and data/KEY, the storage's bytes as they are. The pickle is
read by a machine that can make tensors and tables of them, and nothing else.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

import numpy as np

from gemma_hub.checkpoints.formats.restricted_pickle import (
    ForbiddenGlobal,
    Maker,
    MalformedPickle,
    read_pickle,
    shown,
)
from gemma_hub.checkpoints.formats.zip_records import MalformedZip, Record, read_records
from gemma_hub.checkpoints.mapped_file import map_path
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, Index, Shape

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
"""{class of torch: name of the type of its elements}."""
REBUILD = "torch._utils._rebuild_tensor_v2"
ORDERED_DICT = "collections.OrderedDict"
PICKLE, BYTE_ORDER, VERSION, DATA = "data.pkl", "byteorder", "version", "data/"

# No Gemma comes near these; the limits keep a damaged file from taking the time or the memory.
_MAX_PICKLE_BYTES = 8 << 20
_MAX_VALUES = 100_000
_MAX_DEPTH = 16
_MAX_DIMENSIONS = 16
_MAX_SIZE = 1 << 60  # of a tensor, where a size of 0 is not counted
_MAX_PATH = 512

_NEWEST_VERSION = 10  # as in torch itself, which writes 3
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin
_POINTER = b"version https://git-lfs"
# A record of TorchScript, whose directory is among so many last bytes.
_CONSTANTS, _END_BYTES = b"/constants.pkl", 64 << 10


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """One tensor of a file.

    Attributes:
        dtype: a key of `DTYPES`, or NumPy's word for another type.
        shape: of the tensor.
        strides: in elements, none negative.
        start: offset of its first element in the file.
    """

    dtype: str
    shape: Shape
    strides: tuple[int, ...]
    start: int


class TorchFile:
    """A file of `torch.save`, checked and mapped; no tensor is read until it is asked for.

    What is neither a tensor nor a table of them is left alone: numbers, texts, `_metadata`.

    Attributes:
        path: the file.
        pages: the whole file, mapped copy-on-write.
        tensors: {keys from the root, joined by "/": tensor}. A key may hold a "/" itself.

    Raises:
        CheckpointError: the file is missing, cut short, from another program, or holds code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pages = map_path(path, "one of torch.save")
        self._check_kind()
        try:
            self.tensors = self._read_tensors()
        except ForbiddenGlobal as error:
            raise CheckpointError(
                f"{path} refers to {error}, which is code; a file of weights needs only "
                f"{ORDERED_DICT} and what torch makes tensors of. Nothing was executed. If you "
                "trust the file, load it with torch, and torch.save its state_dict alone."
            ) from error
        except (MalformedZip, MalformedPickle) as error:
            raise CheckpointError(
                f"{path} is not a complete file of tensors as torch.save writes it: {error}. "
                "Get the file again."
            ) from error

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """A tensor, or the part of it that `index` selects: a view of the map.

        It is writable for the caller, and the file never changes. A copy where the part starts at
        no multiple of its item size.
        """
        tensor = self.tensors[name]
        dtype = numpy_dtype(tensor.dtype)
        array = np.ndarray(
            tensor.shape,
            dtype,
            buffer=self.pages,
            offset=tensor.start,
            strides=[stride * dtype.itemsize for stride in tensor.strides],
        )
        selection: Index | EllipsisType = ... if index is None else index
        part = np.asarray(array[selection])
        return part if part.flags.aligned else part.copy()

    def _check_kind(self) -> None:
        if self.pages[: len(_LEGACY)] == _LEGACY:
            raise CheckpointError(
                f"{self.path} is in the format of torch before 1.6. Rewrite it with torch: "
                "torch.save(torch.load(path, weights_only=True), path)."
            )
        if self.pages[: len(_POINTER)] == _POINTER:
            raise CheckpointError(
                f"{self.path} is a pointer of Git LFS, not the file itself. Get that with "
                "'git lfs pull'."
            )
        if self.pages.find(_CONSTANTS, max(0, len(self.pages) - _END_BYTES)) >= 0:
            raise CheckpointError(
                f"{self.path} is a TorchScript archive, which holds code. Load it with "
                "torch.jit.load, and torch.save the state_dict of what that returns."
            )

    def _read_tensors(self) -> dict[str, TorchTensor]:
        records = self._records()
        pickle = self._small(records[PICKLE], PICKLE, _MAX_PICKLE_BYTES)
        return _flat(read_pickle(pickle, _KNOWN, _Storages(records).find))

    def _records(self) -> dict[str, Record]:
        """{path in the archive's one folder: record}."""
        found = read_records(self.pages)
        folders = {name.partition("/")[0] for name in found}
        if len(folders) > 1:
            raise MalformedZip("its records are not in one folder")
        records = {name.partition("/")[2]: record for name, record in found.items()}
        for name in (PICKLE, VERSION):
            if name not in records:
                raise MalformedZip(f"it has no record {name}")
        version = self._small(records[VERSION], VERSION, 16).strip()
        if not version.isdigit() or not 1 <= int(version) <= _NEWEST_VERSION:
            raise MalformedZip(f"its version is {version!r}; expected 1 to {_NEWEST_VERSION}")
        if BYTE_ORDER in records:  # there since torch 2.1
            order = self._small(records[BYTE_ORDER], BYTE_ORDER, 16)
            if order != b"little":
                raise MalformedZip(f"its byte order is {order!r}; expected little-endian")
        return records

    def _small(self, record: Record, name: str, limit: int) -> bytes:
        """The content of a record other than a storage, checked against its checksum."""
        if record.size > limit:
            raise MalformedZip(f"its {name} has {record.size:,} bytes; expected {limit:,} at most")
        content = self.pages[record.start : record.start + record.size]
        if record.crc and zlib.crc32(content) != record.crc:
            raise MalformedZip(f"its {name} does not fit its checksum")
        return content


def numpy_dtype(name: str) -> np.dtype:
    """The type of that name."""
    return DTYPES.get(name) or np.dtype(name)


# -- what the pickle makes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _StorageType:
    """A class such as torch.FloatStorage, by the type of its elements."""

    dtype: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Elements of one type, `count` of them, from an offset in the file."""

    dtype: str
    start: int
    count: int


class _Storages:
    """Finds storages by persistent ids: ("storage", class, key, device, number of elements)."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self._records = records
        self._found: dict[str, _Storage] = {}

    def find(self, reference: object) -> _Storage:
        if not isinstance(reference, tuple) or len(reference) != 5:
            raise MalformedPickle("a reference in it is not one to a storage")
        word, kind, key, device, count = reference
        if word != "storage" or not isinstance(kind, _StorageType):
            raise MalformedPickle(f"a reference in it is to a {shown(word)}, not to a storage")
        if type(key) is not str or type(device) is not str or type(count) is not int:
            raise MalformedPickle("a reference in it to a storage lacks key, device or size")
        record = self._records.get(f"{DATA}{key}")
        if record is None:
            raise MalformedPickle(f"its storage {shown(key)} is not there")
        if count < 0 or count * numpy_dtype(kind.dtype).itemsize != record.size:
            raise MalformedPickle(
                f"its storage {shown(key)} has {record.size} bytes; expected {shown(count)} "
                f"elements of {kind.dtype}"
            )
        storage = _Storage(kind.dtype, record.start, count)
        if self._found.setdefault(key, storage) != storage:
            raise MalformedPickle(f"its storage {shown(key)} is said to be of two types")
        return storage


def _rebuilt(arguments: tuple[object, ...]) -> TorchTensor:
    """(storage, offset, shape, strides, requires_grad, hooks[, metadata]) as a tensor."""
    if len(arguments) not in (6, 7):
        raise MalformedPickle(f"a tensor in it is made of {len(arguments)} values; expected 6")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage):
        raise MalformedPickle(f"a tensor in it is made of a {shown(storage)}, not a storage")
    sizes, steps = _numbers(shape, "shape"), _numbers(strides, "strides")
    (first,) = _numbers((offset,), "offset")
    if len(sizes) != len(steps):
        raise MalformedPickle(f"a tensor in it has {len(sizes)} axes and {len(steps)} strides")
    if math.prod(max(size, 1) for size in sizes) > _MAX_SIZE:
        raise MalformedPickle("a tensor in it has a shape that no memory can hold")
    # An axis of one element is never stepped along, and neither is anything without elements.
    count = math.prod(sizes)
    steps = tuple(
        step if size > 1 and count else 0 for size, step in zip(sizes, steps, strict=True)
    )
    last = first + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if count > storage.count or (count and last >= storage.count) or first > storage.count:
        raise MalformedPickle(
            f"a tensor in it, {sizes} with strides {steps} from {first}, is larger than its "
            f"storage of {storage.count} elements"
        )
    itemsize = numpy_dtype(storage.dtype).itemsize
    return TorchTensor(storage.dtype, sizes, steps, storage.start + first * itemsize)


def _numbers(value: object, what: str) -> tuple[int, ...]:
    """A tuple of whole numbers from 0 up."""
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise MalformedPickle(f"the {what} of a tensor in it is no tuple, or too long")
    for number in value:
        if type(number) is not int or not 0 <= number <= _MAX_SIZE:
            raise MalformedPickle(f"the {what} of a tensor in it holds {shown(number)}")
    return value


def _parameter(arguments: tuple[object, ...]) -> TorchTensor:
    """(tensor, requires_grad, hooks) as the tensor."""
    tensor = arguments[0] if len(arguments) == 3 else None
    if not isinstance(tensor, TorchTensor):
        raise MalformedPickle("a parameter in it is not made of a tensor")
    return tensor


def _ordered_dict(arguments: tuple[object, ...]) -> dict[str, object]:
    if arguments:
        raise MalformedPickle(f"a dict in it is made of {len(arguments)} values; expected none")
    return {}


_MAKERS: Mapping[str, Callable[[tuple[object, ...]], object]] = {
    ORDERED_DICT: _ordered_dict,
    REBUILD: _rebuilt,
    "torch._utils._rebuild_parameter": _parameter,
}
_KNOWN: Mapping[str, object] = {
    **{name: Maker(name, make) for name, make in _MAKERS.items()},
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
}


def _flat(root: object) -> dict[str, TorchTensor]:
    """{keys from the root, joined by "/": tensor}."""
    if not isinstance(root, dict):
        raise MalformedPickle(f"it holds a {shown(root)}; expected a dict of names to tensors")
    tensors: dict[str, TorchTensor] = {}
    for name, value in _values(root):
        if name in tensors:  # as the key "a/b", and as "b" in the table "a"
            raise MalformedPickle(f"it has {name!r} twice")
        if isinstance(value, TorchTensor):
            tensors[name] = value
    return tensors


def _values(root: dict[object, object]) -> Iterator[tuple[str, object]]:
    """Every value under its path, tables included; an error where tables never end."""
    left: list[tuple[str, object, int]] = [("", root, 0)]
    count = 0
    while left:
        path, value, depth = left.pop()
        if depth:
            yield path, value
        if not isinstance(value, dict | list | tuple):
            continue
        count += len(value)
        if depth == _MAX_DEPTH or count > _MAX_VALUES:
            raise MalformedPickle(
                f"it has more than {_MAX_DEPTH} tables within one another, or more than "
                f"{_MAX_VALUES:,} values"
            )
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = [(f"{path}/{key}" if depth else str(key), item, depth + 1) for key, item in items]
        if any(len(name) > _MAX_PATH for name, _, _ in inner):
            raise MalformedPickle(f"a name in it has more than {_MAX_PATH} characters")
        left += reversed(inner)
