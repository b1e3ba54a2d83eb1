"""Breaking a line of numerics in the source of either backend makes the suite fail.

Each entry is one edit of one file. The edited package is imported beside the real one, built into
a backend and given to the case that must notice. The two backends are one text in two dialects,
so most edits are the same string in both.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma_hub_conformance.engine import load_subject, run_conformance
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import Verdict
from gemma_hub_conformance.spec import Subject

BACKENDS = Path(__file__).parents[2] / "backends"
FORWARD = "L2.forward.gqa.left_padding"
PLAIN = "L5.attentions.gqa"  # where the weights are asked for torch has no other attention


@dataclass(frozen=True)
class Edit:
    """Replace `old` by `new` in `file`; `case` must notice. A pair is (torch, flax)."""

    name: str
    file: str | tuple[str, str]
    old: str | tuple[str, str]
    new: str | tuple[str, str]
    case: str = FORWARD

    def text(self, backend: str, which: str) -> str:
        value = getattr(self, which)
        return value if isinstance(value, str) else value[("torch", "flax").index(backend)]


EDITS = [
    Edit("norm without eps", "model.py", ") + self.eps)", "))"),
    Edit("norm without 1 + w", "model.py", "(self.offset + self.weight", "(self.weight"),
    Edit("norm of the mean", "model.py", "mean(y * y, -1", "mean(y, -1"),
    Edit("k not rotated", "model.py", "k = rotate(k, turns)", "k = k"),
    Edit(
        "v rotated",
        "model.py",
        "k = rotate(k, turns)",
        "k, v = rotate(k, turns), rotate(v, turns)",
    ),
    Edit("attention scale", "model.py", "mask, self.scale, ", "mask, self.scale * 1.001, "),
    Edit("no first residual", "model.py", "x = x + out", "x = out"),
    Edit("no second residual", "model.py", "x = x + self.mlp", "x = self.mlp"),
    Edit(
        "norms exchanged", "model.py", "self.post_attention_layernorm(x)", "self.input_layernorm(x)"
    ),
    Edit("gate added", "model.py", "(gate * up)", "(gate + up)"),
    Edit("gate and up exchanged", "model.py", "gate, up = ", "up, gate = "),
    Edit("exact GELU", "model.py", ('"tanh"', "approximate=True"), ('"none"', "approximate=False")),
    Edit("no embedding scale", "model.py", "self.config.embedding_scale", "1.0"),
    Edit("no final norm", "model.py", "hidden_states[-1] = self.norm(x)", "hidden_states[-1] = x"),
    Edit(
        "head always tied",
        "model.py",
        "if self.config.tie_word_embeddings:\n            logits",
        "if True:\n            logits",
        "L2.forward.untied.no_padding",
    ),
    Edit(
        "wrong logits kept",
        ("model.py", "fast_shapes.py"),
        ("[:, -logits_to_keep:]", "self._num_tokens - self._count, self._count"),
        ("[:, :]", "self._num_tokens - self._count - 1, self._count"),
        "L2.logits_to_keep.5",
    ),
    Edit("rope base", "attention.py", "config.rope_theta**", "10000.0**"),
    Edit(
        "rope scaling",
        "attention.py",
        " / config.rope_factor",
        "",
        "L2.forward.linear_rope.no_padding",
    ),
    Edit("rope size", "attention.py", "/ H\n", "/ (H + 2)\n"),
    Edit("rope sign", "attention.py", "y * turns.cos + ", "y * turns.cos - "),
    Edit("mask excludes the query", "attention.py", "<= queries", "< queries"),
    Edit("causality", "attention.py", "<= queries", "<= 99 + queries"),
    Edit("padding seen", "attention.py", "valid[:, None, :] & ", "(valid[:, None, :] | True) & "),
    Edit("weak mask", "attention.py", "MASKED = -2.0e38", "MASKED = -5.0"),
    Edit(
        "group order",
        "attention.py",
        "q.reshape(B, T, K, N // K, H)",
        "q.reshape(B, T, N // K, K, H).swapaxes(2, 3)",
        PLAIN,
    ),
    Edit(
        "positions in bfloat16",
        "attention.py",
        ("position_ids.to(torch.float32)", "position_ids.astype(jnp.float32)"),
        (
            "position_ids.to(torch.bfloat16).to(torch.float32)",
            "position_ids.astype(jnp.bfloat16).astype(jnp.float32)",
        ),
        "L2.positions.offset_257",
    ),
    Edit(
        "probabilities in bfloat16",
        "attention.py",
        ("(scores, -1).to(v.dtype)", "(scores, -1).astype(v.dtype)"),
        (
            "(scores, -1).to(torch.bfloat16).to(v.dtype)",
            "(scores, -1).astype(jnp.bfloat16).astype(v.dtype)",
        ),
        PLAIN,
    ),
    Edit(
        "values cached as keys",
        "cache.py",
        ("start:end] = k", "cache.keys, k, start"),
        ("start:end] = v", "cache.keys, v, start"),
        "L2.cache.gqa.left_padding",
    ),
    Edit(
        "cache one slot off",
        "cache.py",
        ("start:end] = v", "cache.values, v, start"),
        ("max(start - 1, 0) : max(start - 1, 0) + v.shape[1]] = v", "cache.values, v, start - 1"),
        "L2.cache.gqa.left_padding",
    ),
    Edit(
        "bias dropped",
        "linear.py",
        ("self.weight, self.bias, native", "None if self.bias is None else self.bias[...]"),
        ("self.weight, None, native", "None"),
        "L2.forward.bias.no_padding",
    ),
    Edit(
        "labels not shifted",
        "losses.py",
        "cross_entropy(logits, following, num_items)",
        "cross_entropy(logits, labels, num_items)",
        "L5.causal.loss.no_padding",
    ),
    Edit(
        "ignored labels counted",
        "losses.py",
        "counted = labels != IGNORED",
        "counted = labels == labels",
        "L5.causal.loss.ignored_labels",
    ),
    Edit(
        "number of items ignored",
        "losses.py",
        "if num_items is None else num_items",
        "if True else num_items",
        "L5.causal.loss.num_items",
    ),
    Edit(
        "half of binary cross entropy",
        "losses.py",
        " + (1.0 - y) * log_sigmoid(-z)",
        "",
        "L5.sequence.loss.multi_label",
    ),
    Edit(
        "squared error of the sign",
        "losses.py",
        "(difference * difference)",
        "(abs(difference))",
        "L5.sequence.loss.regression",
    ),
    Edit(
        "first token pooled",
        "model.py",
        "pooled_positions])",
        "pooled_positions * 0])",
        "L5.sequence.logits.left_padding",
    ),
    Edit(
        "half the gradient of the norms",
        "model.py",
        ("self.offset + self.weight.to", "self.offset + self.weight.astype"),
        (
            "self.offset + (0.5 * (self.weight + self.weight.detach())).to",
            "self.offset + (0.5 * (self.weight + jax.lax.stop_gradient(self.weight[...]))).astype",
        ),
        "L5.gradients.causal.gqa",
    ),
]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Edit], Any]]:
    """Imports a backend's package with one edit, under another name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(backend: str, edit: Edit) -> Any:
        package, copy = f"gemma_hub_{backend}", f"edited_{backend}"
        (tmp_path / copy).mkdir()
        for source in (BACKENDS / backend / package).glob("*.py"):
            text = source.read_text(encoding="utf-8")
            if source.name == edit.text(backend, "file"):
                old, new = edit.text(backend, "old"), edit.text(backend, "new")
                assert old in text, f"{edit.name}: {old!r} is not in {source.name} any more"
                text = text.replace(old, new)
            (tmp_path / copy / source.name).write_text(text.replace(package, copy), "utf-8")
        module = importlib.import_module(f"{copy}.backend")
        return getattr(module, {"torch": "TorchBackend", "flax": "FlaxBackend"}[backend])()

    yield build
    for name in [name for name in sys.modules if name.startswith("edited_")]:
        del sys.modules[name]


@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name.replace(" ", "_"))
def test_the_suite_notices(
    edited: Callable[[str, Edit], Any], oracle: Oracle, backend: str, edit: Edit
) -> None:
    real = load_subject(backend)
    subject = Subject(backend, edited(backend, edit), real.features, real.dtypes, tasks=real.tasks)
    (result,) = run_conformance(subject, [edit.case], oracle=oracle).results
    assert result.verdict is Verdict.FAIL, result


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_copy_without_an_edit_passes(
    edited: Callable[[str, Edit], Any], oracle: Oracle, backend: str
) -> None:
    real = load_subject(backend)
    copy = edited(backend, Edit("none", "model.py", "def ", "def "))
    subject = Subject(backend, copy, real.features, real.dtypes, tasks=real.tasks)
    cases = sorted({edit.case for edit in EDITS})
    results = run_conformance(subject, cases, oracle=oracle).results
    assert all(result.verdict is Verdict.PASS for result in results), results
