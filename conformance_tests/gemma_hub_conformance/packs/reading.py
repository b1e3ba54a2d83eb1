"""A pack from disk, checked before anything is judged by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.checkpoints.safetensors_file import SafetensorsFile, StoredTensor
from gemma_hub.config import read_json_object
from gemma_hub.error_model import NoiseBand
from gemma_hub.errors import CheckpointError, InputError, first_ten
from gemma_hub_conformance.packs import format as pack
from gemma_hub_conformance.packs.catalogue import FLOATS, INTEGERS, TensorSpec

NUMPY = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32}
_VECTORS = ("token", "head", "whole", "exact")
_MOST_BYTES = 16 << 20  # of a manifest


@dataclass(frozen=True, slots=True)
class Unit:
    """One model in one type, with what is right about it.

    Attributes:
        name: of its folder.
        checkpoint: name of the model.
        dtype: compute type.
        mask: (B, T) bool, true at real tokens.
        specs: {name: tensor}, in order of computation.
        expected: {name: array}.
        bands: {name: noise}, of all but tokens.
    """

    name: str
    checkpoint: str
    dtype: str
    mask: np.ndarray
    specs: Mapping[str, TensorSpec]
    expected: Mapping[str, np.ndarray]
    bands: Mapping[str, NoiseBand]


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack whose manifest was read.

    Attributes:
        folder: where it is.
        units: {unit: its entry in the manifest}.
    """

    folder: Path
    units: Mapping[str, Mapping[str, Any]]

    def specs(self, name: str) -> dict[str, TensorSpec]:
        """{name: tensor} of one unit, in order of computation.

        Raises:
            InputError: the manifest is damaged.
        """
        try:
            found = [_spec(entry) for entry in self.units[name]["tensors"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.folder / pack.MANIFEST, f"unit {name}: {error!r}") from error
        return {spec.name: spec for spec in found}

    def unit(self, name: str) -> Unit:
        """One unit, its files checked by their hashes.

        Raises:
            InputError: a file is missing or damaged.
        """
        entry, folder, specs = self.units[name], self.folder / name, self.specs(name)
        _check_files(folder, entry)
        inputs, expected, noise = (
            SafetensorsFile(folder / file).tensors
            for file in (pack.INPUTS, pack.EXPECTED, pack.NOISE)
        )
        try:
            unit = Unit(
                name,
                str(entry["checkpoint"]),
                str(entry["dtype"]),
                array_of(inputs["attention_mask"]).astype(np.bool_),
                specs,
                {key: array_of(expected[key]) for key in specs},
                {key: _band(noise, key) for key, spec in specs.items() if spec.dtype == FLOATS},
            )
        except KeyError as error:
            raise _damaged(folder, f"there is no {error}") from error
        for key, spec in specs.items():
            if not _fits(unit, spec):
                raise _damaged(self.folder / pack.MANIFEST, f"{key} of {name} is otherwise")
        return unit


def read_pack(path: str | Path) -> Pack:
    """The pack in a folder; no tensor is read yet.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    folder = Path(path).expanduser()
    file = folder / pack.MANIFEST
    if not file.is_file():
        raise InputError(
            f"{folder} is no golden pack: it has no {pack.MANIFEST}. Make one with "
            f"`gemma-hub golden-pack {folder}`."
        )
    if file.stat().st_size > _MOST_BYTES:
        raise InputError(f"{file} has {file.stat().st_size:,} bytes; that is no manifest.")
    try:
        manifest = read_json_object(file, CheckpointError)
    except CheckpointError as error:
        raise _damaged(file, str(error)) from error
    if manifest.get("format") != pack.FORMAT:
        raise InputError(f"{file} is no manifest of a golden pack: its format is another.")
    if manifest.get("version") != pack.VERSION:
        raise InputError(
            f"{folder} has version {manifest.get('version')!r}; this program reads version "
            f"{pack.VERSION}. Make the pack again with it."
        )
    units = manifest.get("units")
    if not isinstance(units, dict) or not units:
        raise _damaged(file, "it has no units")
    for name, entry in units.items():
        if Path(name).name != name or not isinstance(entry, dict):
            raise _damaged(file, f"{name!r} is no unit")
    return Pack(folder, units)


def array_of(tensor: StoredTensor) -> np.ndarray:
    """A stored tensor of any type that outputs may have, as a view where it can be one."""
    if tensor.dtype not in NUMPY:
        return tensor.read()
    kind = np.dtype(NUMPY[tensor.dtype])
    stored = tensor.raw_bytes()
    if tensor.start % kind.itemsize:
        stored = stored.copy()
    return stored.view(kind).reshape(tensor.shape)


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    texts = [entry[key] for key in ("name", "dtype", "vectors", "what", "formula")]
    name, dtype, vectors, what, formula = texts
    shape = entry["shape"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a text of {name!r} is none")
    if dtype not in (FLOATS, INTEGERS) or vectors not in _VECTORS:
        raise ValueError(f"{name} is {dtype!r} and {vectors!r}")
    if not all(type(length) is int and length > 0 for length in shape):
        raise ValueError(f"{name} has the shape {shape!r}")
    return TensorSpec(name, dtype, tuple(shape), vectors, what, formula)


def _band(noise: Mapping[str, StoredTensor], name: str) -> NoiseBand:
    vectors = array_of(noise[name + pack.PER_VECTOR]).astype(np.float64)
    elements = array_of(noise[name]).astype(np.float64)
    return NoiseBand(float(np.sqrt(np.mean(np.square(vectors)))), vectors, elements, ())


def _fits(unit: Unit, spec: TensorSpec) -> bool:
    """Whether the files hold of a tensor what the manifest says."""
    array = unit.expected[spec.name]
    is_float = array.dtype == np.float64
    if array.shape != spec.shape or is_float != (spec.dtype == FLOATS):
        return False
    if spec.vectors == "exact" or not is_float:
        return not is_float and spec.vectors == "exact"
    if spec.vectors == "token" and spec.shape[:2] != unit.mask.shape:
        return False
    if spec.vectors == "head" and (len(spec.shape) != 4 or spec.shape[::2] != unit.mask.shape):
        return False
    band = unit.bands[spec.name]
    shape = spec.as_vectors(array, unit.mask).shape
    return band.element_rms.shape == shape and band.token_rms.shape == shape[:1]


def _check_files(folder: Path, entry: Mapping[str, Any]) -> None:
    """Every file is there, and what it was."""
    files = entry.get("files")
    needed = {pack.INPUTS, pack.EXPECTED, pack.NOISE, pack.WEIGHTS, pack.CONFIG}
    if not isinstance(files, dict) or not needed <= set(files):
        raise _damaged(folder.parent / pack.MANIFEST, f"{folder.name} has no list of its files")
    wrong = []
    for name, stated in files.items():
        file = folder / Path(name).name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif not isinstance(stated, dict) or file.stat().st_size != stated.get("bytes"):
            wrong.append(f"{name} has {file.stat().st_size:,} bytes")
        elif pack.sha256(file) != stated.get("sha256"):
            wrong.append(f"{name} has another hash")
    if wrong:
        raise _damaged(folder, first_ten(wrong))


def _damaged(path: Path, how: str) -> InputError:
    return InputError(f"{path} is damaged: {how}. Copy or make the pack again.")
