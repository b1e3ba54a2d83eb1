"""The catalogue is whole, what it names is there, and the bugs that only bits show are not here."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import DTYPES, ArrayWeights
from gemma_hub_conformance import catalogue
from gemma_hub_conformance.cases.liveness import ONE_LAYER
from gemma_hub_conformance.engine import load_subject

ROOT = Path(__file__).parents[2]
RECORDS = ROOT.parent / "shared" / "reference" / "porting_bugs.json"
PAGE = ROOT / "docs" / "reference" / "porting-bugs.md"
GUARD = {"mutants": ["mlp-gelu-erf"]}
BUG = {"id": "a-bug", "what": "Something.", "seen": []}


# -- the list --------------------------------------------------------------------------------------


@pytest.mark.skipif(not RECORDS.exists(), reason="the records are not beside this checkout")
def test_every_recorded_bug_is_in_the_catalogue():
    recorded = [record["id"] for record in json.loads(RECORDS.read_text("utf-8"))]
    assert [bug.id for bug in catalogue.bugs()] == recorded


def test_every_bug_has_one_line_and_one_guard():
    bugs = catalogue.bugs()
    assert len(bugs) >= 112
    assert len({bug.id for bug in bugs}) == len(bugs)
    for bug in bugs:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", bug.id)
        assert bug.what.endswith(".")
        assert "|" not in bug.what + bug.outside
        assert sum(map(bool, (bug.mutants, bug.elsewhere, bug.outside))) == 1


def test_bugs_of_numbers_have_mutants():
    """Outside and elsewhere are exceptions for those that a backend's numbers could show."""
    families = ("norm", "emb", "rope", "pos", "attn", "swa", "mlp", "head", "cache", "pad", "loss")
    of_numbers = [bug for bug in catalogue.bugs() if bug.id.split("-")[0] in families]
    assert sum(bool(bug.mutants) for bug in of_numbers) >= 0.75 * len(of_numbers)


def test_every_test_that_is_named_is_there():
    for bug in catalogue.bugs():
        if "::" not in bug.elsewhere:
            continue
        path, name = bug.elsewhere.split("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text("utf-8"), bug.elsewhere


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (GUARD, "without an id: the keys are"),
        ({**BUG, **GUARD, "colour": "red"}, "a-bug: the keys are"),
        (BUG, "exactly one of"),
        ({**BUG, **GUARD, "outside": "It is not here."}, "exactly one of"),
        ({**BUG, "mutants": ["mlp-gelu-erf", "no-such"]}, "no mutant no-such"),
        ({**BUG, "elsewhere": "L2.no.such"}, r"no case L2\.no\.such"),
    ],
    ids=["no id", "unknown key", "no guard", "two guards", "no mutant", "no case"],
)
def test_what_is_wrong_with_an_entry_is_said(entry, message):
    with pytest.raises(RuntimeError, match=message):
        catalogue.bug_of(entry)


def test_the_page_is_up_to_date():
    text = PAGE.read_text("utf-8")
    (part,) = re.findall(r"<!-- generated: bugs -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert part == catalogue.table(), f"run python -m gemma_hub_conformance.pages {PAGE}"


# -- bugs that only bits show ----------------------------------------------------------------------


def states_of(backend: str, dtype: str, size: float = 1.0) -> tuple[np.ndarray, ...]:
    """The hidden states of a model whose layer adds nothing, and what they should be.

    In such a model the first state is the scaled embedding and the second is that, normed, so that
    one operation each is seen from outside.

    Args:
        backend: its name.
        dtype: compute type.
        size: factor on the embedding.

    Returns:
        (T, D) float64 embedding and norm as found, and the same as the rules have them.
    """
    kind, config = DTYPES[dtype], ONE_LAYER.config
    original = ONE_LAYER.weights()
    arrays = {name: original.read(name) * 1.0 for name in original.names()}
    for name in arrays:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            arrays[name] *= 0.0
    arrays["model.embed_tokens.weight"] *= size
    arrays = {name: array.astype(kind) for name, array in arrays.items()}
    model = load_subject(backend).backend.build(
        config, TaskSpec("causal_lm"), ArrayWeights(arrays), BuildOptions(dtype=dtype)
    )
    ids = np.arange(12, 112)[None]
    outputs = model.forward(ModelInputs.prepare(config, ids, output_hidden_states=True)).to_numpy()
    found = [state[0].astype(np.float64) for state in outputs.hidden_states]
    table = arrays["model.embed_tokens.weight"][ids[0]].astype(np.float64)
    x = (table * float(kind.type(config.embedding_scale))).astype(kind).astype(np.float64)
    factor = config.rms_norm_offset + arrays["model.norm.weight"].astype(np.float64)
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps)
    normed = (x / root * factor).astype(kind).astype(np.float64)
    return found[0], found[-1], x, normed


BACKENDS = pytest.mark.parametrize("backend", ["torch", "flax"])


@BACKENDS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_embedding_scale_is_rounded(backend, dtype):
    found, _, expected, _ = states_of(backend, dtype)
    np.testing.assert_array_equal(found, expected)


@BACKENDS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_norm_is_cast_once(backend, dtype):
    """Of a norm that casts before it multiplies, a third of the results differ by a bit."""
    _, found, _, expected = states_of(backend, dtype)
    assert np.mean(found == expected) > 0.99


@BACKENDS
def test_a_norm_squares_in_float32(backend):
    _, found, x, expected = states_of(backend, "float16", size=400.0)
    assert (np.abs(x) > 256).any()  # whose square float16 does not have
    assert np.mean(found == expected) > 0.99
