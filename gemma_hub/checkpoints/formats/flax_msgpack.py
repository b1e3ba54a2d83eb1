"""Transformers' Flax checkpoints: config.json and flax_model.msgpack, whole or in shards."""

import math
from dataclasses import replace
from pathlib import Path

from gemma_hub.checkpoints.description import stated_task
from gemma_hub.checkpoints.folder import (
    FileNames,
    check_index_against_files,
    checkpoint_folder,
    weight_files,
)
from gemma_hub.checkpoints.formats.interface import Opened, Progress, WriteOptions
from gemma_hub.checkpoints.formats.layout import (
    Layout,
    canonical_weights,
    stored_weights,
)
from gemma_hub.checkpoints.formats.msgpack_file import MsgpackFile, write_msgpack
from gemma_hub.checkpoints.formats.stated import companions, config_beside
from gemma_hub.checkpoints.formats.table import layout
from gemma_hub.checkpoints.mapped_file import FileWeights
from gemma_hub.checkpoints.output import flush, write_json
from gemma_hub.checkpoints.writer import split_into_shards, write_companions
from gemma_hub.config import CLASSIFICATIONS, GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.parameters import DTYPES, Weights

_FILES = FileNames("flax_model", ".msgpack")
_MAX_SHARD_BYTES = 10_000_000_000  # Transformers' default
_PREFIX = "model/"
# Of a base model's tree, which lacks the prefix.
_BARE = ("embed_tokens/", "layers/", "norm/")
_HEAD = "lm_head/kernel"
_ROPE_THETA = 10_000.0
# No Gemma comes near these; the limits keep a damaged folder from taking the time.
_MAX_LAYERS, _MAX_ARRAYS = 100, 10_000


class FlaxMsgpack:
    """Folders that FlaxGemmaForCausalLM and FlaxGemmaModel of Transformers 4 read and write."""

    name = "flax_msgpack"
    file_name: str | None = None
    layouts: tuple[str, ...] = ()

    def detect(self, path: Path) -> bool:
        """Whether the folder has weights under the names that this format has for them."""
        try:
            return any((path / name).is_file() for name in (_FILES.single, _FILES.index))
        except (OSError, ValueError):
            return False

    def open(self, path: Path, config: GemmaConfig | None = None) -> Opened:
        """Open the folder; see `CheckpointFormat`."""
        folder = checkpoint_folder(path)
        stored = FileWeights(_opened_files(folder))
        stated = config_beside(folder)
        if config is None and stated is None:
            raise CheckpointNotFoundError(
                f"There is no config.json of a Gemma in {folder}, and the shapes of the tensors "
                "do not tell the size of a head. Get that file too, or pass the model's config."
            )
        has_prefix = any(name.startswith(_PREFIX) for name in stored.names())
        task = stated_task(folder) if stated else ("causal_lm" if has_prefix else "base")
        if task in CLASSIFICATIONS:
            raise CheckpointError(
                f"{folder / 'config.json'} says that this is for {task}, which no Flax Gemma of "
                "Transformers has a head for. Write GemmaForCausalLM or GemmaModel in its "
                "architectures, whichever the weights are."
            )
        config = config or stated
        assert config is not None
        _check_size(folder, stored, config)
        is_other_head = task != "causal_lm" and _HEAD in stored.names()
        reason = f"the head of a causal language model, which the task {task!r} has no use for"
        weights, dropped = canonical_weights(
            str(folder),
            stored,
            _layout(is_bare=not has_prefix),
            config,
            task,
            dropped={_HEAD: reason} if is_other_head else {},
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
        """What Transformers' Flax classes do not have, or compute in one way only."""
        is_windowed = any(layer.window is not None for layer in config.layers)
        has_many_layers = config.num_hidden_layers > _MAX_LAYERS
        is_capped = (config.attn_logit_softcapping or config.final_logit_softcapping) is not None
        scale = config.query_pre_attn_scalar or config.head_dim
        reasons = {
            f"Transformers has no Flax Gemma for {task}; it has base and causal_lm.": (
                task in CLASSIFICATIONS
            ),
            "The mapping table has no place for attention biases.": config.attention_bias,
            "Its attention has no norm of queries and keys (use_qk_norm).": config.use_qk_norm,
            "It has no soft caps of logits.": is_capped,
            "It has no sliding windows.": is_windowed,
            f"Its norms multiply by 1 + weight, not by {config.rms_norm_offset:g} + weight.": (
                config.rms_norm_offset != 1.0
            ),
            f"Its attention scale is that of head_dim {config.head_dim}, not of "
            f"query_pre_attn_scalar {scale:g}.": scale != config.head_dim,
            f"It has {config.num_hidden_layers} layers; of this format, {_MAX_LAYERS} can be "
            "read.": has_many_layers,
            "It ignores rope_scaling.": config.rope_factor != 1.0,
            f"It computes with a RoPE base of {_ROPE_THETA:g} whatever config.json says; this "
            f"model's is {config.rope_theta:g}.": config.rope_theta != _ROPE_THETA,
            "It has no padded rows of the embedding: leave pad_vocab_to out.": (
                options.pad_vocab_to is not None
            ),
        }
        return tuple(text for text, applies in reasons.items() if applies)

    def tensors(self, opened: Opened, options: WriteOptions) -> Weights:
        """The arrays under their keys, joined by "/"."""
        column = _layout(is_bare=opened.task == "base")
        return stored_weights(opened.weights, column, opened.config, opened.task)

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
        weights = self.tensors(opened, options)
        write_companions(folder, opened.config, opened.weights, opened.task, opened.files)
        size = options.max_shard_bytes
        _write_weights(folder, weights, _MAX_SHARD_BYTES if size is None else size, progress)


def _layout(*, is_bare: bool) -> Layout:
    """The column of the table; the names in a base model's tree lack the prefix."""
    column = layout(FlaxMsgpack.name)
    if not is_bare:
        return column
    return {
        name: tuple(replace(place, name=place.name.removeprefix(_PREFIX)) for place in cell)
        for name, cell in column.items()
    }


# -- reading ---------------------------------------------------------------------------------------


def _opened_files(folder: Path) -> list[MsgpackFile]:
    """The weights' files of a folder, all of which fit the index if there is one.

    Raises:
        CheckpointError: a file is missing, damaged, or not what the index says.
    """
    found = weight_files(folder, _FILES)
    files = [MsgpackFile(path) for path in found.paths]
    check_index_against_files(folder, found.index, files, _FILES)
    return files


def _check_size(folder: Path, stored: FileWeights, config: GemmaConfig) -> None:
    count = len(stored.names())
    if config.num_hidden_layers > _MAX_LAYERS or count > _MAX_ARRAYS:
        raise CheckpointError(
            f"{folder} has {count:,} arrays, and its config {config.num_hidden_layers:,} layers; "
            f"expected at most {_MAX_ARRAYS:,} and {_MAX_LAYERS}. Check that the two belong "
            "together."
        )


# -- writing ---------------------------------------------------------------------------------------


def _write_weights(
    folder: Path, weights: Weights, max_shard_bytes: int, progress: Progress | None
) -> None:
    """The weights' files, and the index where there are several."""
    sizes = {
        name: math.prod(weights.shape(name)) * DTYPES[weights.dtype(name)].itemsize
        for name in weights.names()
    }
    shards = split_into_shards(sizes, max_shard_bytes)
    files = [_FILES.single] if len(shards) == 1 else _FILES.shards(len(shards))
    total, done = sum(sizes.values()), 0
    for name, shard in zip(files, shards, strict=True):
        with (folder / name).open("wb") as file:
            for written in write_msgpack(file, weights, shard):
                done += written
                if progress:
                    progress(done, total)
            flush(file)
    if len(shards) > 1:
        places = {array: f for f, shard in zip(files, shards, strict=True) for array in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / _FILES.index, index)
