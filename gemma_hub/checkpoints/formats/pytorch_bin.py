"""Transformers' former folders: config.json and pytorch_model.bin, whole or in shards."""

import math
from collections.abc import Set
from pathlib import Path

from gemma_hub.checkpoints.description import stated_task
from gemma_hub.checkpoints.folder import checkpoint_folder
from gemma_hub.checkpoints.formats.gemma_pytorch import has_fused_names
from gemma_hub.checkpoints.formats.interface import Opened, Progress, WriteOptions
from gemma_hub.checkpoints.formats.layout import Layout, Place, canonical_weights
from gemma_hub.checkpoints.formats.stated import companions, config_beside
from gemma_hub.checkpoints.formats.torch_file import numpy_dtype
from gemma_hub.checkpoints.formats.torch_folder import (
    TORCH_FILES,
    TorchWeights,
    check_number,
    open_files,
    write_files,
)
from gemma_hub.checkpoints.new_head import HEAD
from gemma_hub.checkpoints.reader import BUFFERS, EMBEDDING, OTHER_HEADS
from gemma_hub.checkpoints.writer import MAX_SHARD_BYTES, write_companions
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import SCORE_BIAS, SCORE_WEIGHT, Weights, parameter_axes

_LM_HEAD = "lm_head.weight"
_PREFIX, _FIRST_LAYER = "model.", "model.layers.0."
_COMPARED_AT_ONCE = 4 << 20  # bytes


class PytorchBin:
    """Folders that `save_pretrained` of Transformers 4 wrote with safe_serialization=False."""

    name = "pytorch_bin"
    file_name: str | None = None
    layouts: tuple[str, ...] = ()

    def detect(self, path: Path) -> bool:
        """Whether the folder has files of these names, and not those of gemma_pytorch in them."""
        try:
            names = (TORCH_FILES.single, TORCH_FILES.index)
            return any((path / name).is_file() for name in names) and not has_fused_names(path)
        except (OSError, ValueError):
            return False

    def open(self, path: Path, config: GemmaConfig | None = None) -> Opened:
        """Open the folder; see `CheckpointFormat`."""
        folder = checkpoint_folder(path)
        stored = open_files(folder)
        stated = config_beside(folder)
        if config is None and stated is None:
            raise CheckpointNotFoundError(
                f"There is no config.json of a Gemma in {folder}, and the shapes of the tensors "
                "do not tell the size of a head. Get that file too, or pass the model's config."
            )
        names = set(stored.names())
        task = stated_task(folder) if stated else _task_of(names)
        config = config or stated
        assert config is not None
        check_number(folder, names, config, task)
        weights, dropped = canonical_weights(
            str(folder),
            stored,
            _layout(config, task, names),
            config,
            task,
            dropped=_not_needed(str(folder), stored, config, task),
        )
        return Opened(
            path=folder,
            config=config,
            task=task,
            weights=weights,
            dropped=dropped,
            files=companions(folder),
        )

    def objections(self, config: GemmaConfig, task: str, options: WriteOptions) -> tuple[str, ...]:
        """It holds every model, and has no padded rows."""
        if options.pad_vocab_to is None:
            return ()
        return (
            f"Its embedding has one row for each of the {config.vocab_size} entries of the "
            f"vocabulary, and pad_vocab_to is {options.pad_vocab_to}. Leave that out.",
        )

    def tensors(self, opened: Opened, options: WriteOptions) -> Weights:
        """The parameters as they are: this format's names are the canonical ones."""
        return opened.weights

    def write(
        self,
        folder: Path,
        opened: Opened,
        options: WriteOptions,
        progress: Progress | None = None,
    ) -> None:
        """Write the folder; see `CheckpointFormat`."""
        if reasons := self.objections(opened.config, opened.task, options):
            raise CheckpointError(" ".join(reasons))
        write_companions(folder, opened.config, opened.weights, opened.task, opened.files)
        size = MAX_SHARD_BYTES if options.max_shard_bytes is None else options.max_shard_bytes
        write_files(folder, opened.weights, TORCH_FILES, size, progress)


# -- reading ---------------------------------------------------------------------------------------


def _task_of(names: Set[str]) -> str:
    """What a model without a config.json is for, by its head."""
    if SCORE_WEIGHT in names:
        return "token_classification" if SCORE_BIAS in names else "sequence_classification"
    return "causal_lm" if any(name.startswith(_PREFIX) for name in names) else "base"


def _layout(config: GemmaConfig, task: str, names: Set[str]) -> Layout:
    """Every parameter under its own name; without "model." in the file of a base model."""
    is_bare = not any(name.startswith(_PREFIX) for name in names)
    layout: dict[str, tuple[Place, ...]] = {}
    for name, axes in parameter_axes(config, task).items():
        if name.startswith(_FIRST_LAYER):
            name = name.removeprefix(_FIRST_LAYER)
            stored = f"{_PREFIX}layers.{{i}}.{name}"
        elif name.startswith(f"{_PREFIX}layers."):
            continue
        else:
            stored = name
        stored = stored.removeprefix(_PREFIX) if is_bare else stored
        layout[name] = (Place(stored, " ".join(axes)),)
    if _stored_embedding(config, names) == _LM_HEAD:
        layout[EMBEDDING] = (Place(_LM_HEAD, layout[EMBEDDING][0].axes),)
    return layout


def _stored_embedding(config: GemmaConfig, names: Set[str]) -> str | None:
    """The name that the embedding goes by; a tied one may be stored as the head only."""
    candidates = [EMBEDDING, EMBEDDING.removeprefix(_PREFIX)]
    if config.tie_word_embeddings:
        candidates.append(_LM_HEAD)
    return next((name for name in candidates if name in names), None)


def _not_needed(what: str, stored: TorchWeights, config: GemmaConfig, task: str) -> dict[str, str]:
    """{name: why it is no parameter of this model} of tensors that Transformers stores.

    Raises:
        CheckpointError: there is a head that differs from the embedding, which it is tied to.
    """
    names = stored.names()
    embedding = _stored_embedding(config, set(names))
    reasons = {
        name: "a constant that follows from the config" for name in names if name.endswith(BUFFERS)
    }
    for name in OTHER_HEADS[task]:
        if name in names and name != embedding:
            kind = "a classifier" if name in HEAD else "a causal language model"
            reasons[name] = f"the head of {kind}, which the task {task!r} has no use for"
    is_tied = task == "causal_lm" and config.tie_word_embeddings and _LM_HEAD in names
    if is_tied and embedding is not None and embedding != _LM_HEAD:
        if not _are_equal(stored, _LM_HEAD, embedding):
            raise CheckpointError(
                f"{what}: {_LM_HEAD} is not equal to the embedding that it is tied to. If the head "
                "was trained apart, set tie_word_embeddings to false in config.json; if not, "
                f"remove {_LM_HEAD}."
            )
        reasons[_LM_HEAD] = "a second copy of the embedding, which the head is tied to"
    return reasons


def _are_equal(stored: TorchWeights, one: str, other: str) -> bool:
    """Whether two tensors are bit for bit the same, without reading all of either at once."""
    if stored.is_same(one, other):
        return True
    shape = stored.shape(one)
    if shape != stored.shape(other) or stored.dtype(one) != stored.dtype(other) or not shape:
        return False
    row = max(1, math.prod(shape[1:]) * numpy_dtype(stored.dtype(one)).itemsize)
    rows = max(1, _COMPARED_AT_ONCE // row)
    return all(
        stored.read(one, slice(i, i + rows)).tobytes()
        == stored.read(other, slice(i, i + rows)).tobytes()
        for i in range(0, shape[0], rows)
    )
