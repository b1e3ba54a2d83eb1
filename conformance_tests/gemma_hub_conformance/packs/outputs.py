"""The outputs of the program under test: found, and checked against a pack before any is read."""

from collections.abc import Iterator
from pathlib import Path

from gemma_hub.checkpoints.safetensors_file import FORMAT_DTYPES, SafetensorsFile, StoredTensor
from gemma_hub.errors import CheckpointError, InputError, nearest
from gemma_hub_conformance.packs import format as pack
from gemma_hub_conformance.packs.catalogue import FLOATS, TensorSpec
from gemma_hub_conformance.packs.reading import Pack

Found = dict[str, dict[str, StoredTensor]]

_SUFFIX = ".safetensors"
_FLOAT_DTYPES = tuple(FORMAT_DTYPES.values())
_INTEGER_DTYPES = ("I32", "I64")


def find_outputs(path: str | Path, golden: Pack) -> Found:
    """{unit: {name: tensor}} of all outputs in a file or a folder; none of them is read.

    In a file UNIT.safetensors, and in every file of a folder UNIT, the names are those of the pack;
    in any other file they begin with "UNIT/".

    Raises:
        InputError: there is nothing, a file is damaged, or a tensor has a name, a shape or a type
            that the pack does not call for.
    """
    root = Path(path).expanduser()
    files = list(_files(root, golden))
    if not files:
        raise InputError(
            f"{root} holds no {_SUFFIX} files. Write outputs to UNIT{_SUFFIX}, where UNIT is one "
            f"of {', '.join(golden.units)}."
        )
    found: Found = {}
    for file, unit in files:
        try:
            tensors = SafetensorsFile(file).tensors
        except CheckpointError as error:
            raise InputError(str(error)) from error
        for stored, tensor in tensors.items():
            at, name = (unit, stored) if unit else _split(stored, file, golden)
            own = found.setdefault(at, {})
            if name in own:
                raise InputError(f"{name} of {at} is in {own[name].file.path} and in {file}.")
            own[name] = tensor
    for unit, tensors in found.items():
        _check(unit, tensors, golden.specs(unit))
    return found


def _files(root: Path, golden: Pack) -> Iterator[tuple[Path, str]]:
    """Each file with the unit that its tensors belong to, or "" where their names say it."""
    if (root / pack.MANIFEST).is_file():
        raise InputError(f"{root} is a golden pack itself; give what your program computed.")
    if not root.exists():
        raise InputError(f"There is no {root}; expected a folder or a {_SUFFIX} file of outputs.")
    if root.is_file():
        yield root, root.stem if root.stem in golden.units else ""
        return
    for file in sorted(root.glob(f"*{_SUFFIX}")):
        yield file, file.stem if file.stem in golden.units else ""
    for file in sorted(root.glob(f"*/*{_SUFFIX}")):
        unit = file.parent.name
        if unit not in golden.units:
            hint = nearest(unit, golden.units)
            raise InputError(f"{file.parent} is not called as a unit of the pack. {hint}".rstrip())
        yield file, unit


def _split(stored: str, file: Path, golden: Pack) -> tuple[str, str]:
    unit, slash, name = stored.partition("/")
    if not slash or unit not in golden.units:
        hint = nearest(unit if slash else file.stem, golden.units)
        raise InputError(
            f"{file} holds {stored!r}, which belongs to no unit of the pack. {hint}"
            f"{' ' if hint else ''}Call the file UNIT{_SUFFIX}, or the tensor UNIT/{stored}, with "
            f"UNIT one of {', '.join(golden.units)}."
        )
    return unit, name


def _check(unit: str, tensors: dict[str, StoredTensor], specs: dict[str, TensorSpec]) -> None:
    wrong = []
    for name, tensor in tensors.items():
        spec = specs.get(name)
        if spec is None:
            wrong.append(f"{name} is no tensor of the pack. {nearest(name, specs)}".rstrip())
            continue
        allowed = _FLOAT_DTYPES if spec.dtype == FLOATS else _INTEGER_DTYPES
        if tensor.shape != spec.shape:
            wrong.append(f"{name} has shape {tensor.shape}, expected {spec.shape}")
        elif tensor.dtype not in allowed:
            wrong.append(f"{name} is {tensor.dtype}, expected {', '.join(allowed)}")
    if wrong:
        raise InputError(
            f"The outputs of {unit} are not in the form of the pack, see its manifest: "
            f"{'; '.join(wrong[:10])}{f'; and {len(wrong) - 10} more' if len(wrong) > 10 else ''}"
        )
