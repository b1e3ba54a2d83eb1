"""A known bug is named first, everywhere or in one layer; an unknown one is called unknown."""

import json
import time

import numpy as np
import pytest

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.diagnosis import diagnose
from gemma_hub_conformance.diagnosis.local import match_in_layer
from gemma_hub_conformance.diagnosis.matching import KnownBugs, match
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.recording import Seen, observe
from gemma_hub_conformance.diagnosis.subjects import noisy, planted
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import Mutant, control
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_numpy.model import Reference

FORWARD = "L2.forward.gqa.no_padding"
SAMPLE = sorted(name for name, mutant in all_mutants().items() if mutant.case == FORWARD)[::3]
IN_ONE_LAYER = ["mlp-silu", "mlp-gelu-in-bf16", "rope-q-only", "attn-scale-twice", "norm-in-bf16"]


def failing(*cases):
    results = [CaseResult(case, Verdict.FAIL, "wrong", 9.0, 9.0, 0.0) for case in cases]
    return Report("broken", tuple(results), (), selected=True)


def unknown(change):
    """A backend whose activation is off in a way that no mutant is."""

    class Unknown(Reference):
        def activation(self, x):
            return change(super().activation(x))

    return noisy(Mutant("unknown", Unknown, FORWARD, ""))


@pytest.fixture(scope="module")
def known(oracle):
    return KnownBugs(oracle)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_bug_with_rounding_noise_is_named_first(name, known, oracle):
    subject = noisy(all_mutants()[name])
    found = match(subject, observe(all_cases()[FORWARD], subject, oracle), known, (), 99).found
    assert found is not None
    assert name in found.names
    assert found.alignment > 0.95


@pytest.mark.parametrize("name", IN_ONE_LAYER)
def test_a_bug_in_one_layer_is_named_first(name, oracle):
    seen = Seen(GQA, Batch.of([row(tokens(9, 71))], 9), None)
    prober = Prober(planted(all_mutants()[name].kind, 1), "float32", oracle)
    found = match_in_layer(prober, seen, 1, all_mutants())
    assert name in found.names
    assert found.fits


def test_a_right_backend_matches_nothing(known, oracle):
    first = observe(all_cases()[FORWARD], control(), oracle)
    assert not first.failed
    assert match(control(), first, known).found is None


def test_a_diagnosis_names_bug_layer_branch_and_input(oracle):
    start = time.process_time()
    told = []
    subject = planted(all_mutants()["rope-q-only"].kind, 2)
    (found,) = diagnose(subject, failing(FORWARD), oracle, progress=told.append)
    assert time.process_time() - start < 20
    assert (found.mutant, found.layer, found.branch) == ("rope-q-only", 2, "attention")
    assert found.advice == "Rotate the keys too."
    assert found.alignment == pytest.approx(1, abs=1e-3)
    assert len(found.shortest_input) == 2
    assert "in layer 2 only" in found.text
    assert "rotary positions" in found.text
    assert f"repeating {FORWARD}" in told
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "failure" not in found.to_dict()


def test_an_unknown_bug_is_called_unknown_and_still_located(known, oracle):
    (found,) = diagnose(
        unknown(lambda x: 1.1 * x + 0.03 * np.sin(5 * x)), failing(FORWARD), oracle, known=known
    )
    assert found.mutant is None
    assert abs(found.alignment) < 0.95
    assert "no known bug fits. The nearest" in found.text
    assert (found.layer, found.branch) == (0, "feed-forward")
    assert "layer 0: feed-forward" in found.advice


def test_two_causes_are_told_apart(oracle):
    mutants = all_mutants()
    cap, scaling = mutants["head-softcap-missing"], mutants["rope-scaling-ignored"]
    both = Mutant("both", type("Both", (cap.kind, scaling.kind), {}), cap.case, "")
    some = ("head-softcap-missing", "rope-scaling-ignored", "rope-q-only", "mlp-gelu-erf")
    known = KnownBugs(oracle, {name: mutants[name] for name in some})
    report = failing(cap.case, scaling.case)
    causes = diagnose(noisy(both), report, oracle, known=known)
    assert [each.mutant for each in causes] == ["head-softcap-missing", "rope-scaling-ignored"]


def test_a_failure_of_gradients_is_named_without_a_layer(oracle):
    case = "L5.gradients.causal.gqa"
    bugs = {name: mutant for name, mutant in all_mutants().items() if "rope" in name}
    (found,) = diagnose(
        noisy(bugs["grad-rope-sign"]), failing(case), oracle, known=KnownBugs(oracle, bugs)
    )
    assert found.mutant == "grad-rope-sign"
    assert (found.layer, found.branch, found.shortest_input) == (None, None, ())
    assert found.failure is None


def test_a_failure_that_does_not_come_again_is_called_so(oracle):
    (found,) = diagnose(control(), failing(FORWARD), oracle)
    assert found.mutant is None
    assert "does not repeat itself" in found.text


def test_nothing_failed_nothing_found(oracle):
    assert diagnose(control(), Report("right", (), (), selected=True), oracle) == ()


def test_without_time_the_likeliest_bugs_are_compared(oracle):
    mutant = all_mutants()["stop-never-chosen"]
    subject = noisy(mutant)
    first = observe(all_cases()[mutant.case], subject, oracle)
    ticking = KnownBugs(oracle)
    found = match(subject, first, ticking, seconds=0.5)
    assert 1 <= found.compared < len(ticking.mutants)
    assert found.matches[0].names == ("stop-never-chosen",)
