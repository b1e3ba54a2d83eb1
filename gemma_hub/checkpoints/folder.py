"""Which files of a folder are the checkpoint's weights, and whether they fit the index."""

import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemma_hub.config import read_json_object
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, first_ten

_OTHER_FORMATS = {
    ".bin": "PyTorch (pickle)",
    ".ckpt": "PyTorch (pickle)",
    ".pt": "PyTorch (pickle)",
    ".pth": "PyTorch (pickle)",
    ".gguf": "GGUF",
    ".msgpack": "Flax (msgpack)",
    ".h5": "Keras (HDF5)",
    ".ocdbt": "Orbax",
}
_WHOLE_FILES = (".gguf", ".ckpt")  # of which each alone is a checkpoint


@dataclass(frozen=True, slots=True)
class FileNames:
    """What the files of weights are called: one file, or an index and shards.

    Attributes:
        stem: of the single file, such as "model".
        suffix: of it and of every shard, such as ".safetensors".
    """

    stem: str
    suffix: str

    @property
    def single(self) -> str:
        return f"{self.stem}{self.suffix}"

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    def shards(self, count: int) -> list[str]:
        """The names of so many shards."""
        return [f"{self.stem}-{i + 1:05}-of-{count:05}{self.suffix}" for i in range(count)]

    def holds_weights(self, name: str) -> bool:
        """Whether this is the name of the single file, or of a shard."""
        stem, suffix = map(re.escape, (self.stem, self.suffix))
        return re.fullmatch(rf"{stem}(-\d+-of-\d+)?{suffix}", name) is not None

    def is_plain(self, name: str) -> bool:
        """Whether an index may name this file: one in its own folder, with the suffix."""
        return re.fullmatch(rf"[^/\\:\0]+{re.escape(self.suffix)}", name) is not None


SAFETENSORS = FileNames("model", ".safetensors")
SINGLE_FILE, INDEX_FILE = SAFETENSORS.single, SAFETENSORS.index


class TensorFile(Protocol):
    """A file that was opened: where it is, and {name: tensor} of what it holds."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that hold a checkpoint's weights.

    Attributes:
        paths: the files, sorted by name.
        index: {tensor name: file name} of a sharded checkpoint; None for a single file.
    """

    paths: tuple[Path, ...]
    index: Mapping[str, str] | None


def checkpoint_folder(path: str | Path) -> Path:
    """`path` as a folder that exists.

    Raises:
        CheckpointNotFoundError: there is nothing at `path`.
        CheckpointError: there is something else than a folder, or it cannot be read.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error.strerror}.") from error
        return folder
    if folder.suffix in _WHOLE_FILES and folder.is_file():
        raise CheckpointError(
            f"{folder} is a checkpoint in another format: {_OTHER_FORMATS[folder.suffix]}; "
            f"expected a folder with config.json and *.safetensors. {_convert(folder)}"
        )
    if folder.exists():
        raise CheckpointError(
            f"{folder} is a file; a checkpoint is a folder with config.json and *.safetensors. "
            f"Pass the folder, {folder.parent}."
        )
    hint = _nearest_sibling(folder)
    raise CheckpointNotFoundError(f"There is no checkpoint folder at {folder}. {hint}".rstrip())


def _nearest_sibling(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path.parent} does not exist either."
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    match = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"Did you mean {str(path.parent / match[0])!r}?" if match else ""


def weight_files(folder: Path, names: FileNames = SAFETENSORS) -> WeightFiles:
    """The weight files of a checkpoint folder.

    Raises:
        CheckpointNotFoundError: the folder holds no weights.
        CheckpointError: another format, a malformed index, or a file that the index does not name.
    """
    present = sorted(entry.name for entry in folder.iterdir())
    weights = [name for name in present if names.holds_weights(name)]
    if names.index in present:
        index = _read_index(folder / names.index, names)
        _check_index(folder / names.index, index, weights)
        shards = sorted(set(index.values()))
        return WeightFiles(tuple(folder / name for name in shards), index)
    if weights == [names.single]:
        return WeightFiles((folder / names.single,), None)
    if names.single in weights:
        shards = [name for name in weights if name != names.single]
        raise CheckpointError(
            f"{folder} holds {names.single} and shards ({first_ten(shards)}), and no "
            "index. Remove the ones that are left over from another save."
        )
    if weights:
        raise CheckpointError(
            f"{folder} holds shards ({first_ten(weights)}) and no {names.index}. Get that file too."
        )
    raise _no_weights(folder, present, names)


def is_weight_file(name: str) -> bool:
    """Whether a file of this name belongs to the weights: the single file, a shard, the index."""
    return name == INDEX_FILE or SAFETENSORS.holds_weights(name)


def _no_weights(folder: Path, present: list[str], names: FileNames) -> CheckpointError:
    needed = f"expected {names.single}, or {names.index} with its shards"
    if not present:
        return CheckpointNotFoundError(f"{folder} is an empty folder; {needed}.")
    others = [name for name in present if name.endswith(names.suffix)]
    if others:
        return CheckpointError(
            f"{folder} holds {first_ten(others)}; {needed}. Rename the file if it is the model."
        )
    for name in present if names == SAFETENSORS else ():
        other = _OTHER_FORMATS.get(Path(name).suffix)
        if other:
            source = folder / name if name.endswith(_WHOLE_FILES) else folder
            return CheckpointError(
                f"{folder} holds {name}, a checkpoint in another format: {other}; {needed}. "
                f"{_convert(source)}"
            )
    return CheckpointNotFoundError(f"{folder} holds no weights; {needed}.")


def _convert(source: Path) -> str:
    return (
        f"Make a folder of safetensors with 'gemma-hub convert {source} OUT', or open this one "
        "with Gemma.load, which reads every format."
    )


def _read_index(path: Path, names: FileNames) -> dict[str, str]:
    index = read_json_object(path, CheckpointError).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} has no weight_map of tensor names to files. Get it again.")
    for name, file in index.items():
        if not isinstance(file, str) or not names.is_plain(file):
            raise CheckpointError(
                f"{path} says that {name} is in {reprlib.repr(file)}; expected the plain name of a "
                f"*{names.suffix} file in the same folder. Nothing outside the folder is opened."
            )
    return index


def _check_index(path: Path, index: Mapping[str, str], weights: Iterable[str]) -> None:
    shards = set(index.values())
    problems = {
        "Missing": [name for name in shards if not _is_file(path.parent / name)],
        "There, and not in the index": [name for name in weights if name not in shards],
    }
    if any(problems.values()):
        raise CheckpointError(
            f"{path} and the files beside it do not fit.\n"
            + listing(problems)
            + "  Get the missing files, or remove those that are left over from another save."
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than a file can have
        return False


def check_index_against_files(
    folder: Path,
    index: Mapping[str, str] | None,
    files: Iterable[TensorFile],
    names: FileNames = SAFETENSORS,
) -> None:
    """Check that every tensor is where the index says, once, and that the index knows it.

    Raises:
        CheckpointError: listing every tensor that is not.
    """
    places: dict[str, list[str]] = {}
    for file in files:
        for name in file.tensors:
            places.setdefault(name, []).append(file.path.name)
    if index is None:
        return
    problems = {
        "In no file": [name for name in index if name not in places],
        "Not in the index": [name for name in places if name not in index],
        "In more than one file": [
            f"{name} ({', '.join(found)})" for name, found in places.items() if len(found) > 1
        ],
        "In another file": [
            f"{name} (in {places[name][0]}, not {file})"
            for name, file in index.items()
            if len(places.get(name, ())) == 1 and places[name][0] != file
        ],
    }
    if any(problems.values()):
        raise CheckpointError(
            f"{folder / names.index} does not fit the tensors in the files it names.\n"
            + listing(problems)
            + "  The index or a file is from another save; get all of them again."
        )


def listing(problems: Mapping[str, Iterable[str]]) -> str:
    """A line for each kind of problem that there is: its title, how many, and the first ten."""
    lists = {title: list(names) for title, names in problems.items()}
    return "".join(
        f"  {title} ({len(names)}): {first_ten(names)}.\n"
        for title, names in lists.items()
        if names
    )
