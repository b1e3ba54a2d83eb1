"""Orbax folders of Google's JAX library gemma: nested, flat or stacked trees of arrays."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from gemma_hub.checkpoints.description import stated_task
from gemma_hub.checkpoints.formats.interface import Opened, Progress, WriteOptions
from gemma_hub.checkpoints.formats.layout import Layout, canonical_weights, stored_weights
from gemma_hub.checkpoints.formats.orbax_files import (
    check_tree,
    checkpoint_folder,
    find_checkpoints,
    total_bytes,
    write_arrays,
)
from gemma_hub.checkpoints.formats.stated import companions, config_beside, config_from_sizes
from gemma_hub.checkpoints.formats.table import layout, stacked
from gemma_hub.checkpoints.formats.tensorstore_file import StoredArrays, ZarrFolder
from gemma_hub.checkpoints.writer import write_companions
from gemma_hub.config import CLASSIFICATIONS, GemmaConfig
from gemma_hub.errors import CheckpointError, first_ten
from gemma_hub.parameters import Shape, Weights

_EMBEDDING = "embedder/input_embedding"
_LAYER, _STACK = "layer_{i}", "stacked_layers/attention_type_0"
_PREFIX = "transformer/"  # of the flat and the stacked trees that Google wrote
# In a nested tree these are arrays; in the others each is a dictionary with the array as its "w".
_BARE = ("mlp/gating_einsum", "mlp/linear")
_TOKENIZER = "tokenizer.model"
# Beside the parameters in a checkpoint that a training wrote.
_TRAINING = {"opt_state", "collections", "step"}
_ROPE_THETA, _NORM_EPS = 10_000.0, 1e-6


class Orbax:
    """Orbax checkpoints of DeepMind's first Gemma: OCDBT or files, zarr 2 or 3, old or new."""

    name = "orbax"
    file_name: str | None = None
    layouts: tuple[str, ...] = ("nested", "flat", "stacked")

    def detect(self, path: Path) -> bool:
        """Whether there is a tree of arrays in the folder, or in a folder of it."""
        try:
            return path.is_dir() and bool(find_checkpoints(path))
        except (OSError, ValueError):
            return False

    def open(self, path: Path, config: GemmaConfig | None = None) -> Opened:
        """Open the folder, or the one checkpoint in it; see `CheckpointFormat`."""
        path = path.expanduser()
        folder = checkpoint_folder(path)
        arrays = ZarrFolder(folder)
        check_tree(folder, arrays.files, arrays.versions)
        names, dropped = _canonical_names(folder, arrays.versions)
        stored = StoredArrays(
            arrays, {name: arrays.array(source) for name, source in names.items()}
        )
        is_stacked = any(name.startswith("stacked_layers/") for name in names)
        stated = next((place for place in (folder, path) if config_beside(place)), None)
        task, notes = "causal_lm", tuple[str, ...]()
        if stated:
            task = _checked_task(stated)
            config = config or config_beside(stated)
        if config is None:
            config, notes = _config_from_shapes(folder, stored, is_stacked=is_stacked)
        weights, padding = canonical_weights(
            str(folder),
            stored,
            _column(is_stacked=is_stacked),
            config,
            task,
            advice="Check that they are a first-generation Gemma's, and that the config is theirs.",
        )
        stored.check()
        return Opened(
            path=folder,
            config=config,
            task=task,
            weights=weights,
            dropped=dropped | padding,
            notes=notes,
            files=_companions(folder, path),
        )

    def objections(self, config: GemmaConfig, task: str, options: WriteOptions) -> tuple[str, ...]:
        """What DeepMind's first Gemma does not have, or computes in one way only."""
        is_windowed = any(layer.window is not None for layer in config.layers)
        is_capped = (config.attn_logit_softcapping or config.final_logit_softcapping) is not None
        scale = config.query_pre_attn_scalar or config.head_dim
        rows = options.pad_vocab_to
        reasons = {
            f"DeepMind's library has no Gemma for {task}; it has base and causal_lm.": (
                task in CLASSIFICATIONS
            ),
            "Its attention has no biases.": config.attention_bias,
            "Its first generation has no norm of queries and keys (use_qk_norm).": (
                config.use_qk_norm
            ),
            "Its first generation has no soft caps of logits.": is_capped,
            "Its first generation has no sliding windows.": is_windowed,
            "Its head is the embedding; this model's (tie_word_embeddings) is not.": (
                not config.tie_word_embeddings
            ),
            f"Its norms multiply by 1 + weight, not by {config.rms_norm_offset:g} + weight.": (
                config.rms_norm_offset != 1.0
            ),
            f"Its norms have an epsilon of {_NORM_EPS:g}, not {config.rms_norm_eps:g}.": (
                config.rms_norm_eps != _NORM_EPS
            ),
            f"Its attention scale is that of head_dim {config.head_dim}, not of "
            f"query_pre_attn_scalar {scale:g}.": scale != config.head_dim,
            "Its first generation has no rope_scaling.": config.rope_factor != 1.0,
            f"Its RoPE base is {_ROPE_THETA:g}, not {config.rope_theta:g}.": (
                config.rope_theta != _ROPE_THETA
            ),
            f"pad_vocab_to is {rows} and the vocabulary has {config.vocab_size} entries; expected "
            "at least as many.": rows is not None and rows < config.vocab_size,
            f"It has no layout {options.layout!r}. Known: {', '.join(self.layouts)}.": (
                options.layout is not None and options.layout not in self.layouts
            ),
        }
        return tuple(text for text, applies in reasons.items() if applies)

    def tensors(self, opened: Opened, options: WriteOptions) -> Weights:
        """The arrays under their keys, joined by "/"."""
        return stored_weights(
            opened.weights,
            _written_column(options.layout or self.layouts[0]),
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
        """Write the folder; see `CheckpointFormat`."""
        if reasons := self.objections(opened.config, opened.task, options):
            raise CheckpointError(" ".join(reasons))
        weights = self.tensors(opened, options)
        write_companions(folder, opened.config, opened.weights, opened.task, opened.files)
        is_nested = options.layout in (None, "nested")
        keys = {
            name: tuple(name.split("/") if is_nested else name.rsplit("/", 1))
            for name in weights.names()
        }
        done, total = 0, total_bytes(weights)
        for written in write_arrays(folder, weights, keys):
            done += written
            if progress:
                progress(done, total)


# -- names -----------------------------------------------------------------------------------------


def _canonical_names(folder: Path, arrays: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """{name as in the table: array's} and {name of what is not the model's: why it is dropped}.

    Raises:
        CheckpointError: there is not one embedding, or two arrays are called the same.
    """
    paths = {array: "/".join(re.split("[./]", array)) for array in sorted(arrays)}
    is_training = any(path.startswith("params/") for path in paths.values())
    dropped = {
        path: "state of the training, which is no part of the model"
        for path in paths.values()
        if is_training and path.partition("/")[0] in _TRAINING
    }
    kept = {array: path for array, path in paths.items() if path not in dropped}
    embeddings = [path for path in kept.values() if f"/{path}".endswith(f"/{_EMBEDDING}")]
    if len(embeddings) != 1:
        raise CheckpointError(
            f"{folder} holds {first_ten(embeddings) or first_ten(kept.values()) or 'no arrays'}; "
            f"expected the tree of one Gemma, which has one array {_EMBEDDING}."
        )
    prefix = embeddings[0].removesuffix(_EMBEDDING)
    names: dict[str, str] = {}
    for array, path in kept.items():
        name = path.removeprefix(prefix)
        name = f"{name}/w" if name.endswith(_BARE) else name
        if name in names:
            raise CheckpointError(f"{folder} has {name} twice, as {names[name]} and {array}.")
        names[name] = array
    return names, dropped


def _column(*, is_stacked: bool) -> Layout:
    column = layout(Orbax.name)
    return stacked(column, _LAYER, _STACK) if is_stacked else column


def _written_column(name: str) -> Layout:
    """The places in a tree of one of our layouts, all its keys joined by "/"."""

    def renamed(stored: str) -> str:
        if name != "nested":
            return _PREFIX + stored
        bare = stored.removesuffix("/w")
        return bare if bare.endswith(_BARE) else stored

    column = _column(is_stacked=name == "stacked")
    return {
        parameter: tuple(replace(place, name=renamed(place.name)) for place in cell)
        for parameter, cell in column.items()
    }


# -- the config and the files beside ---------------------------------------------------------------


def _checked_task(folder: Path) -> str:
    """What config.json says that the model is for, if this format has it."""
    task = stated_task(folder)
    if task in CLASSIFICATIONS:
        raise CheckpointError(
            f"{folder / 'config.json'} says that this is for {task}, which DeepMind's library has "
            "no head for. Write GemmaForCausalLM or GemmaModel in its architectures."
        )
    return task


def _config_from_shapes(
    folder: Path, stored: StoredArrays, *, is_stacked: bool
) -> tuple[GemmaConfig, tuple[str, ...]]:
    """What the shapes tell: all sizes are axes of some array."""
    first = _STACK if is_stacked else _LAYER.format(i=0)

    def shape(name: str, rank: int) -> Shape:
        full = stored.shape(name)
        if len(full) != rank:
            raise CheckpointError(
                f"{folder}: {name} is {full}; expected {rank} axes. Is it another model's?"
            )
        return full

    def of_layer(name: str, rank: int) -> Shape:
        full = shape(f"{first}/{name}", rank + is_stacked)
        return full[1:] if is_stacked else full

    norm = f"{first}/pre_attention_norm/scale"
    missing = [
        name
        for name in (norm, f"{first}/attn/attn_vec_einsum/w", f"{first}/mlp/linear/w")
        if name not in stored.names()
    ]
    if missing:
        raise CheckpointError(
            f"{folder} has no config.json, and lacks {first_ten(missing)}, which would tell the "
            "sizes. Get what is missing, or pass the model's config."
        )
    heads, head_dim, _ = of_layer("attn/attn_vec_einsum/w", 3)
    has_groups = f"{first}/attn/kv_einsum/w" in stored.names()
    rows, hidden_size = shape(_EMBEDDING, 2)
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": of_layer("mlp/linear/w", 2)[0],
        "num_hidden_layers": shape(norm, 2)[0] if is_stacked else _number_of_layers(stored),
        "num_attention_heads": heads,
        "num_key_value_heads": of_layer("attn/kv_einsum/w", 4)[1] if has_groups else heads,
        "head_dim": head_dim,
    }
    return config_from_sizes(folder, embedding_rows=rows, sizes=sizes)


def _number_of_layers(stored: Weights) -> int:
    numbers = [re.match(r"layer_(\d{1,6})/", name) for name in stored.names()]
    return len({found[1] for found in numbers if found})


def _companions(folder: Path, path: Path) -> dict[str, Path]:
    """What belongs beside the weights; the tokenizer also where Google's downloads have it."""
    above = folder.parent / _TOKENIZER
    tokenizer = {_TOKENIZER: above} if above.is_file() else {}
    return tokenizer | companions(path) | companions(folder)
