"""What the files of a pack are called, and how they are read and written."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from gemma_hub.checkpoints.output import flush

FORMAT, VERSION = "gemma_hub golden pack", 1

MANIFEST = "manifest.json"
README = "README.md"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INPUTS = "inputs.safetensors"
EXPECTED = "expected.safetensors"
NOISE = "noise.safetensors"

PER_VECTOR = ".vectors"
"""Ending of the names in noise.safetensors that hold one number for each vector."""


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, flushed to disk; the same arrays give the same bytes."""
    with path.open("wb") as file:
        file.write(save({name: np.ascontiguousarray(each) for name, each in arrays.items()}))
        flush(file)


def write_text(path: Path, text: str) -> None:
    """Write a text file, flushed to disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        flush(file)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder and its folders."""
    return sum(
        (Path(at) / name).stat().st_size for at, _, names in os.walk(folder) for name in names
    )
