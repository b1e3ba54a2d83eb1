"""The mapping table: where every format keeps every parameter. Reading and writing follow it.

One row a parameter, one column a format; the grammar of a cell is that of `layout.Place`. Tensors
of Hugging Face safetensors and of pytorch_model.bin have the canonical names and axes themselves.
docs/reference/checkpoint-formats.md shows this table; `markdown` makes it.
"""

from collections.abc import Mapping

from gemma_hub.checkpoints.formats.layout import Layout, Place

Cell = Place | tuple[Place, ...]

_ATTENTION = "layer_{i}/attn/"
_KERAS = "layers/gemma_decoder_block{_i}/"
_FLAX = "model/layers/{i}/"

TABLE: Mapping[str, Mapping[str, Cell]] = {
    "model.embed_tokens.weight": {
        "gemma_pytorch": Place("embedder.weight", "V+P D"),
        "orbax": Place("embedder/input_embedding", "V+P D"),
        "keras": Place("layers/reversible_embedding/vars/0", "V D"),
        "gguf": Place("token_embd.weight", "V D"),
        "flax_msgpack": Place("model/embed_tokens/embedding", "V D"),
    },
    "self_attn.q_proj.weight": {
        "gemma_pytorch": Place("model.layers.{i}.self_attn.qkv_proj.weight", "NH+KH+KH D", 0),
        "orbax": (
            Place(f"{_ATTENTION}q_einsum/w", "N D H", only="N > K"),
            Place(f"{_ATTENTION}qkv_einsum/w", "3 N D H", 0, only="N = K"),
        ),
        "keras": Place(f"{_KERAS}attention/query_dense/vars/0", "N D H"),
        "gguf": Place("blk.{i}.attn_q.weight", "NH D"),
        "flax_msgpack": Place(f"{_FLAX}self_attn/q_proj/kernel", "D NH"),
    },
    "self_attn.k_proj.weight": {
        "gemma_pytorch": Place("model.layers.{i}.self_attn.qkv_proj.weight", "NH+KH+KH D", 1),
        "orbax": (
            Place(f"{_ATTENTION}kv_einsum/w", "2 K D H", 0, only="N > K"),
            Place(f"{_ATTENTION}qkv_einsum/w", "3 K D H", 1, only="N = K"),
        ),
        "keras": Place(f"{_KERAS}attention/key_dense/vars/0", "K D H"),
        "gguf": Place("blk.{i}.attn_k.weight", "KH D"),
        "flax_msgpack": Place(f"{_FLAX}self_attn/k_proj/kernel", "D KH"),
    },
    "self_attn.v_proj.weight": {
        "gemma_pytorch": Place("model.layers.{i}.self_attn.qkv_proj.weight", "NH+KH+KH D", 2),
        "orbax": (
            Place(f"{_ATTENTION}kv_einsum/w", "2 K D H", 1, only="N > K"),
            Place(f"{_ATTENTION}qkv_einsum/w", "3 K D H", 2, only="N = K"),
        ),
        "keras": Place(f"{_KERAS}attention/value_dense/vars/0", "K D H"),
        "gguf": Place("blk.{i}.attn_v.weight", "KH D"),
        "flax_msgpack": Place(f"{_FLAX}self_attn/v_proj/kernel", "D KH"),
    },
    "self_attn.o_proj.weight": {
        "gemma_pytorch": Place("model.layers.{i}.self_attn.o_proj.weight", "D NH"),
        "orbax": Place(f"{_ATTENTION}attn_vec_einsum/w", "N H D"),
        "keras": Place(f"{_KERAS}attention/output_dense/vars/0", "N H D"),
        "gguf": Place("blk.{i}.attn_output.weight", "D NH"),
        "flax_msgpack": Place(f"{_FLAX}self_attn/o_proj/kernel", "NH D"),
    },
    "mlp.gate_proj.weight": {
        "gemma_pytorch": Place("model.layers.{i}.mlp.gate_proj.weight", "F D"),
        "orbax": (
            Place("layer_{i}/mlp/gating_einsum/w", "2 D F", 0),
            Place("layer_{i}/mlp/gating_einsum/w", "2 F D", 0, only="never"),
        ),
        "keras": Place(f"{_KERAS}gating_ffw/vars/0", "D F"),
        "gguf": Place("blk.{i}.ffn_gate.weight", "F D"),
        "flax_msgpack": Place(f"{_FLAX}mlp/gate_proj/kernel", "D F"),
    },
    "mlp.up_proj.weight": {
        "gemma_pytorch": Place("model.layers.{i}.mlp.up_proj.weight", "F D"),
        "orbax": (
            Place("layer_{i}/mlp/gating_einsum/w", "2 D F", 1),
            Place("layer_{i}/mlp/gating_einsum/w", "2 F D", 1, only="never"),
        ),
        "keras": Place(f"{_KERAS}gating_ffw_2/vars/0", "D F"),
        "gguf": Place("blk.{i}.ffn_up.weight", "F D"),
        "flax_msgpack": Place(f"{_FLAX}mlp/up_proj/kernel", "D F"),
    },
    "mlp.down_proj.weight": {
        "gemma_pytorch": Place("model.layers.{i}.mlp.down_proj.weight", "D F"),
        "orbax": Place("layer_{i}/mlp/linear/w", "F D"),
        "keras": Place(f"{_KERAS}ffw_linear/vars/0", "F D"),
        "gguf": Place("blk.{i}.ffn_down.weight", "D F"),
        "flax_msgpack": Place(f"{_FLAX}mlp/down_proj/kernel", "F D"),
    },
    "input_layernorm.weight": {
        "gemma_pytorch": Place("model.layers.{i}.input_layernorm.weight", "D"),
        "orbax": Place("layer_{i}/pre_attention_norm/scale", "D"),
        "keras": Place(f"{_KERAS}pre_attention_norm/vars/0", "D"),
        "gguf": Place("blk.{i}.attn_norm.weight", "D", plus=1.0),
        "flax_msgpack": Place(f"{_FLAX}input_layernorm/weight", "D"),
    },
    # In later generations this name means another tensor; in the first it is the norm before the
    # feed-forward block, as the other formats' names say.
    "post_attention_layernorm.weight": {
        "gemma_pytorch": Place("model.layers.{i}.post_attention_layernorm.weight", "D"),
        "orbax": Place("layer_{i}/pre_ffw_norm/scale", "D"),
        "keras": Place(f"{_KERAS}pre_ffw_norm/vars/0", "D"),
        "gguf": Place("blk.{i}.ffn_norm.weight", "D", plus=1.0),
        "flax_msgpack": Place(f"{_FLAX}post_attention_layernorm/weight", "D"),
    },
    "model.norm.weight": {
        "gemma_pytorch": Place("model.norm.weight", "D"),
        "orbax": Place("final_norm/scale", "D"),
        "keras": Place("layers/rms_normalization/vars/0", "D"),
        "gguf": Place("output_norm.weight", "D", plus=1.0),
        "flax_msgpack": Place("model/norm/weight", "D"),
    },
    "lm_head.weight": {  # where it is not the embedding; the others always tie the two
        "flax_msgpack": Place("lm_head/kernel", "D V"),
    },
}
"""{canonical name, without "model.layers.N." for a layer's: {format: place or places}}."""


def layout(format_name: str) -> Layout:
    """The column of one format."""
    cells = {name: row[format_name] for name, row in TABLE.items() if format_name in row}
    return {name: cell if isinstance(cell, tuple) else (cell,) for name, cell in cells.items()}


def stacked(per_layer: Layout, layer: str, stack: str) -> Layout:
    """A layout whose layers are stacked: `layer` in a name becomes `stack`, and "L" leads."""
    return {
        name: tuple(
            Place(p.name.replace(layer, stack), f"L {p.axes}", p.part, p.plus, p.only)
            if layer in p.name
            else p
            for p in cell
        )
        for name, cell in per_layer.items()
    }


def markdown() -> str:
    """The table as Markdown, one section a format."""
    formats = list(dict.fromkeys(name for row in TABLE.values() for name in row))
    lines: list[str] = []
    for name in formats:
        lines += [f"### `{name}`", "", "| parameter | stored tensor | its axes |", "|---|---|---|"]
        for parameter, cell in layout(name).items():
            lines += [f"| `{parameter}` | `{p.name}` | {_axes(p)} |" for p in cell]
        lines.append("")
    return "\n".join(lines)


def _axes(place: Place) -> str:
    words = f"`{place.axes}`"
    if place.axes[0].isdigit() or "+K" in place.axes:
        words += f", part {place.part}"
    if place.plus:
        words += f", plus {place.plus:g}, in float32"
    if place.only:
        words += ", read only" if place.only == "never" else f", where {place.only}"
    return words
