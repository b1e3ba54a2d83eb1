"""Checkpoints of Google's gemma_pytorch: one *.ckpt, or a folder of shards with an index."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gemma_hub.checkpoints.description import stated_task
from gemma_hub.checkpoints.formats.interface import Opened, Progress, WriteOptions
from gemma_hub.checkpoints.formats.layout import StoredWeights, canonical_weights, stored_weights
from gemma_hub.checkpoints.formats.stated import companions, config_beside, config_from_sizes
from gemma_hub.checkpoints.formats.table import layout
from gemma_hub.checkpoints.formats.torch_file import TorchFile
from gemma_hub.checkpoints.formats.torch_folder import (
    TORCH_FILES,
    TorchWeights,
    begins_with_any,
    check_number,
    open_files,
    write_files,
)
from gemma_hub.checkpoints.formats.torch_writer import nbytes, write_torch
from gemma_hub.checkpoints.output import flush
from gemma_hub.checkpoints.writer import MAX_SHARD_BYTES, write_companions
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, first_ten
from gemma_hub.parameters import DTYPES, Index, Shape, Weights

_SUFFIX = ".ckpt"
_WRAPPER = "model_state_dict"
_SINGLE, _SHARDED = "single", "sharded"
_EMBEDDING, _SCALER = "embedder.weight", "_scaler"
_TABLES = {"freqs_cis", "local_freqs_cis", "global_freqs_cis"}
# Names that other files of torch.save do not have.
_MARKS = (b"qkv_proj.weight", b"embedder.weight")
_LATER = re.compile(r"pre_feedforward_layernorm|query_norm|siglip_vision_model|mm_")
_TASKS = ("causal_lm", "base")
_RELEASED = ("gemma-2b", "gemma-7b")  # every other one has these shapes, too
_ROPE_THETA = 10_000.0
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class GemmaPytorch:
    """What `load_weights` of gemma_pytorch reads; its int8 variants are read, not written."""

    name = "gemma_pytorch"
    file_name: str | None = "model.ckpt"
    layouts: tuple[str, ...] = (_SINGLE, _SHARDED)

    def detect(self, path: Path) -> bool:
        """Whether it is a *.ckpt, or holds tensors with the names that only gemma_pytorch has."""
        try:
            if path.is_dir():
                return bool(_checkpoints(path)) or has_fused_names(path)
            return path.is_file() and (path.suffix == _SUFFIX or _is_fused(path))
        except (OSError, ValueError):
            return False

    def open(self, path: Path, config: GemmaConfig | None = None) -> Opened:
        """Open a file or a folder; see `CheckpointFormat`."""
        tensors, dropped = _opened(path)
        stored = _Dequantised(str(path), tensors)
        names = stored.names()
        _check_generation(path, names)
        folder = path if path.is_dir() else path.parent
        stated = config_beside(folder)
        config, notes = config or stated, stored.notes
        if config is None:
            config, assumed = _released_config(path, stored)
            notes += assumed
        task = stated_task(folder) if stated else _TASKS[0]
        task = task if task in _TASKS else _TASKS[0]
        check_number(path, names, config, task)
        weights, left_out = canonical_weights(
            str(path),
            stored,
            layout(self.name),
            config,
            task,
            dropped=dict.fromkeys(_TABLES & {*names}, "a table that follows from the config"),
        )
        return Opened(
            path=path,
            config=config,
            task=task,
            weights=weights,
            dropped=dropped | left_out,
            notes=notes,
            files=companions(folder),
        )

    def objections(self, config: GemmaConfig, task: str, options: WriteOptions) -> tuple[str, ...]:
        """What gemma_pytorch's first-generation model does not have, or computes in one way."""
        heads, kind = config.num_attention_heads, options.layout
        is_windowed = any(layer.window is not None for layer in config.layers)
        reasons = {
            f"gemma_pytorch has causal language models only, and no head for {task}.": (
                task not in _TASKS
            ),
            "Its head is the embedding; this model has another.": not config.tie_word_embeddings,
            "Its attention has no biases.": config.attention_bias,
            "Its first-generation checkpoints have no norm of queries and keys.": (
                config.use_qk_norm
            ),
            f"Its norms multiply by 1 + weight, not by {config.rms_norm_offset:g} + weight.": (
                config.rms_norm_offset != 1.0
            ),
            "Its first-generation layers have no sliding windows.": is_windowed,
            "It does not scale the positions of RoPE.": config.rope_factor != 1.0,
            f"It computes with a RoPE base of {_ROPE_THETA:g}; this model's is "
            f"{config.rope_theta:g}.": config.rope_theta != _ROPE_THETA,
            f"It refuses a hidden size ({config.hidden_size}) that is no multiple of the number "
            f"of heads ({heads}).": config.hidden_size % heads != 0,
            f"The layout {_SINGLE!r} is one file, and max_shard_bytes is for {_SHARDED!r}.": (
                kind == _SINGLE and options.max_shard_bytes is not None
            ),
        }
        return tuple(text for text, applies in reasons.items() if applies)

    def tensors(self, opened: Opened, options: WriteOptions) -> StoredWeights:
        """The tensors of its state dict, without the tables that its constructor makes."""
        return stored_weights(
            opened.weights,
            layout(self.name),
            opened.config,
            opened.task,
            pad_vocab_to=options.pad_vocab_to,
        )

    def write(
        self,
        folder: Path,
        opened: Opened,
        options: WriteOptions,
        progress: Progress | None = None,
    ) -> None:
        """Write the checkpoint, and the files of a Hugging Face folder beside it."""
        if reasons := self.objections(opened.config, opened.task, options):
            raise CheckpointError(" ".join(reasons))
        weights = self.tensors(opened, options)
        total = sum(nbytes(weights, name) for name in weights.names())
        write_companions(folder, opened.config, opened.weights, opened.task, opened.files)
        size = MAX_SHARD_BYTES if options.max_shard_bytes is None else options.max_shard_bytes
        is_large = options.max_shard_bytes is not None and total > size
        if options.layout == _SHARDED or is_large:
            write_files(folder, weights, TORCH_FILES, size, progress, has_index=True)
            return
        assert self.file_name is not None
        done = 0
        with (folder / self.file_name).open("wb") as file:
            for written in write_torch(file, weights, weights.names(), _WRAPPER):
                done += written
                if progress:
                    progress(done, total)
            flush(file)


def has_fused_names(folder: Path) -> bool:
    """Whether files named as Transformers names them hold tensors of gemma_pytorch."""
    paths = [folder / name for name in (TORCH_FILES.index, TORCH_FILES.single)]
    return any(_is_fused(path) for path in paths if path.is_file())


def _is_fused(path: Path) -> bool:
    return begins_with_any(path, _MARKS)


# -- reading ---------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[str]:
    names = [entry.name for entry in folder.iterdir() if entry.suffix == _SUFFIX]
    return sorted(name for name in names if (folder / name).is_file())


def _opened(path: Path) -> tuple[TorchWeights, dict[str, str]]:
    """The tensors of the state dict, and why the other tensors of the file are none of it."""
    if not path.exists():
        raise CheckpointNotFoundError(f"There is no checkpoint at {path}.")
    if path.is_dir():
        present = (TORCH_FILES.index, TORCH_FILES.single)
        found = [*_checkpoints(path), *(name for name in present if (path / name).is_file())][:2]
        if not any(name.endswith(_SUFFIX) for name in found):
            return open_files(path), {}
        if len(found) > 1:
            raise CheckpointError(
                f"{path} holds several checkpoints: {first_ten(found)}. Give the path of one file, "
                "or remove what is left over."
            )
        path = path / found[0]
    file = TorchFile(path)
    start = f"{_WRAPPER}/"
    is_wrapped = any(name.startswith(start) for name in file.tensors)
    places, dropped = {}, {}
    for name in file.tensors:
        if is_wrapped and not name.startswith(start):
            dropped[name] = f"beside {_WRAPPER}, which alone is the model"
        else:
            places[name.removeprefix(start) if is_wrapped else name] = (file, name)
    return TorchWeights(places), dropped


class _Dequantised:
    """Tensors as gemma_pytorch computes with them: int8 times the scaler of the row, in float32.

    Attributes:
        notes: that this was done; empty if nothing is quantised.
    """

    def __init__(self, what: str, stored: TorchWeights) -> None:
        self._stored = stored
        there = set(stored.names())
        self._scaled = {
            name.removesuffix(_SCALER) for name in there if name.endswith(f".weight{_SCALER}")
        }
        self.notes: tuple[str, ...] = ()
        for name in sorted(self._scaled):
            scaler = f"{name}{_SCALER}"
            kind, rows = stored.dtype(scaler), stored.shape(scaler)
            is_int8 = name in there and stored.dtype(name) == "int8"
            if not is_int8 or rows != stored.shape(name)[:1] or kind not in DTYPES:
                raise CheckpointError(
                    f"{what}: {scaler} is {kind} {rows}; expected a floating-point number for each "
                    f"row of {name}, which is int8. Get the file again."
                )
        if self._scaled:
            self.notes = (
                f"{len(self._scaled)} of its tensors are quantised (int8) and are given in "
                "float32: the values that gemma_pytorch computes with, not those of the model "
                "before it was quantised.",
            )

    def names(self) -> tuple[str, ...]:
        scalers = {f"{name}{_SCALER}" for name in self._scaled}
        return tuple(name for name in self._stored.names() if name not in scalers)

    def shape(self, name: str) -> Shape:
        return self._stored.shape(name)

    def dtype(self, name: str) -> str:
        return "float32" if name in self._scaled else self._stored.dtype(name)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        part = self._stored.read(name, index)
        if name not in self._scaled:
            return part
        shape = self.shape(name)
        scaler = self._stored.read(f"{name}{_SCALER}").astype(np.float32)
        # The scaler of every element, of which the same part is taken; nothing is copied by this.
        every = np.broadcast_to(scaler.reshape(-1, *[1] * (len(shape) - 1)), shape)
        return np.asarray(part * (every if index is None else every[index]))


def _check_generation(path: Path, names: Iterable[str]) -> None:
    later = [name for name in names if _LATER.search(name)]
    if later:
        raise CheckpointError(
            f"{path} holds {first_ten(later)}, which are of a later generation; this version reads "
            "the first: Gemma 1, 1.1 and CodeGemma."
        )


def _released_config(path: Path, stored: Weights) -> tuple[GemmaConfig, tuple[str, ...]]:
    """The config of the released model that has these shapes.

    The queries, keys and values of a layer are one tensor, which does not tell how many heads there
    are; so a model of another shape must say it.
    """
    names = stored.names()

    def size(name: str, axis: int) -> int:
        shape = stored.shape(name) if name in names else ()
        return shape[axis] if len(shape) == 2 else 0

    first = "model.layers.0."
    found = (
        size(_EMBEDDING, 1),
        size(f"{first}mlp.gate_proj.weight", 0),
        sum(name.endswith(".qkv_proj.weight") for name in names),
        size(f"{first}self_attn.o_proj.weight", 1),
        size(f"{first}self_attn.qkv_proj.weight", 0),
    )
    for preset in _RELEASED:
        config = GemmaConfig.preset(preset)
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        if found == (D, F, L, N * H, (N + 2 * K) * H):
            sizes = {name: getattr(config, name) for name in _SIZES}
            rows = size(_EMBEDDING, 0)
            return config_from_sizes(path, embedding_rows=rows, sizes=sizes)
    raise CheckpointNotFoundError(
        f"There is no config.json of a Gemma beside the weights of {path}, and its tensors have "
        "the shapes of no released model, which would tell the number of heads. Put the model's "
        "config.json there, or pass its config."
    )
