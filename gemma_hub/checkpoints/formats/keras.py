"""Keras presets of Gemma: the folders that keras-hub's `save_to_preset` writes."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from gemma_hub.checkpoints.folder import listing
from gemma_hub.checkpoints.formats.hdf5_file import (
    Hdf5Tensor,
    Hdf5Weights,
    read_hdf5,
    write_hdf5,
)
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
from gemma_hub.checkpoints.output import copy_file, sync_folder, write_json
from gemma_hub.checkpoints.writer import split_into_shards
from gemma_hub.config import GemmaConfig, read_json_object
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import DTYPES, Weights

SINGLE_FILE = "model.weights.h5"
INDEX_FILE = "model.weights.json"
MAX_SHARD_BYTES = 10 * 1024**3
"""keras-hub's own default."""
_TASK_WEIGHTS = "task.weights.h5"
_SHARD = re.compile(r"model_\d+\.weights\.h5")
_PLAIN_NAME = re.compile(r"[^/\\:\0]+\.weights\.h5")
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
        needed("h5py", "keras")
        task, notes = "causal_lm", tuple[str, ...]()
        if config is None:
            config, task, notes = read_config(folder)
        if (folder / _TASK_WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder} has {_TASK_WEIGHTS}, weights of a head that first-generation Gemma does "
                "not have. Remove that file if the model without that head is wanted."
            )
        weights, dropped = canonical_weights(
            str(folder), _stored(folder, config), layout(self.name), config, task
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
        needed("h5py", "keras")
        dtype = _widest({stored.dtype(name) for name in stored.names()})
        contents = preset_files(
            opened.config, opened.task, dtype, has_tokenizer=_TOKENIZER in opened.files
        )
        for name, content in contents.items():
            write_json(folder / name, content)
        _write_companions(folder, opened.files)
        _write_weights(folder, stored, options.max_shard_bytes or MAX_SHARD_BYTES, progress)


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


def _stored(folder: Path, config: GemmaConfig) -> Hdf5Weights:
    """The variables of all weight files, each in the file that the index says."""
    most = 1000 + 100 * config.num_hidden_layers  # Keras has about 40 a layer
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    shards = sorted(entry.name for entry in folder.iterdir() if _SHARD.fullmatch(entry.name))
    if single.is_file() and (index.is_file() or shards):
        other = INDEX_FILE if index.is_file() else shards[0]
        raise CheckpointError(
            f"{folder} has both {SINGLE_FILE} and {other}. Remove the one that is left over from "
            "another save."
        )
    if single.is_file():
        return Hdf5Weights(read_hdf5(single, most))
    if not index.is_file():
        raise CheckpointNotFoundError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. Get the weights too."
        )
    places = _read_index(index)
    files = {file for listed in places.values() for file in listed}
    problems = {
        "Missing": [name for name in files if not (folder / name).is_file()],
        "There, and not in the index": [name for name in shards if name not in files],
    }
    _check_index(index, problems)
    return _joined(index, places, {f: read_hdf5(folder / f, most) for f in sorted(files)})


def _read_index(path: Path) -> dict[str, tuple[str, ...]]:
    """{path of a group of variables, without the "/" in front: files that it is in}."""
    stated = read_json_object(path, CheckpointError).get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise CheckpointError(f"{path} has no weight_map of variables to files. Get it again.")
    places: dict[str, tuple[str, ...]] = {}
    for name, files in stated.items():
        listed = files if isinstance(files, list) else [files]
        if not listed or not all(isinstance(f, str) and _PLAIN_NAME.fullmatch(f) for f in listed):
            raise CheckpointError(
                f"{path} says that {name} is in {files!r}; expected the plain name of a "
                "*.weights.h5 file in the same folder. Nothing outside the folder is opened."
            )
        places[name.removeprefix("/")] = tuple(listed)
    return places


def _joined(
    index: Path,
    places: Mapping[str, tuple[str, ...]],
    files: Mapping[str, Mapping[str, Hdf5Tensor]],
) -> Hdf5Weights:
    tensors: dict[str, Hdf5Tensor] = {}
    twice: list[str] = []
    elsewhere: list[str] = []
    for file, held in files.items():
        for name, tensor in held.items():
            group = name.rpartition("/")[0]
            if file not in places.get(group, ()):
                elsewhere.append(f"{name} (in {file})")
            if name in tensors:
                twice.append(name)
            tensors[name] = tensor
    groups = {name.rpartition("/")[0] for name in tensors}
    problems = {
        "In no file": [name for name in places if name not in groups],
        "In a file that the index does not name for it": elsewhere,
        "In more than one file": twice,
    }
    _check_index(index, problems)
    return Hdf5Weights(tensors)


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
