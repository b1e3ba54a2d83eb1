"""open_checkpoint: a folder becomes a config and mapped weights that fit one another."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.checkpoints.folder import (
    check_index_against_files,
    checkpoint_folder,
    listing,
    weight_files,
)
from gemma_hub.checkpoints.new_head import HEAD, with_new_head
from gemma_hub.checkpoints.safetensors_file import FORMAT_DTYPES, SafetensorsFile, StoredTensor
from gemma_hub.config import CLASSIFICATIONS, GemmaConfig, read_json_object
from gemma_hub.errors import CheckpointError, InputError, nearest
from gemma_hub.parameters import (
    DTYPES,
    SCORE_BIAS,
    SCORE_WEIGHT,
    Index,
    Shape,
    Weights,
    check_task,
    parameter_shapes,
    shape_origin,
)

EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
# {task: heads of other tasks, which a checkpoint may hold and which are then left alone}. A bias of
# a classifier is in none: a sequence classifier that has one would say something else without it.
OTHER_HEADS = {
    "base": (_LM_HEAD, *HEAD),
    "causal_lm": HEAD,
    "sequence_classification": (_LM_HEAD,),
    "token_classification": (_LM_HEAD,),
}
# A base model's file lacks the "model." that a model with a head has before these.
_BARE_PREFIXES = ("embed_tokens.", "layers.", "norm.")
# Constants that older versions of Transformers stored; they follow from the config.
BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "embed_tokens.embed_scale",
)
_COMPARED_AT_ONCE = 4 << 20  # bytes


class MappedWeights:
    """`Weights` over mapped files: `read` gives views that no one has copied.

    The arrays are writable; what is written stays in this process and never reaches a file. They
    stay readable when the file is replaced by another, as `save_checkpoint` does, but not when
    another program cuts the file short in place.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        return self._tensor(name).dtype

    def read(self, name: str, index: Index = None) -> np.ndarray:
        return self._tensor(name).read(index)

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            hint = nearest(name, self._tensors)
            raise CheckpointError(f"There is no parameter {name!r}. {hint}".rstrip())
        return self._tensors[name]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files fit one another.

    Attributes:
        path: the folder.
        config: from config.json.
        weights: every parameter that `config` and the task call for, mapped, in file order; a new
            head is in memory.
        eos_token_ids: ids that end a text, from generation_config.json if it has them.
        dtype: the type that the embedding is stored in, a key of `gemma_hub.parameters.DTYPES`.
    """

    path: Path
    config: GemmaConfig
    weights: Weights
    eos_token_ids: tuple[int, ...]
    dtype: str


def open_checkpoint(
    path: str | Path,
    task: str = "causal_lm",
    allow_unknown: Sequence[str] = (),
    num_labels: int | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Open a checkpoint folder and check all of it. No tensor is read.

    A tied head that was stored all the same must equal the embedding; that check reads both.

    Args:
        path: a folder with config.json and safetensors, in the Hugging Face layout.
        task: what to open it for, a key of `gemma_hub.config.ARCHITECTURES`. A base model and a
            classifier have no lm_head and leave a stored one alone; a base model and a causal LM
            leave a classifier's `score` alone.
        allow_unknown: keys of config.json and names of tensors to ignore although nothing here
            knows them.
        num_labels: number of labels of a classifier. A checkpoint without a head gets a new one of
            that size; a head that is there must have that size.
        seed: of a new head.

    Raises:
        CheckpointNotFoundError: there is no such folder, or nothing in it.
        ConfigError: config.json is malformed or holds a wrong value.
        CheckpointError: a file is damaged or in another format, or the tensors are not those that
            the config and the task call for.
        InputError: there is no such task, or it has no labels.

    Warns:
        NewHeadWarning: a new head was made.
    """
    check_arguments(task, num_labels, seed)
    folder = checkpoint_folder(path)
    files = weight_files(folder)
    config = GemmaConfig.from_pretrained(folder, allow_unknown)
    opened = [SafetensorsFile(file) for file in files.paths]
    check_index_against_files(folder, files.index, opened)
    tensors = canonical_tensors(opened, config)
    config = _with_labels(folder, config, tensors, num_labels)
    needs_head = task in CLASSIFICATIONS and not any(name in tensors for name in HEAD)
    stored_task = "base" if needs_head else task
    check_tensors(folder, config, tensors, allow_unknown, stored_task)
    if needs_head and num_labels is None:
        raise CheckpointError(
            f"{folder} has no score head, which {task} needs. Pass num_labels to get a new one, "
            "and train it; or open a checkpoint that was trained for this task."
        )
    names = parameter_shapes(config, stored_task)
    weights: Weights = MappedWeights({name: tensors[name] for name in names})
    if needs_head:
        weights = with_new_head(weights, config, task, seed)
    return Checkpoint(
        path=folder,
        config=config,
        weights=weights,
        eos_token_ids=read_eos_token_ids(folder, config),
        dtype=tensors[EMBEDDING].dtype,
    )


def check_arguments(task: str, num_labels: Any, seed: Any) -> None:
    check_task(task)
    if num_labels is not None and task not in CLASSIFICATIONS:
        raise InputError(
            f"num_labels is {num_labels!r} and the task {task!r} has no labels. Leave it out, or "
            f"open the checkpoint for {' or '.join(CLASSIFICATIONS)}."
        )
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise InputError(f"num_labels is {num_labels!r}; expected an integer from 1 up.")
    if type(seed) is not int:
        raise InputError(f"seed is {seed!r}; expected an integer.")


def _with_labels(
    folder: Path,
    config: GemmaConfig,
    tensors: Mapping[str, StoredTensor],
    num_labels: int | None,
) -> GemmaConfig:
    if num_labels is None or num_labels == config.num_labels:
        return config
    if SCORE_WEIGHT in tensors and tensors[SCORE_WEIGHT].shape[:1] != (num_labels,):
        raise CheckpointError(
            f"{folder} has a score head of shape {tensors[SCORE_WEIGHT].shape}, and num_labels is "
            f"{num_labels}. Leave num_labels out to use that head; for a new one, save the model "
            "as a base or causal_lm checkpoint first."
        )
    return config.with_labels(num_labels)


def canonical_tensors(
    files: Iterable[SafetensorsFile], config: GemmaConfig | None
) -> dict[str, StoredTensor]:
    """{canonical name: tensor} of all tensors in `files` but stored constants.

    A tied array goes by the embedding's name, also where a file has it as the head only.

    Raises:
        CheckpointError: one tensor is there both with and without its "model." prefix.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for stored, tensor in file.tensors.items():
            if stored.endswith(BUFFERS):
                continue
            name = f"model.{stored}" if stored.startswith(_BARE_PREFIXES) else stored
            if name in tensors:
                raise CheckpointError(
                    f"{file.path} holds {stored}, which is {name} without its prefix; that is in "
                    f"{tensors[name].file.path.name} too. Keep one of them."
                )
            tensors[name] = tensor
    if config and config.tie_word_embeddings and _LM_HEAD in tensors and EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors.pop(_LM_HEAD)
    return tensors


def check_tensors(
    folder: Path,
    config: GemmaConfig,
    tensors: Mapping[str, StoredTensor],
    allow_unknown: Sequence[str] = (),
    task: str = "causal_lm",
) -> None:
    """Check that `tensors` are those that `config` and `task` call for.

    Raises:
        CheckpointError: listing what is missing, unexpected, misshapen and of another type.
    """
    shapes = parameter_shapes(config, task)
    ignored = {*allow_unknown, *OTHER_HEADS[task]}
    expected = dict(shapes)
    if task == "causal_lm" and config.tie_word_embeddings and _LM_HEAD in tensors:
        expected[_LM_HEAD] = shapes[EMBEDDING]
    found = {name: tensors[name] for name in expected if name in tensors}
    misshapen = [name for name, tensor in found.items() if tensor.shape != expected[name]]
    mistyped = [name for name, tensor in found.items() if tensor.dtype not in DTYPES]
    lists = {
        "Missing": [name for name in expected if name not in tensors],
        "Unexpected": [n for n in tensors if n not in expected and n not in ignored],
        "Misshapen": [_misshapen(config, task, n, found[n].shape, expected[n]) for n in misshapen],
        f"Not of a type that is read ({', '.join(FORMAT_DTYPES)})": [
            f"{name} is {found[name].dtype}" for name in mistyped
        ],
    }
    is_stored_twice = _LM_HEAD in found and _LM_HEAD not in shapes and EMBEDDING in found
    comparable = is_stored_twice and not misshapen and not mistyped
    if comparable and not _same_bytes(found[_LM_HEAD], found[EMBEDDING]):
        lists["Not equal to the embedding that it is tied to"] = [_LM_HEAD]
    if any(lists.values()):
        raise CheckpointError(
            f"{folder}: the tensors are not those that config.json calls for.\n"
            + listing(lists)
            + f"  {_advice(lists)}"
        )


def _misshapen(config: GemmaConfig, task: str, name: str, shape: Shape, expected: Shape) -> str:
    origin = shape_origin(config, EMBEDDING if name == _LM_HEAD else name, task)
    return f"{name} is {shape}, expected {expected} from {origin}"


def _advice(lists: Mapping[str, Sequence[str]]) -> str:
    if list(lists)[-1].startswith("Not equal"):
        return (
            "If the head was trained apart, set tie_word_embeddings to false in config.json; "
            "if not, remove lm_head.weight."
        )
    if lists["Missing"] == [_LM_HEAD]:
        return "If the head is the embedding, set tie_word_embeddings to true in config.json."
    if lists["Unexpected"] == [SCORE_BIAS]:
        return "A score head with a bias is a token classifier's: open it for token_classification."
    if lists["Missing"] == [SCORE_BIAS]:
        return "A score head without a bias is a sequence classifier's."
    if lists["Unexpected"] and not lists["Missing"] and not lists["Misshapen"]:
        return "If the model does not depend on them, pass their names as allow_unknown."
    return "Check that config.json and the weights belong to the same model."


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are bit for bit the same, without reading all of either at once."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = one.raw_bytes(), other.raw_bytes()
    return all(
        np.array_equal(left[i : i + _COMPARED_AT_ONCE], right[i : i + _COMPARED_AT_ONCE])
        for i in range(0, one.nbytes, _COMPARED_AT_ONCE)
    )


def read_eos_token_ids(folder: Path, config: GemmaConfig) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, else those of `config`.

    Raises:
        CheckpointError: generation_config.json is malformed, or an id is outside the vocabulary.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return config.eos_token_ids
    stated = read_json_object(path, CheckpointError).get("eos_token_id")
    if stated is None:
        return config.eos_token_ids
    ids = stated if isinstance(stated, list) else [stated]
    for value in ids:
        if type(value) is not int or not 0 <= value < config.vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id is {stated!r}; expected an id from 0 to "
                f"{config.vocab_size - 1}, or a list of them."
            )
    return tuple(ids) or config.eos_token_ids
