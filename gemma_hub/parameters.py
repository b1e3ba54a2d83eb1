"""The canonical parameter tree: the names and layouts of the Hugging Face checkpoint.

Every backend holds exactly these names, matrices as [out, in], so loading is a lookup and saving
writes what was read. See docs/adr/0001-one-parameter-tree.md.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from gemma_hub.config import ARCHITECTURES, CLASSIFICATIONS, GemmaConfig
from gemma_hub.errors import CheckpointError, InputError, first_ten, nearest

Shape = tuple[int, ...]
Index = slice | tuple[slice | int, ...] | int | None

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The floating-point types that a parameter may have, by the name used everywhere."""


# {name within a layer: the product on each axis}. D hidden size, F feed-forward, H head size,
# N query heads, K key/value heads, V vocabulary, C classes. Matrices are [out, in].
_NORMS_AND_MATRICES = {
    "self_attn.q_proj.weight": ("NH", "D"),
    "self_attn.k_proj.weight": ("KH", "D"),
    "self_attn.v_proj.weight": ("KH", "D"),
    "self_attn.o_proj.weight": ("D", "NH"),
    "mlp.gate_proj.weight": ("F", "D"),
    "mlp.up_proj.weight": ("F", "D"),
    "mlp.down_proj.weight": ("D", "F"),
    "input_layernorm.weight": ("D",),
    "post_attention_layernorm.weight": ("D",),
}
_ATTENTION_BIASES = {
    "self_attn.q_proj.bias": ("NH",),
    "self_attn.k_proj.bias": ("KH",),
    "self_attn.v_proj.bias": ("KH",),
    "self_attn.o_proj.bias": ("D",),
}
_QK_NORMS = {"self_attn.q_norm.weight": ("H",), "self_attn.k_norm.weight": ("H",)}
_FIELDS = {
    "D": "hidden_size",
    "F": "intermediate_size",
    "H": "head_dim",
    "K": "num_key_value_heads",
    "N": "num_attention_heads",
    "V": "vocab_size",
    "C": "num_labels",
}
SCORE_WEIGHT, SCORE_BIAS = "score.weight", "score.bias"


def parameter_shapes(config: GemmaConfig, task: str = "causal_lm") -> dict[str, Shape]:
    """{canonical name: shape} of every parameter that `config` calls for, in file order.

    The tied head is one array under the embedding's name; `lm_head.weight` is there only when
    `config.tie_word_embeddings` is false.

    Args:
        config: the model's.
        task: a key of `gemma_hub.config.ARCHITECTURES`. A base model has the parameters under
            "model." only, a classifier the `score` head of `config.num_labels` rows in addition;
            that of a token classifier has a bias.
    """
    size = {letter: getattr(config, field) for letter, field in _FIELDS.items()}
    return {
        name: tuple(math.prod(size[letter] for letter in axis) for axis in axes)
        for name, axes in parameter_axes(config, task).items()
    }


def number_of_parameters(config: GemmaConfig, task: str = "causal_lm") -> int:
    """Number of values in `parameter_shapes`; a tied head counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config, task).values())


def shape_origin(config: GemmaConfig, name: str, task: str = "causal_lm") -> str:
    """The fields of `config` that the shape of one parameter comes from, with their values."""
    letters = dict.fromkeys("".join(parameter_axes(config, task)[name]))
    return ", ".join(f"{_FIELDS[x]}={getattr(config, _FIELDS[x])}" for x in letters)


def check_task(task: Any) -> None:
    """Raise an InputError unless `task` is a key of `gemma_hub.config.ARCHITECTURES`."""
    if not isinstance(task, str) or task not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = nearest(str(task), ARCHITECTURES)
        raise InputError(f"There is no task {task!r}. {hint}{' ' if hint else ''}Known: {known}.")


def parameter_axes(config: GemmaConfig, task: str) -> dict[str, tuple[str, ...]]:
    """{canonical name: its axes in letters, as `_FIELDS` has them}, in the order of the file."""
    check_task(task)
    layer = dict(_NORMS_AND_MATRICES)
    if config.attention_bias:
        layer |= _ATTENTION_BIASES
    if config.use_qk_norm:
        layer |= _QK_NORMS
    axes: dict[str, tuple[str, ...]] = {"model.embed_tokens.weight": ("V", "D")}
    for i in range(config.num_hidden_layers):
        axes |= {f"model.layers.{i}.{name}": value for name, value in layer.items()}
    axes["model.norm.weight"] = ("D",)
    if task == "causal_lm" and not config.tie_word_embeddings:
        axes["lm_head.weight"] = ("V", "D")
    if task in CLASSIFICATIONS:
        axes[SCORE_WEIGHT] = ("C", "D")
    if task == "token_classification":
        axes[SCORE_BIAS] = ("C",)
    return axes


@runtime_checkable
class Weights(Protocol):
    """Named tensors that are read only when asked for.

    An implementation maps its files: `read` returns a view where it can, and touches only the
    part that `index` selects. Nothing here holds a second copy of the model. A name that is not
    one of `names()` is a CheckpointError.
    """

    def names(self) -> tuple[str, ...]:
        """Canonical parameter names, in a fixed order."""
        ...

    def shape(self, name: str) -> Shape:
        """Shape of one tensor, without reading it."""
        ...

    def dtype(self, name: str) -> str:
        """Name of one tensor's type, a key of `DTYPES`, without reading it."""
        ...

    def read(self, name: str, index: Index = None) -> np.ndarray:
        """One tensor, or the part of it that `index` selects, in its stored type."""
        ...


def check_weights(config: GemmaConfig, task: str, weights: Weights) -> None:
    """Refuse weights that a model of `config` cannot be built from. No tensor is read.

    Surplus tensors are left alone: a checkpoint is checked for them when it is opened.

    Args:
        config: the model's.
        task: a key of `gemma_hub.config.ARCHITECTURES`.
        weights: what `build` was given.

    Raises:
        CheckpointError: parameters are missing or have the wrong shape.
    """
    names, expected = set(weights.names()), parameter_shapes(config, task)
    missing = [name for name in expected if name not in names]
    misshapen = [
        f"{name} {tuple(weights.shape(name))} instead of {shape}"
        for name, shape in expected.items()
        if name in names and tuple(weights.shape(name)) != shape
    ]
    found = {"missing": missing, "with the wrong shape": misshapen}
    problems = [f"{what}: {first_ten(which)}" for what, which in found.items() if which]
    if problems:
        raise CheckpointError(
            f"The weights do not fit the config; parameters {'; '.join(problems)}. "
            "Give the config.json that belongs to these weights."
        )


class ArrayWeights:
    """`Weights` over arrays that are already in memory.

    Raises:
        CheckpointError: an array has a type that is not one of `DTYPES`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)
        for name, array in self._arrays.items():
            if DTYPES.get(array.dtype.name) != array.dtype:
                raise CheckpointError(
                    f"{name} holds {array.dtype}; expected one of {', '.join(DTYPES)}."
                )

    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def shape(self, name: str) -> Shape:
        return self._array(name).shape

    def dtype(self, name: str) -> str:
        return self._array(name).dtype.name

    def read(self, name: str, index: Index = None) -> np.ndarray:
        array = self._array(name)
        return array if index is None else np.asarray(array[index])

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            hint = nearest(name, self._arrays)
            raise CheckpointError(f"There is no parameter {name!r}. {hint}".rstrip())
        return self._arrays[name]
