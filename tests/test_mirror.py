"""The two backends' model files are one text in two dialects.

Both are parsed (nothing is imported), the frameworks' own words are replaced by common ones, and
what remains must be equal line by line: classes, methods, local names, docstrings, mathematics.
"""

import ast
import difflib
from pathlib import Path

import pytest

BACKENDS = Path(__file__).parents[1] / "backends"

# (PyTorch, Flax, common word). Each entry is a difference that a reviewer has accepted.
DIALECT = [
    ("gemma_hub_torch", "gemma_hub_flax", "BACKEND"),
    ("Gemma in PyTorch", "Gemma in Flax NNX", "THE MODEL"),
    ("gemma_hub_flax/", "gemma_hub_torch/", "TWIN/"),
    ("nn.Module)", "nnx.Module)", "Module)"),
    ("\n        super().__init__()", "", ""),
    ("Tensor", "Array", "ARRAY"),
    ("Gemma", "FlaxGemma", "GEMMA"),
    ("GEMMAConfig", "GemmaConfig", "CONFIG"),
    ("def forward(", "def __call__(", "def CALL("),
    # Flax hands the source of random initial values down by an argument; a whole model has its own.
    ("", "\n        rngs = nnx.Rngs(0) if rngs is None else rngs", ""),
    (
        "(self, config: CONFIG)",
        "(self, config: CONFIG, rngs: nnx.Rngs | None=None)",
        "(self, CONFIG)",
    ),
    ("(self, CONFIG)", "(self, config: CONFIG, rngs: nnx.Rngs)", "(self, CONFIG)"),
    ("", ", rngs", ""),
    # Dropout: torch has a mode and a generator of its own, in JAX a key is handed down.
    ("import dropout", "import Dropout, split_key", "import DROPOUT"),
    ("import dropout", "import Dropout", "import DROPOUT"),
    (
        "\n        rate = self.dropout if self.training else 0.0",
        "\n        dropout = Dropout(self.dropout, dropout_rng)",
        "",
    ),
    ("self.scale, rate)", "self.scale, dropout)", "self.scale, DROPOUT)"),
    ("scale: float, dropout_rate: float)", "scale: float, dropout: Dropout)", "scale: float)"),
    ("dropout(probs, dropout_rate)", "dropout(probs)", "DROPPED"),
    ("dropout(out.last_hidden_state, rate)", "dropout(out.last_hidden_state)", "DROPPED"),
    ("", ", dropout_rng: ARRAY | None=None", ""),
    ("", ", dropout_rng: ARRAY | None", ""),
    ("", ", dropout_rng", ""),
    ("", "\n        keys = split_key(dropout_rng, len(self.layers))", ""),
    (
        "for layer, cache in zip(self.layers, call.layers, strict=True)",
        "for layer, cache, key in zip(self.layers, call.layers, keys, strict=True)",
        "for layer, cache in zip(self.layers, call.layers, strict=True)",
    ),
    ("cache, call.start)", "cache, call.start, key)", "cache, call.start)"),
    (
        "",
        "\n            dropout_rng: a key of jax.random turns dropout on; None is the mode without "
        "it.",
        "",
    ),
    # torch has one more kernel that needs no weights in memory, and it takes the mask as numbers.
    ("import MASKED, Mask,", "import Mask,", "import Mask,"),
    ("fused_mask(visible, MASKED, native)", "fused_mask(visible, native)", "FUSED"),
    ("if dropout_rate == 0:", "if dropout.is_off:", "if DROPOUT is off:"),
    ("q.new_empty(0)", "jnp.empty(0)", "NOTHING"),
    ("start: int", "start: ARRAY | int", "START"),  # a traced scalar under jit
    ("nn.ModuleList(", "nnx.List(", "LIST("),
    ("nn.Parameter(torch.zeros(", "nnx.Param(jnp.zeros(", "PARAMETER(zeros("),
    # XLA makes one pass of what is between two products; torch has native functions for that.
    (
        "import has_native, is_for_one_pass, native_gated_, native_norm",
        "import has_native",
        "NATIVE",
    ),
    (
        "at the very end.\n\n    Attributes:\n        native: compute as fast_native.py does where "
        'that is for it.\n    """\n    native = False\n',
        'at the very end."""\n',
        'at the very end."""\n',
    ),
    (
        "\n        if self.native and is_for_one_pass(x, self.weight):"
        "\n            return native_norm(x, self.weight, self.eps, self.offset)",
        "",
        "",
    ),
    (
        "of GELU.\n\n    Attributes:\n        native: as in `RMSNorm`."
        '\n    """\n    native = False\n',
        'of GELU."""\n',
        'of GELU."""\n',
    ),
    (
        "\n        if self.native and is_for_one_pass(gate, up):"
        "\n            return self.down_proj(native_gated_(gate, up))",
        "",
        "",
    ),
    # torch's GELU of 16-bit numbers computes in float32 and rounds once; JAX's does not.
    (
        "F.gelu(gate, approximate='tanh')",
        "jax.nn.gelu(gate.astype(jnp.float32), approximate=True).astype(x.dtype)",
        "GELU(gate)",
    ),
    (".to(torch.float32)", ".astype(jnp.float32)", ".CAST(float32)"),
    (".to(x.dtype)", ".astype(x.dtype)", ".CAST(x.dtype)"),
    (".to(v.dtype)", ".astype(v.dtype)", ".CAST(v.dtype)"),
    (
        "x.to(self.embed_tokens.weight.dtype)",
        "x.astype(self.embed_tokens.weight.dtype)",
        "x.CAST(weight)",
    ),
    ("torch.rsqrt(", "jax.lax.rsqrt(", "rsqrt("),
    (
        "torch.mean(y * y, -1, keepdim=True)",
        "jnp.mean(y * y, -1, keepdims=True)",
        "mean(y * y)",
    ),
    (
        "torch.full((), self.config.embedding_scale, dtype=x.dtype, device=x.device)",
        "jnp.full((), self.config.embedding_scale, dtype=x.dtype)",
        "SCALAR(embedding_scale, x.dtype)",
    ),
    ("embed_tokens.weight)", "embed_tokens.weight[...])", "embed_tokens.weight)"),
    ("torch.arange(B, device=x.device)", "jnp.arange(B)", "ROWS"),
    # attention.py
    (
        "torch.arange(0, H, 2, dtype=torch.float32, device=position_ids.device)",
        "jnp.arange(0, H, 2, dtype=jnp.float32)",
        "arange(0, H, 2)",
    ),
    ("torch.chunk(", "jnp.split(", "split("),
    ("torch.cat(", "jnp.concatenate(", "concatenate("),
    ("torch.arange(valid.shape[1], device=valid.device)", "jnp.arange(valid.shape[1])", "SLOTS"),
    ("torch.arange(num_queries, device=valid.device)", "jnp.arange(num_queries)", "QUERIES"),
    ("torch.softmax(", "jax.nn.softmax(", "softmax("),
    (
        "return torch.einsum(subscripts, a.CAST(float32), b.CAST(float32))",
        "a, b = (a.CAST(float32), b.CAST(float32))\n"
        "    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)",
        "return EINSUM",
    ),
    # losses.py
    ("torch.log_softmax(", "jax.nn.log_softmax(", "log_softmax("),
    ("torch.take_along_dim(", "jnp.take_along_axis(", "take_along_axis("),
    ("torch.", "jnp.", "xp."),
]


def common_text(path: Path, column: int) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not imports_a_framework(node)]
    text = ast.unparse(tree)
    for entry in DIALECT:
        if entry[column]:
            text = text.replace(entry[column], entry[2])
    return text.splitlines()


def imports_a_framework(node: ast.stmt) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    return any(name.split(".")[0] in {"torch", "jax", "flax"} for name in names)


@pytest.mark.parametrize("name", ["model.py", "attention.py", "losses.py"])
def test_the_backends_say_the_same_line_by_line(name: str) -> None:
    torch = common_text(BACKENDS / "torch" / "gemma_hub_torch" / name, 0)
    flax = common_text(BACKENDS / "flax" / "gemma_hub_flax" / name, 1)
    difference = list(difflib.unified_diff(torch, flax, "torch", "flax", n=1, lineterm=""))
    assert not difference, "\n".join(difference)


SMALLER_PIECES = [
    "backend.py",
    "cache.py",
    "calls.py",
    "devices.py",
    "linear.py",
    "outputs.py",
    "plugin.py",
    "pretrained.py",
    "remat.py",
    "weights.py",
]


@pytest.mark.parametrize("name", SMALLER_PIECES)
def test_the_smaller_pieces_have_the_same_names(name: str) -> None:
    torch = public_names(BACKENDS / "torch" / "gemma_hub_torch" / name)
    flax = public_names(BACKENDS / "flax" / "gemma_hub_flax" / name)
    # Functions that only one framework needs.
    framework = {"as_tensor", "as_jax", "device_of", "known_length", "loss", "loss_and_gradients"}
    framework |= {"draw", "greedy_steps", "name_of", "named_leaves", "on_cpu", "run"}
    assert torch - framework == flax - framework


def public_names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            names.add(node.name.removeprefix("Torch").removeprefix("Flax"))
    return names - {"reset_parameters", "forward"}


def test_both_folders_have_the_same_files() -> None:
    torch = file_names(BACKENDS / "torch" / "gemma_hub_torch")
    flax = file_names(BACKENDS / "flax" / "gemma_hub_flax")
    assert torch == flax


def file_names(folder: Path) -> set[str]:
    """All but what makes one framework fast, which the other has no need of."""
    return {p.name for p in folder.glob("*.py") if not p.name.startswith(("fast_", "compile_"))}
