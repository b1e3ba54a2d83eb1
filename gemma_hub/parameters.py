"""The canonical parameter tree: the names and layouts of the Hugging Face checkpoint.

Every backend holds exactly these names, matrices as [out, in], so loading is a lookup and saving
writes what was read. See docs/adr/0001-one-parameter-tree.md.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from gemma_hub.config import GemmaConfig

Shape = tuple[int, ...]
Index = slice | tuple[slice | int, ...] | int | None

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The floating-point types that a parameter may have, by the name used everywhere."""


def parameter_shapes(config: GemmaConfig) -> dict[str, Shape]:
    """{canonical name: shape} of every parameter that `config` calls for, in file order.

    The tied head is one array under the embedding's name; `lm_head.weight` is there only when
    `config.tie_word_embeddings` is false.
    """
    D, F = config.hidden_size, config.intermediate_size
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block: dict[str, Shape] = {
        "self_attn.q_proj.weight": (N * H, D),
        "self_attn.k_proj.weight": (K * H, D),
        "self_attn.v_proj.weight": (K * H, D),
        "self_attn.o_proj.weight": (D, N * H),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    if config.attention_bias:
        block |= {
            "self_attn.q_proj.bias": (N * H,),
            "self_attn.k_proj.bias": (K * H,),
            "self_attn.v_proj.bias": (K * H,),
            "self_attn.o_proj.bias": (D,),
        }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, D)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    return shapes


@runtime_checkable
class Weights(Protocol):
    """Named tensors that are read only when asked for.

    An implementation maps its files: `read` returns a view where it can, and touches only the
    part that `index` selects. Nothing here holds a second copy of the model.
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


class ArrayWeights:
    """`Weights` over arrays that are already in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)

    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def shape(self, name: str) -> Shape:
        return self._arrays[name].shape

    def dtype(self, name: str) -> str:
        return self._arrays[name].dtype.name

    def read(self, name: str, index: Index = None) -> np.ndarray:
        array = self._arrays[name]
        return array if index is None else array[index]
