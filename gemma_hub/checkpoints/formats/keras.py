"""Keras presets of Gemma: the folders that keras-hub's `save_to_preset` writes."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma_hub.checkpoints.folder import listing
from gemma_hub.checkpoints.formats.hdf5_file import Hdf5File, write_hdf5
from gemma_hub.checkpoints.formats.interface import Opened, Progress, WriteOptions
from gemma_hub.checkpoints.formats.keras_config import (
    config_objections,
    preset_files,
    read_config,
)
from gemma_hub.checkpoints.formats.layout import canonical_weights, stored_weights
from gemma_hub.checkpoints.formats.readers import needed
from gemma_hub.checkpoints.formats.stated import COMPANIONS
from gemma_hub.checkpoints.formats.table import layout
from gemma_hub.checkpoints.mapped_file import FileWeights
from gemma_hub.checkpoints.output import copy_file, sync_folder, write_json
from gemma_hub.checkpoints.writer import split_into_shards
from gemma_hub.config import GemmaConfig, read_json_object
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, first_ten
from gemma_hub.parameters import DTYPES, Weights

SINGLE_FILE = "model.weights.h5"
INDEX_FILE = "model.weights.json"
MAX_SHARD_BYTES = 10 * 1024**3
"""keras-hub's own default."""
_TASK_WEIGHTS = "task.weights.h5"
_SHARD = re.compile(r"model_\d{5,9}\.weights\.h5")
_VOCABULARY = "assets/tokenizer/vocabulary.spm"
# Keras has a tokenizer.json of its own, so the Hugging Face files go where Keras does not look.
_OTHER_FILES = "assets/huggingface"
_TOKENIZER = "tokenizer.model"


class KerasPreset:
    """Presets of keras-hub's GemmaBackbone, in one file of weights or several."""

    name = "keras"
    file_name: str | None = None
    layouts: tuple[str, ...] = ()

    def detect(self, path: Path) -> bool:
        """Whether the folder has weights under the names that a preset has for them."""
        try:
            return any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)) or (
                path.name in (SINGLE_FILE, INDEX_FILE) and path.is_file()
            )
        except (OSError, ValueError):
            return False

    def open(self, path: Path, config: GemmaConfig | None = None) -> Opened:
        """Open a preset; a preset says all of itself but positions and ids."""
        folder = _folder(path)
        task, notes = "causal_lm", tuple[str, ...]()
        if config is None:
            config, task, notes = read_config(folder)
        if (folder / _TASK_WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder} has {_TASK_WEIGHTS}, weights of a head that first-generation Gemma does "
                "not have. Remove that file if the model without that head is wanted."
            )
        weights, dropped = canonical_weights(
            str(folder), FileWeights(_weight_files(folder)), layout(self.name), config, task
        )
        return Opened(
            path=folder,
            config=config,
            task=task,
            weights=weights,
            dropped=dropped,
            notes=notes,
            files=_companions(folder),
        )

    def objections(self, config: GemmaConfig, task: str, options: WriteOptions) -> tuple[str, ...]:
        """It holds what keras-hub's GemmaBackbone can be."""
        found = config_objections(config, task)
        if options.pad_vocab_to is not None:
            found += (
                f"Its embedding has one row for each of the {config.vocab_size} entries of the "
                f"vocabulary, and pad_vocab_to is {options.pad_vocab_to}. Leave that out.",
            )
        if options.layout is not None:
            found += (f"It has one layout, and {options.layout!r} is asked for. Leave that out.",)
        return found

    def tensors(self, opened: Opened, options: WriteOptions) -> Weights:
        """The variables under their paths in the HDF5 file."""
        if found := self.objections(opened.config, opened.task, options):
            raise CheckpointError(f"A Keras preset cannot hold this model. {' '.join(found)}")
        return stored_weights(opened.weights, layout(self.name), opened.config, opened.task)

    def write(
        self,
        folder: Path,
        opened: Opened,
        options: WriteOptions,
        progress: Progress | None = None,
    ) -> None:
        """Write a preset that keras-hub's `from_preset` loads; see `CheckpointFormat`."""
        stored = self.tensors(opened, options)
        needed("h5py", "keras")  # before anything is written
        dtype = _widest({stored.dtype(name) for name in stored.names()})
        contents = preset_files(
            opened.config, opened.task, dtype, has_tokenizer=_TOKENIZER in opened.files
        )
        for name, content in contents.items():
            write_json(folder / name, content)
        _write_companions(folder, opened.files)
        size = options.max_shard_bytes
        _write_weights(folder, stored, MAX_SHARD_BYTES if size is None else size, progress)


# -- reading ---------------------------------------------------------------------------------------


def _folder(path: Path) -> Path:
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is a file; a Keras preset is a folder with config.json and {SINGLE_FILE}. "
            f"Pass the folder, {path.parent}."
        )
    raise CheckpointNotFoundError(f"There is no Keras preset at {path}.")


def _weight_files(folder: Path) -> list[Hdf5File]:
    """The weights' files of a folder, all of which fit the index if there is one.

    Raises:
        CheckpointError: a file is missing, damaged, or not what the index says.
    """
    present = sorted(entry.name for entry in folder.iterdir())
    shards = [name for name in present if _SHARD.fullmatch(name)]
    if SINGLE_FILE in present:
        if others := [name for name in present if name == INDEX_FILE or name in shards]:
            raise CheckpointError(
                f"{folder} has both {SINGLE_FILE} and {first_ten(others)}. Remove what is left "
                "over from another save."
            )
        return [Hdf5File(folder / SINGLE_FILE)]
    if INDEX_FILE not in present:
        raise CheckpointNotFoundError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. Get the weights too."
        )
    index = folder / INDEX_FILE
    places = _read_index(index)
    named = {file for files in places.values() for file in files}
    problems = {
        "Missing": sorted(named.difference(present)),
        "There, and not in the index": [name for name in shards if name not in named],
    }
    _check_index(index, problems)
    files = [Hdf5File(folder / name) for name in sorted(named)]
    _check_index(index, _misplaced(places, files))
    return files


def _read_index(path: Path) -> dict[str, tuple[str, ...]]:
    """{path of a group of variables, without the "/" in front: files that it is in}."""
    stated = read_json_object(path, CheckpointError).get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise CheckpointError(f"{path} has no weight_map of variables to files. Get it again.")
    places: dict[str, tuple[str, ...]] = {}
    for name, files in stated.items():
        listed = files if isinstance(files, list) else [files]
        if not listed or not all(isinstance(f, str) and _SHARD.fullmatch(f) for f in listed):
            raise CheckpointError(
                f"{path} says that {name} is in {files!r}; expected a name such as "
                "'model_00000.weights.h5'. Nothing else is opened."
            )
        places[name.removeprefix("/")] = tuple(listed)
    return places


def _misplaced(
    places: Mapping[str, tuple[str, ...]], files: Sequence[Hdf5File]
) -> dict[str, list[str]]:
    """What is wrong with where the datasets are."""
    found = [(name, file.path.name) for file in files for name in file.tensors]
    groups = {name.rpartition("/")[0] for name, _ in found}
    counts = Counter(name for name, _ in found)
    return {
        "In no file": [group for group in places if group not in groups],
        "Not where the index says": [
            f"{name} (in {file})"
            for name, file in found
            if file not in places.get(name.rpartition("/")[0], ())
        ],
        "In more than one file": [name for name, count in counts.items() if count > 1],
    }


def _check_index(index: Path, problems: Mapping[str, list[str]]) -> None:
    if any(problems.values()):
        raise CheckpointError(
            f"{index} and the files beside it do not fit.\n"
            + listing(problems)
            + "  The index or a file is missing or from another save; get all of them again."
        )


def _companions(folder: Path) -> dict[str, Path]:
    """{name in a Hugging Face folder: file} of what belongs beside the weights."""
    files = {_TOKENIZER: folder / _VOCABULARY}
    files |= {name: folder / _OTHER_FILES / name for name in COMPANIONS if name != _TOKENIZER}
    return {name: path for name, path in files.items() if path.is_file()}


# -- writing ---------------------------------------------------------------------------------------


def _widest(dtypes: set[str]) -> str:
    """The variables' type in Keras, where all have one: it loses nothing of any of these."""
    if len(dtypes) == 1:
        return dtypes.pop()
    return "float64" if "float64" in dtypes else "float32"


def _write_companions(folder: Path, files: Mapping[str, Path]) -> None:
    for name, source in files.items():
        target = folder / (_VOCABULARY if name == _TOKENIZER else f"{_OTHER_FILES}/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, target)
        sync_folder(target.parent)
        sync_folder(target.parent.parent)


def _write_weights(
    folder: Path, stored: Weights, max_shard_bytes: int, progress: Progress | None
) -> None:
    """The weight files, and the index where there are several."""
    sizes = {
        name: math.prod(stored.shape(name)) * DTYPES[stored.dtype(name)].itemsize
        for name in stored.names()
    }
    shards = split_into_shards(sizes, max_shard_bytes)
    names = [f"model_{i:05}.weights.h5" for i in range(len(shards))]
    names = [SINGLE_FILE] if len(shards) == 1 else names
    total, done = sum(sizes.values()), 0
    for name, shard in zip(names, shards, strict=True):
        for written in write_hdf5(folder / name, stored, shard):
            done += written
            if progress:
                progress(done, total)
    if len(shards) > 1:
        places = {
            "/" + tensor.rpartition("/")[0]: name
            for name, shard in zip(names, shards, strict=True)
            for tensor in shard
        }
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})
