"""The suite about itself: a case that is deleted, emptied, narrowed or loosened is noticed.

Two files pin the cases. manifest.json has what each does on a backend that is right, and
matrix.json what each does to every mutant. Both are written by a command, so that a change of them
is deliberate and shows in the diff.
"""

import ast
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from gemma_hub.error_model import RATIO_LIMIT, WORST_RATIO_LIMIT, judge, noise_band
from gemma_hub.errors import InputError
from gemma_hub_conformance import explain
from gemma_hub_conformance.called import overridden, traced
from gemma_hub_conformance.cases import all_cases, generation, masks, package
from gemma_hub_conformance.explain import entries, explanation, patterns_for
from gemma_hub_conformance.manifest import Measurer, changes, measure, recorded
from gemma_hub_conformance.matrix import SURVIVES, Killer, known_bugs, problems, run_cell, stored
from gemma_hub_conformance.mutants.bank import Mutant, StandInModel
from gemma_hub_conformance.pages import family, filled
from gemma_hub_numpy.model import Reference

MANIFEST = "If it is meant, run python -m gemma_hub_conformance.manifest"
MATRIX = (
    "Run python -m gemma_hub_conformance.matrix --jobs 2 (--only-missing for new cells only), and "
    "then python -m gemma_hub_conformance.pages docs/reference/mutant-matrix.md "
    "docs/reference/conformance-cases.md"
)

CASES = all_cases()
FACTS = recorded()
PINNED = list({family(id_): id_ for id_ in reversed(CASES) if id_ in FACTS}.values())
"""The first case of each family."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measurer(oracle) -> Measurer:
    return Measurer(oracle)


def noticed(case, measurer) -> list[str]:
    """What the manifest says to this case in the place of the one of its id."""
    before = {case.id: FACTS[case.id]}
    found, wrong = measure([case], measurer)
    return [*changes(before, found), *wrong]


# -- the manifest ----------------------------------------------------------------------------------


def test_the_manifest_has_every_case_and_no_other():
    assert list(FACTS) == list(CASES), MANIFEST


@pytest.mark.parametrize("id_", CASES)
def test_the_case_does_what_the_manifest_says(id_, measurer):
    assert id_ in FACTS, MANIFEST
    assert noticed(CASES[id_], measurer) == [], MANIFEST


def test_a_case_that_is_gone_is_noticed():
    for id_ in FACTS:
        rest = {other: each for other, each in FACTS.items() if other != id_}
        assert changes(FACTS, rest) == [f"gone: {id_}"]


def test_a_case_that_does_nothing_is_noticed(measurer):
    for case in (case for id_, case in CASES.items() if id_ in FACTS):
        empty = dataclasses.replace(case, run=lambda context: None)
        assert any("does nothing" in line for line in noticed(empty, measurer)), case.id
        assert any(line.startswith(f"other: {case.id}") for line in noticed(empty, measurer))


def half_compared(case):
    """The case, which compares every second row of numbers only."""

    def run(context):
        judged = context.judged

        def half(found, reference, witnesses):
            if len(reference) == 1:  # one vector, as of losses and gradients
                found, reference = found[:, ::2], reference[:, ::2]
                return judged(found, reference, tuple(each[:, ::2] for each in witnesses))
            return judged(found[::2], reference[::2], tuple(each[::2] for each in witnesses))

        context.judged = half
        case.run(context)

    return dataclasses.replace(case, run=run)


@pytest.mark.parametrize("id_", [id_ for id_ in PINNED if FACTS[id_].comparisons])
def test_a_case_that_compares_fewer_numbers_is_noticed(id_, measurer):
    assert any("values was" in line for line in noticed(half_compared(CASES[id_]), measurer))


@pytest.mark.parametrize("id_", [id_ for id_ in PINNED if FACTS[id_].requirements])
def test_a_case_that_checks_less_is_noticed(id_, measurer):
    def run(context):
        context.require = lambda condition, message: None
        CASES[id_].run(context)

    lenient = dataclasses.replace(CASES[id_], run=run)
    assert any("requirements was" in line for line in noticed(lenient, measurer))


@pytest.mark.parametrize("id_", PINNED)
def test_a_case_that_fewer_backends_must_pass_is_noticed(id_, measurer):
    needs = CASES[id_].needs | {"qk_norm"}
    choosy = dataclasses.replace(CASES[id_], needs=needs)
    assert any("needs was" in line for line in noticed(choosy, measurer))


# -- the matrix ------------------------------------------------------------------------------------


def test_the_matrix_is_of_these_cases_and_mutants():
    fresh = stored().fitted(keep_changed=False)
    assert fresh.mutants.keys() == stored().mutants.keys(), MATRIX
    assert fresh.cases.keys() == stored().cases.keys(), MATRIX
    stale = fresh.unknown()
    assert not stale, f"{len(stale)} cells are of other files, as {stale[:3]}. {MATRIX}"


def test_every_case_kills_and_every_mutant_is_killed_by_its_own_case():
    assert problems(stored().fitted(keep_changed=True)) == [], MATRIX


def weakest_models() -> dict[str, Killer]:
    """{case: the mutant that it kills with the least margin}, of those that run in this process."""
    found = {}
    for id_ in CASES:
        killers = stored().killers(id_)
        models = [each for each in killers if isinstance(known_bugs().get(each.mutant), Mutant)]
        # Last those so close to the limit that the noise of another processor may decide.
        models.sort(key=lambda killer: killer.cell in CLOSE)
        found |= {id_: models[0]} if models else {}
    return found


CLOSE = ("00", "01")
WEAKEST = weakest_models()


@pytest.mark.parametrize("id_", WEAKEST)
def test_the_case_still_kills_the_weakest_of_its_mutants(id_, oracle):
    mutant = known_bugs()[WEAKEST[id_].mutant]
    cell = run_cell(CASES[id_], mutant.subject(), oracle)
    assert cell != SURVIVES, f"{id_} was loosened: {mutant.name} passes. {MATRIX}"


def tolerant(case):
    """The case with a limit that is ten times too high."""

    def run(context):
        judged = context.judged

        def kind(found, reference, witnesses):
            judgement = judged(found, reference, witnesses)
            ratios = judgement.ratio / RATIO_LIMIT, judgement.worst_ratio / WORST_RATIO_LIMIT
            return dataclasses.replace(judgement, passed=max(ratios) < 10)

        context.judged = kind
        case.run(context)

    return dataclasses.replace(case, run=run)


LOOSE = {family(id_): id_ for id_, killer in WEAKEST.items() if (killer.margin or 9.0) < 2.6}


@pytest.mark.parametrize("id_", LOOSE.values())
def test_a_case_that_is_loosened_would_be_noticed(id_, oracle):
    mutant = known_bugs()[WEAKEST[id_].mutant]
    assert run_cell(tolerant(CASES[id_]), mutant.subject(), oracle) == SURVIVES


def test_only_cases_about_packages_have_no_model_to_kill():
    """Those kill plug-ins, which test_plugin_mutants installs one after the other."""
    without = CASES.keys() - WEAKEST.keys()
    assert {id_ for id_ in without if not id_.startswith("L0.")} == set(), MATRIX


def test_a_mutant_is_run_where_something_that_it_overrides_is_called(oracle):
    """The other cells of the matrix are no guess: there the mutant is the reference."""
    called = set()
    run_cell(CASES["L2.forward.one_token"], traced(called), oracle)
    bugs = known_bugs()
    assert overridden(bugs["attn-softmax-over-queries"]) == {(Reference, "softmax")} <= called
    assert overridden(bugs["grad-embedding-scale-missing"]).isdisjoint(called)
    assert overridden(bugs["cache-overflow-clamp"]) == {(StandInModel, "extend")}
    without_method = dataclasses.replace(
        bugs["cache-overflow-clamp"], kind=type("NoCache", (StandInModel,), {"extend": None})
    )
    assert overridden(without_method) is None  # a case may ask without calling


# -- the limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["ratio", "worst_ratio"])
def test_what_is_above_a_limit_fails_and_what_is_below_passes(limit):
    """The calibrated limits, which test_calibration compares with their evidence, decide."""
    rng = np.random.default_rng(5)
    truth = rng.standard_normal((40, 30))
    noise = [1e-6 * rng.standard_normal(truth.shape) for _ in range(9)]
    band = noise_band(truth, tuple(truth + each for each in noise[1:]))
    error = 1e-6 * np.sign(noise[0])  # of one size everywhere, so that no element stands out
    if limit == "worst_ratio":
        error[1:] = 0.0
        error[0, 1:] = 0.0
    unit = getattr(judge(truth + error, truth, band), limit)
    largest = {"ratio": RATIO_LIMIT, "worst_ratio": WORST_RATIO_LIMIT}[limit]
    for times, passes in ((0.99, True), (1.01, False)):
        judgement = judge(truth + error * times * largest / unit, truth, band)
        other = "worst_ratio" if limit == "ratio" else "ratio"
        assert getattr(judgement, other) < 4.0  # so that it does not decide
        assert judgement.passed is passes


TOLERANT = {"allclose", "isclose", "approx", "assert_allclose", "atol", "rtol"}


def names_in(path: Path) -> set[str]:
    """Every name, attribute and keyword of a file."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}


def test_no_case_has_a_tolerance_of_its_own():
    files = sorted(Path(package.__file__).parent.glob("*.py"))
    assert len(files) > 20
    tolerant = {path.name: names_in(path) & TOLERANT for path in files}
    assert {name: found for name, found in tolerant.items() if found} == {}


def test_the_numbers_that_decide_beside_the_limits_are_these():
    assert (masks.VISIBLE, generation.CERTAIN, package.BUSY) == (100.0, 8.0, 4.0)


# -- the documentation -----------------------------------------------------------------------------


@pytest.mark.parametrize("id_", CASES)
def test_the_case_is_explained(id_):
    found = explanation(id_)
    assert CASES[id_].doc in found.what
    assert found.needs == tuple(sorted(CASES[id_].needs))
    assert 2 <= len(re.findall(r"[.?](?: |$)", found.why)) <= 4, found.why


@pytest.mark.parametrize("key", ["compares", "why"])
def test_one_explanation_decides(key):
    """No two patterns of a case are as specific as one another."""
    for id_ in CASES:
        sizes = [len(pattern.replace("*", "")) for pattern in patterns_for(id_, key)]
        assert sizes.count(max(sizes)) == 1, patterns_for(id_, key)


def test_every_explanation_is_of_some_case():
    used = {pattern for id_ in CASES for pattern in patterns_for(id_, "why")}
    used |= {pattern for id_ in CASES for pattern in patterns_for(id_, "compares")}
    assert set(entries()) - used == set(), "these patterns match no case"
    assert all(entry.keys() <= {"compares", "why"} for entry in entries().values())


def test_a_case_without_an_explanation_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(explain, "entries", lambda: {"L1.*": {"why": "Because."}})
    with pytest.raises(InputError, match=r"no 'compares' for the case 'L2\.forward\.one_token'"):
        explanation("L2.forward.one_token")


@pytest.mark.parametrize("page", ["conformance-cases.md", "mutant-matrix.md"])
def test_the_page_is_up_to_date(page):
    text = (ROOT / "docs" / "reference" / page).read_text("utf-8")
    command = f"run python -m gemma_hub_conformance.pages docs/reference/{page}"
    assert filled(text) == text, command
    assert len(text) < 300_000


def test_every_case_and_every_mutant_has_an_anchor_on_its_page():
    folder = ROOT / "docs" / "reference"
    for page, names in (("conformance-cases.md", CASES), ("mutant-matrix.md", known_bugs())):
        anchors = re.findall(r'<a id="([^"]+)">', (folder / page).read_text("utf-8"))
        assert sorted(anchors) == sorted(names)
