"""What a pack holds of one model, in order of computation, and the vectors that are judged."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import parameter_shapes

Shape = tuple[int, ...]

FLOATS, INTEGERS = "F64", "I32"
"""Types of the pack's own tensors, in the words of safetensors."""

GRADIENT = "gradients."
LOGITS = "logits"
OPEN = -1
"""In the token tensors: not judged, because rounding could change it."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a pack, and of the outputs that are judged by it.

    Attributes:
        name: in the files.
        dtype: `FLOATS`, or `INTEGERS` for tokens.
        shape: of the tensor. B rows, T slots, D width, N query heads, K key/value heads, H head
            size, F feed-forward width, V vocabulary.
        vectors: what plays the part of a token to the error model. "token": all that a real token
            has; "head": all that one head of a real token has, the head being the second axis;
            "whole": the whole tensor; "exact": nothing, it must be equal.
        what: one line.
        formula: how it follows from what is before it.
        tape: its name on the tape of the reference; empty where it is not from there.
    """

    name: str
    dtype: str
    shape: Shape
    vectors: str
    what: str
    formula: str
    tape: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "vectors": self.vectors,
            "what": self.what,
            "formula": self.formula,
        }

    def as_vectors(self, array: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(n, size) of a tensor of this shape; `mask` (B, T) bool is true at real tokens."""
        if self.vectors == "token":
            return np.asarray(array[mask].reshape(int(mask.sum()), -1))
        if self.vectors == "head":
            return np.asarray(np.moveaxis(array, 1, 2)[mask].reshape(-1, array.shape[-1]))
        return array.reshape(1, -1)

    def rows(self, mask: np.ndarray) -> list[slice]:
        """The vectors of each row of the batch; all of them where the tensor has no such rows.

        Rows are judged one by one: rounding of the angles moves one at position 8190 a thousand
        times as far as one at 0, whose errors would drown in its noise.
        """
        if self.vectors not in ("token", "head"):
            return [slice(None)]
        counts = mask.sum(axis=1) * (self.shape[1] if self.vectors == "head" else 1)
        ends = np.cumsum(counts)
        return [slice(int(end - n), int(end)) for n, end in zip(counts, ends, strict=True)]

    def place(self, vector: int, element: int, mask: np.ndarray) -> tuple[int, ...]:
        """Index in the tensor of one element of `as_vectors`."""
        if self.vectors == "token":
            inner = np.unravel_index(element, self.shape[2:])
            return (*_slot(mask, vector), *(int(i) for i in inner))
        if self.vectors == "head":
            token, head = divmod(vector, self.shape[1])
            row, slot = _slot(mask, token)
            return row, head, slot, element
        return tuple(int(i) for i in np.unravel_index(element, self.shape))


def _slot(mask: np.ndarray, token: int) -> tuple[int, int]:
    row, slot = np.argwhere(mask)[token]
    return int(row), int(slot)


def tensors(config: GemmaConfig, batch: int, slots: int, draws: int) -> tuple[TensorSpec, ...]:
    """Activations, logits, losses and gradients of a causal LM, each after what it needs.

    Args:
        config: the model's.
        batch: number of rows.
        slots: of each row.
        draws: number of losses.
    """
    return (
        *activations(config, batch, slots),
        TensorSpec(
            "losses", FLOATS, (draws,), "whole", "the loss for each of the `labels`",
            "mean over the labels that are not -100 of -log softmax(logits[b, t - 1])[label b, t]",
        ),
        *gradients(config),
    )  # fmt: skip


def activations(config: GemmaConfig, batch: int, slots: int) -> Iterator[TensorSpec]:
    """From the embedding to the logits."""
    grid = (batch, slots)
    D = config.hidden_size
    yield TensorSpec(
        "embedding", FLOATS, (*grid, D), "token", "input of the first layer",
        "model.embed_tokens.weight[input_ids] * sqrt(hidden_size), the factor rounded to the dtype",
        "model.layers.0.x",
    )  # fmt: skip
    for i in range(config.num_hidden_layers):
        yield from _layer(config, i, grid)
    yield TensorSpec(
        "final_norm", FLOATS, (*grid, D), "token", "what the head reads",
        _norm("the last layer's output", "model.norm.weight"), "model.norm.y",
    )  # fmt: skip
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield TensorSpec(
        LOGITS, FLOATS, (*grid, config.vocab_size), "token", "scores of the next token",
        f"final_norm · {head}ᵀ, in float32", "logits",
    )  # fmt: skip


def _layer(config: GemmaConfig, i: int, grid: Shape) -> Iterator[TensorSpec]:
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    at, here = f"model.layers.{i}", f"layers.{i}"
    x = "embedding" if i == 0 else f"layers.{i - 1}.output"
    bias = " + bias" if config.attention_bias else ""
    after = f"{at[:-1]}{i + 1}.x" if i + 1 < config.num_hidden_layers else "model.norm.x"
    turn = (
        "entries j and j + H/2 of each head as one pair, turned by position_ids * "
        "rope_theta^(-2j/H) radians: (a cos - b sin, b cos + a sin)"
    )
    listed = (
        ("input_norm", (D,), "input of the attention",
         _norm(x, f"{at}.input_layernorm.weight"), f"{at}.self_attn.x"),
        ("q", (N, H), "queries without positions",
         f"input_norm · q_projᵀ{bias}, N heads of H", f"{at}.self_attn.q_proj"),
        ("k", (K, H), "keys without positions",
         f"input_norm · k_projᵀ{bias}, K heads of H", f"{at}.self_attn.k_proj"),
        ("v", (K, H), "values", f"input_norm · v_projᵀ{bias}, K heads of H", f"{at}.self_attn.v"),
        ("q_rotated", (N, H), "queries with their positions", f"q, {turn}", f"{at}.self_attn.q"),
        ("k_rotated", (K, H), "keys with their positions", f"k, {turn}", f"{at}.self_attn.k"),
        ("attention_probs", (), "how much token t attends to slot s, by query head",
         "softmax over s of q_rotated[t, n] · k_rotated[s, n // (N / K)] / sqrt(H), over the real "
         "tokens s up to t; 0 at every other slot", f"{at}.self_attn.probs"),
        ("attention_mixed", (N * H,), "input of o_proj",
         "sum over s of attention_probs[n, t, s] * v[s, n // (N / K)], heads one after the other",
         f"{at}.self_attn.mixed"),
        ("attention_output", (D,), "what the attention adds",
         f"attention_mixed · o_projᵀ{bias}", f"{at}.self_attn.o_proj"),
        ("attention_residual", (D,), "the first residual sum", f"{x} + attention_output",
         f"{at}.middle"),
        ("post_attention_norm", (D,), "input of the feed-forward part",
         _norm("attention_residual", f"{at}.post_attention_layernorm.weight"), f"{at}.mlp.x"),
        ("gate", (F,), "gate before its activation", "post_attention_norm · gate_projᵀ",
         f"{at}.mlp.gate"),
        ("activation", (F,), "gate after its activation",
         "0.5 gate (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate³)))", f"{at}.mlp.active"),
        ("up", (F,), "what is gated", "post_attention_norm · up_projᵀ", f"{at}.mlp.up"),
        ("product", (F,), "input of down_proj", "activation * up", f"{at}.mlp.product"),
        ("down", (D,), "what the feed-forward part adds", "product · down_projᵀ",
         f"{at}.mlp.down_proj"),
        ("output", (D,), "the second residual sum", "attention_residual + down", after),
    )  # fmt: skip
    for name, inner, what, formula, tape in listed:
        is_probs = name == "attention_probs"
        shape = (grid[0], N, grid[1], grid[1]) if is_probs else (*grid, *inner)
        vectors = "head" if is_probs else "token"
        yield TensorSpec(f"{here}.{name}", FLOATS, shape, vectors, what, formula, tape)


def _norm(x: str, weight: str) -> str:
    return f"x / sqrt(mean(x²) + rms_norm_eps) * (1 + {weight}), x = {x}"


# The order in which the backward pass reaches the parameters of one layer.
_BACKWARD = (
    "down_proj", "up_proj", "gate_proj", "post_attention_layernorm", "o_proj", "v_proj", "k_proj",
    "q_proj", "input_layernorm",
)  # fmt: skip


def gradients(config: GemmaConfig) -> Iterator[TensorSpec]:
    """Of every parameter, in the order in which the backward pass reaches it."""

    def when(name: str) -> tuple[int, int]:
        if name == "lm_head.weight":
            return (0, 0)
        if name == "model.norm.weight":
            return (1, 0)
        if name == "model.embed_tokens.weight":
            return (config.num_hidden_layers + 2, 0)
        _, _, layer, *_, module, _ = name.split(".")
        return (config.num_hidden_layers + 1 - int(layer), _BACKWARD.index(module))

    shapes = parameter_shapes(config)
    for name in sorted(shapes, key=when):
        formula = f"d losses[0] / d {name}"
        if name == "model.embed_tokens.weight":
            formula += "; looking up the row of pad_token_id gives it no gradient"
        yield TensorSpec(
            GRADIENT + name, FLOATS, shapes[name], "whole", "gradient of a parameter", formula
        )


def token_tensors(prompts: int, new_tokens: int, samplings: int) -> tuple[TensorSpec, ...]:
    """The generated tokens."""
    rule = f"; {OPEN} where rounding could change it, and from there on nothing is compared"
    return (
        TensorSpec(
            "greedy_tokens", INTEGERS, (prompts, new_tokens), "exact",
            "new tokens of each prompt at temperature 0",
            f"the id of the largest of the last token's logits{rule}",
        ),
        TensorSpec(
            "sampled_tokens", INTEGERS, (samplings, prompts, new_tokens), "exact",
            "new tokens of each prompt under each of the `samplings`",
            "logits / temperature; the top_k largest; of those the fewest that reach top_p; then "
            "the first id, in id order, whose cumulative weight exceeds uniforms * the total"
            + rule,
        ),
    )  # fmt: skip
