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
    ("Gemma in PyTorch", "Gemma in Flax NNX", "Gemma"),
    ("gemma_hub_flax/", "gemma_hub_torch/", "TWIN/"),
    ("nn.Module)", "nnx.Module)", "Module)"),
    ("\n        super().__init__()", "", ""),
    ("Tensor", "Array", "ARRAY"),
    ("GemmaModel", "FlaxGemmaModel", "MODEL"),
    ("GemmaForCausalLM", "FlaxGemmaForCausalLM", "CAUSAL_LM"),
    ("def forward(", "def __call__(", "def CALL("),
    # Flax hands the source of random initial values down by an argument.
    ("(self, config: GemmaConfig)", "(self, config: GemmaConfig, rngs: nnx.Rngs)", "(CONFIG)"),
    ("", ", rngs", ""),
    ("start: int", "start: ARRAY | int", "START"),  # a traced scalar under jit
    ("nn.ModuleList(", "nnx.List(", "LIST("),
    ("nn.Parameter(torch.zeros(", "nnx.Param(jnp.zeros(", "PARAMETER(zeros("),
    (".to(torch.float32)", ".astype(jnp.float32)", ".CAST(float32)"),
    (".to(x.dtype)", ".astype(x.dtype)", ".CAST(x.dtype)"),
    (".to(v.dtype)", ".astype(v.dtype)", ".CAST(v.dtype)"),
    ("torch.rsqrt(", "jax.lax.rsqrt(", "rsqrt("),
    (
        "torch.mean(y * y, -1, keepdim=True)",
        "jnp.mean(y * y, -1, keepdims=True)",
        "mean(y * y)",
    ),
    ("F.gelu(", "jax.nn.gelu(", "gelu("),
    ("approximate='tanh'", "approximate=True", "TANH"),
    (
        "torch.full((), self.config.embedding_scale, dtype=x.dtype, device=x.device)",
        "jnp.full((), self.config.embedding_scale, dtype=x.dtype)",
        "SCALAR(embedding_scale, x.dtype)",
    ),
    ("embed_tokens.weight)", "embed_tokens.weight[...])", "embed_tokens.weight)"),
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


@pytest.mark.parametrize("name", ["model.py", "attention.py"])
def test_the_backends_say_the_same_line_by_line(name: str) -> None:
    torch = common_text(BACKENDS / "torch" / "gemma_hub_torch" / name, 0)
    flax = common_text(BACKENDS / "flax" / "gemma_hub_flax" / name, 1)
    difference = list(difflib.unified_diff(torch, flax, "torch", "flax", n=1, lineterm=""))
    assert not difference, "\n".join(difference)


@pytest.mark.parametrize("name", ["linear.py", "cache.py", "backend.py", "plugin.py"])
def test_the_smaller_pieces_have_the_same_names(name: str) -> None:
    torch = public_names(BACKENDS / "torch" / "gemma_hub_torch" / name)
    flax = public_names(BACKENDS / "flax" / "gemma_hub_flax" / name)
    framework = {"as_tensor", "as_array", "find_device", "as_jax", "run"}
    assert torch - framework == flax - framework


def public_names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            names.add(node.name.removeprefix("Torch").removeprefix("Flax"))
    return names - {"reset_parameters", "forward"}


def test_both_folders_have_the_same_files() -> None:
    torch = {p.name for p in (BACKENDS / "torch" / "gemma_hub_torch").glob("*.py")}
    flax = {p.name for p in (BACKENDS / "flax" / "gemma_hub_flax").glob("*.py")}
    assert torch == flax
