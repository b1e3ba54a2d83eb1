"""describe_checkpoint: what a folder holds and what is wrong with it, without raising."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gemma_hub.checkpoints.folder import (
    check_index_against_files,
    checkpoint_folder,
    is_weight_file,
    weight_files,
)
from gemma_hub.checkpoints.reader import (
    EMBEDDING,
    canonical_tensors,
    check_tensors,
    read_eos_token_ids,
)
from gemma_hub.checkpoints.safetensors_file import SafetensorsFile
from gemma_hub.config import ARCHITECTURES, GemmaConfig, read_json_object
from gemma_hub.errors import ConfigError, GemmaHubError
from gemma_hub.parameters import Shape

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """One tensor: canonical name, shape, type, size in bytes, the file it is in, and its hash.

    The hash is that of `gemma_hub.conversion.tensor_hashes`; None until it is asked for.
    """

    name: str
    shape: Shape
    dtype: str
    nbytes: int
    file: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class FileDescription:
    """One file of the folder, and its size in bytes (of what it points to, for a link)."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """What is in a checkpoint folder.

    Attributes:
        path: the folder.
        config: the content of config.json as `GemmaConfig.to_dict` has it; None if unreadable.
        task: what config.json says that it is for, a key of `gemma_hub.config.ARCHITECTURES`;
            "causal_lm" where it does not say. Problems are those of opening it for this task.
        num_parameters: number of values in all tensors; a tied head counts once.
        dtype: type of the embedding; None if there is none.
        eos_token_ids: ids that end a text.
        tensors: in the order of their names.
        files: in the order of their names.
        problems: what is wrong, one text each; empty if the checkpoint can be opened.
        format: name of its format.
        notes: what had to be assumed of the model, and which tensors are no part of it.
    """

    path: str
    config: dict[str, Any] | None
    task: str
    num_parameters: int
    dtype: str | None
    eos_token_ids: tuple[int, ...]
    tensors: tuple[TensorDescription, ...]
    files: tuple[FileDescription, ...]
    problems: tuple[str, ...]
    format: str = "huggingface"
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        return dataclasses.asdict(self)


def describe_checkpoint(path: str | Path, allow_unknown: Sequence[str] = ()) -> Description:
    """Describe a checkpoint folder, whatever state it is in. No tensor is read.

    Args:
        path: the folder.
        allow_unknown: keys of config.json and names of tensors that are no problem.
    """
    problems: list[str] = []

    def attempt(action: Callable[..., T], *args: Any) -> T | None:
        try:
            return action(*args)
        except (GemmaHubError, OSError) as error:
            problems.append(str(error))
            return None

    folder = attempt(checkpoint_folder, path)
    if folder is None:
        return Description(str(path), None, "causal_lm", 0, None, (), (), (), tuple(problems))
    files = attempt(weight_files, folder)
    config = attempt(GemmaConfig.from_pretrained, folder, allow_unknown)
    task = stated_task(folder) if config else "causal_lm"
    # Where the index is wrong, the files beside it are still worth a look.
    paths = files.paths if files else _weight_paths(folder)
    opened = [file for p in paths if (file := attempt(SafetensorsFile, p))]
    if files and len(opened) == len(paths):
        attempt(check_index_against_files, folder, files.index, opened)
    tensors = attempt(canonical_tensors, opened, config) or {}
    if config and files:
        attempt(check_tensors, folder, config, tensors, allow_unknown, task)
    eos = attempt(read_eos_token_ids, folder, config) if config else None
    is_tied = config is not None and config.tie_word_embeddings
    return Description(
        path=str(folder),
        config=config.to_dict(task) if config else None,
        task=task,
        num_parameters=sum(
            math.prod(tensor.shape)
            for name, tensor in tensors.items()
            if not (is_tied and name == "lm_head.weight")
        ),
        dtype=tensors[EMBEDDING].dtype if EMBEDDING in tensors else None,
        eos_token_ids=eos or (),
        tensors=tuple(
            TensorDescription(name, t.shape, t.dtype, t.nbytes, t.file.path.name)
            for name, t in sorted(tensors.items())
        ),
        files=_files(folder),
        problems=tuple(problems),
    )


def stated_task(folder: Path) -> str:
    """The task of the class that config.json names in its architectures."""
    stated = read_json_object(folder / "config.json", ConfigError).get("architectures")
    names = stated if isinstance(stated, list) else []
    return next((task for task, name in ARCHITECTURES.items() if name in names), "causal_lm")


def _weight_paths(folder: Path) -> list[Path]:
    names = [entry for entry in sorted(folder.iterdir()) if entry.suffix == ".safetensors"]
    return [entry for entry in names if is_weight_file(entry.name) and entry.is_file()]


def _files(folder: Path) -> tuple[FileDescription, ...]:
    entries = (entry for entry in sorted(folder.iterdir()) if entry.is_file())
    return tuple(FileDescription(entry.name, entry.stat().st_size) for entry in entries)
