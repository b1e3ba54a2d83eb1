"""What one zarr array says of itself: the .zarray of version 2, the zarr.json of version 3.

Only what Orbax writes is known: a regular grid of chunks in C order, little-endian, compressed by
zstd or gzip or not at all, and in version 3 perhaps sharded. Everything else is refused, so that no
JSON of a checkpoint reaches the library that decodes the chunks without having been read here.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_hub.config import parse_json_object
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, Shape

METADATA_FILES = {".zarray": 2, "zarr.json": 3}
"""{name of the file that makes a folder an array: its version of zarr}."""

MAX_METADATA_BYTES = 16_384
"""More than any array of Orbax has: about 1,000."""

_DTYPES_2 = {"<f8": "float64", "<f4": "float32", "bfloat16": "bfloat16", "<f2": "float16"}
_COMPRESSIONS = ("zstd", "gzip")
_LARGEST = 1 << 40  # of a size in a shape
_MOST_AXES = 32


@dataclass(frozen=True, slots=True)
class ZarrArray:
    """One array.

    Attributes:
        name: of its folder, with "/" between the parts.
        version: of zarr, 2 or 3.
        shape: of the whole.
        dtype: a key of `DTYPES`, or the array's own word for a type that a parameter cannot have.
        chunks: shape of what one file, or one entry of a database, holds.
        is_raw: whether that is the values themselves in C order.
        separator: between the numbers in the key of a chunk.
    """

    name: str
    version: int
    shape: Shape
    dtype: str
    chunks: Shape
    is_raw: bool
    separator: str

    @property
    def number_of_chunks(self) -> int:
        return math.prod(self._grid)

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one chunk, decoded. Those at the end of an axis are as large as the others."""
        return math.prod(self.chunks) * DTYPES[self.dtype].itemsize

    def keys(self) -> Iterator[str]:
        """Of every chunk, in C order; one by one, as a grid can be said to be huge."""
        for number in range(self.number_of_chunks):
            cell: list[int] = []
            for size in reversed(self._grid):
                number, place = divmod(number, size)
                cell.insert(0, place)
            yield self.key(tuple(cell))

    def key(self, cell: Shape) -> str:
        """Of one chunk, by its place in the grid."""
        parts = [*map(str, cell)] if self.version == 2 else ["c", *map(str, cell)]
        return f"{self.name}/{self.separator.join(parts or ['0'])}"

    @property
    def _grid(self) -> Shape:
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))


def parse_array(name: str, version: int, content: bytes, where: str) -> ZarrArray:
    """An array out of the content of its metadata file.

    Args:
        name: of the array.
        version: of zarr.
        content: of the file.
        where: path of the checkpoint, for messages.

    Raises:
        CheckpointError: the content is no zarr metadata, or describes what is not read here.
    """
    what = f"The metadata of the array {name} in {where}"
    if len(content) > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"{what} has more than {MAX_METADATA_BYTES:,} bytes. Get the checkpoint again."
        )
    stated = parse_json_object(content, what, CheckpointError)
    try:
        return (_version_2 if version == 2 else _version_3)(name, stated)
    except _Refused as error:
        raise CheckpointError(
            f"{what} is not as Orbax writes it: {error}. Get the checkpoint again, or save it "
            "again with Orbax's own settings."
        ) from error


class _Refused(Exception):
    """What is wrong."""


def _version_2(name: str, stated: Mapping[str, Any]) -> ZarrArray:
    _expect(stated, "zarr_format", 2)
    _expect(stated, "order", "C")
    _expect(stated, "filters", None)
    shape, chunks = _shapes(stated.get("shape"), stated.get("chunks"))
    compressor = stated.get("compressor", "nothing")
    compression = compressor.get("id") if isinstance(compressor, dict) else compressor
    if compression is not None and compression not in _COMPRESSIONS:
        raise _Refused(f"its compressor is {_shown(compression)}; expected zstd, gzip or null")
    dtype = stated.get("dtype")
    return ZarrArray(
        name=name,
        version=2,
        shape=shape,
        dtype=_DTYPES_2.get(dtype, dtype[:40]) if isinstance(dtype, str) else _shown(dtype),
        chunks=chunks,
        is_raw=compression is None,
        separator=_separator(stated.get("dimension_separator", ".")),
    )


def _version_3(name: str, stated: Mapping[str, Any]) -> ZarrArray:
    _expect(stated, "zarr_format", 3)
    _expect(stated, "node_type", "array")
    grid = _settings(stated.get("chunk_grid"), "regular", "chunk_grid")
    shape, chunks = _shapes(stated.get("shape"), grid.get("chunk_shape"))
    encoding = stated.get("chunk_key_encoding")
    keys = _settings(encoding, "default", "chunk_key_encoding", optional=True)
    dtype = stated.get("data_type")
    return ZarrArray(
        name=name,
        version=3,
        shape=shape,
        dtype=dtype[:40] if isinstance(dtype, str) else _shown(dtype),
        chunks=chunks,
        is_raw=_check_codecs(stated.get("codecs"), chunks),
        separator=_separator(keys.get("separator", "/")),
    )


def _check_codecs(codecs: Any, chunks: Shape, *, is_shard: bool = False) -> bool:
    """Whether the codecs leave the values as they are; refused where they are others than known."""
    names = [c.get("name") if isinstance(c, dict) else c for c in _list(codecs, "codecs")]
    if names == ["sharding_indexed"] and not is_shard:
        settings = _settings(codecs[0], "sharding_indexed", "codecs")
        _, inner = _shapes(list(chunks), settings.get("chunk_shape"))
        if any(outer % size for outer, size in zip(chunks, inner, strict=True)):
            raise _Refused(f"its shards of {chunks} are not made up of chunks of {inner}")
        _check_codecs(settings.get("codecs"), inner, is_shard=True)
        index = settings.get("index_codecs")
        if [c.get("name") for c in _list(index, "index_codecs")] != ["bytes", "crc32c"]:
            raise _Refused("the index of a shard has other codecs than bytes and crc32c")
        return False
    if names not in (["bytes"], *(["bytes", name] for name in _COMPRESSIONS)):
        raise _Refused(f"its codecs are {_shown(names)}; expected bytes, and zstd or gzip")
    if _settings(codecs[0], "bytes", "codecs").get("endian") != "little":
        raise _Refused("its values are not little-endian")
    return len(names) == 1


def _shapes(shape: Any, chunks: Any) -> tuple[Shape, Shape]:
    for sizes in (shape, chunks):
        is_list = isinstance(sizes, list) and len(sizes) <= _MOST_AXES
        if not is_list or not all(type(n) is int and 0 < n <= _LARGEST for n in sizes):
            raise _Refused(f"a shape in it is {_shown(sizes)}; expected whole numbers from 1 up")
    # A larger chunk would be padding, which Orbax never writes, and could be padding without end.
    if len(shape) != len(chunks) or any(c > n for c, n in zip(chunks, shape, strict=True)):
        raise _Refused(f"its chunks are {_shown(chunks)} and its shape is {_shown(shape)}")
    return tuple(shape), tuple(chunks)


def _settings(value: Any, name: str, field: str, *, optional: bool = False) -> Mapping[str, Any]:
    """The configuration of {"name": ..., "configuration": {...}}."""
    if not isinstance(value, dict) or value.get("name") != name:
        raise _Refused(f"its {field} is {_shown(value)}; expected {name!r}")
    settings = value.get("configuration", {} if optional else None)
    if not isinstance(settings, dict):
        raise _Refused(f"its {field} has no configuration")
    return settings


def _separator(value: Any) -> str:
    if value not in (".", "/"):
        raise _Refused(f"the separator in its chunks' names is {_shown(value)}; expected . or /")
    return str(value)


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _Refused(f"its {field} are {_shown(value)}; expected a list of objects")
    return value


def _expect(stated: Mapping[str, Any], key: str, value: Any) -> None:
    found = stated.get(key)
    if type(found) is not type(value) or found != value:
        raise _Refused(f"its {key} is {_shown(found)}; expected {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
