"""One safetensors file, mapped: what is in it, and views of its tensors without copying."""

from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

# Not used by name: its import makes bfloat16 a type that NumPy, and so safetensors, knows.
import ml_dtypes  # noqa: F401
import numpy as np
from safetensors import SafetensorError, safe_open

from gemma_hub.checkpoints.mapped_file import map_file
from gemma_hub.config import parse_json_object
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, Index, Shape

FORMAT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""The format's words for the types that a parameter may have."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: as the file has it.
        dtype: a key of `DTYPES`, or the format's own word for a type that a parameter cannot have.
        shape: as the file has it.
        start: offset of its first byte in the file.
        nbytes: its size.
        file: the file that holds it.
    """

    name: str
    dtype: str
    shape: Shape
    start: int
    nbytes: int
    file: "SafetensorsFile"

    def read(self, index: Index = None) -> np.ndarray:
        """The tensor, or the part that `index` selects: a view of the map, writable for the caller.

        Writing into it changes this process's pages only, never the file.
        """
        dtype = DTYPES[self.dtype]
        array = np.ndarray(self.shape, dtype, buffer=self.file.pages, offset=self.start)
        selection: Index | EllipsisType = ... if index is None else index
        part = np.asarray(array[selection])
        # Only files that this format's own writers did not make have tensors off their alignment.
        return part.copy() if self.start % dtype.itemsize else part

    def raw_bytes(self) -> np.ndarray:
        """The stored bytes, as a (nbytes,) uint8 view."""
        return np.ndarray((self.nbytes,), np.uint8, buffer=self.file.pages, offset=self.start)


class SafetensorsFile:
    """A safetensors file that was checked and mapped; no tensor is read until it is asked for.

    Attributes:
        path: the file.
        pages: the whole file, mapped copy-on-write. The map lives as long as a view of it does.
        tensors: {name in the file: tensor}.

    Raises:
        CheckpointError: the file is missing, cut short, or not in the safetensors format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(
                f"{path} is not a file; expected safetensors. Get the file again."
            )
        try:
            # The library checks the whole header: sizes, offsets, no gap and no overlap.
            with safe_open(path, framework="np"):
                pass
            with path.open("rb") as file:
                self.pages = map_file(file)
        except (SafetensorError, ValueError) as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({reason}). Get the file again."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be opened ({error.strerror or error})."
            ) from error
        length = int.from_bytes(self.pages[:8], "little")
        header = parse_json_object(
            self.pages[8 : 8 + length], f"The header of {path}", CheckpointError
        )
        header.pop("__metadata__", None)
        self.tensors = {
            name: StoredTensor(
                name=name,
                dtype=FORMAT_DTYPES.get(entry["dtype"], entry["dtype"]),
                shape=tuple(entry["shape"]),
                start=8 + length + entry["data_offsets"][0],
                nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                file=self,
            )
            for name, entry in header.items()
        }
