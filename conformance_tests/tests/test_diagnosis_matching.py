"""A known bug is named first, everywhere or in one layer; an unknown one is called unknown."""

import dataclasses
import json
import time

import pytest

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.diagnosis import diagnose
from gemma_hub_conformance.diagnosis.crashes import Crash
from gemma_hub_conformance.diagnosis.local import match_in_layer, shows_in_a_layer
from gemma_hub_conformance.diagnosis.matching import KnownBugs, match
from gemma_hub_conformance.diagnosis.misfits import misfit, misfit_limit
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.recording import observe
from gemma_hub_conformance.diagnosis.subjects import noisy, planted
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import Mutant, control
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.rows import Batch, row, tokens

FORWARD = "L2.forward.gqa.no_padding"
SAMPLE = sorted(name for name, mutant in all_mutants().items() if mutant.case == FORWARD)[::3]
IN_ONE_LAYER = ["mlp-silu", "mlp-gelu-in-bf16", "rope-q-only", "attn-scale-twice", "norm-in-bf16"]


def failing(*cases):
    results = [CaseResult(case, Verdict.FAIL, "wrong", 9.0, 9.0, 0.0) for case in cases]
    return Report("broken", tuple(results), (), selected=True)


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


def test_two_causes_are_told_apart(oracle):
    mutants = all_mutants()
    cap, scaling = mutants["head-softcap-missing"], mutants["rope-scaling-ignored"]
    both = Mutant("both", type("Both", (cap.kind, scaling.kind), {}), cap.case, "")
    some = ("head-softcap-missing", "rope-scaling-ignored", "rope-q-only", "mlp-gelu-erf")
    known = KnownBugs(oracle, {name: mutants[name] for name in some})
    report = failing(cap.case, scaling.case)
    causes = diagnose(noisy(both), report, oracle, known=known)
    assert [each.mutant for each in causes] == ["head-softcap-missing", "rope-scaling-ignored"]


def test_an_exception_is_compared_with_its_kind_only(oracle):
    """What does not raise has nothing in common with it, and 200 bugs take their time."""
    mutant = all_mutants()["stop-never-chosen"]
    first = observe(all_cases()[mutant.case], noisy(mutant), oracle)
    crash = Crash("KeyError", "x", "a.py", 1, "f", True)
    raised = dataclasses.replace(first, requirement=crash.text, crash=crash)
    known = KnownBugs(oracle)
    kind = [name for name, each in known.mutants.items() if each.case.startswith("L4.generation")]
    assert match(noisy(mutant), raised, known, seconds=99).compared == len(kind)


def test_where_the_likeliest_kind_has_the_bug_no_other_is_compared(known, oracle):
    mutant = all_mutants()["loss-not-shifted"]
    subject = noisy(mutant)
    found = match(subject, observe(all_cases()[mutant.case], subject, oracle), known, seconds=99)
    assert found.found.names == ("loss-not-shifted",)
    assert found.compared < len(known.mutants) / 2
    assert not found.late


def test_a_bug_whose_case_passed_is_not_compared(oracle):
    mutant = all_mutants()["loss-not-shifted"]
    subject, known = noisy(mutant), KnownBugs(oracle)
    first = observe(all_cases()[mutant.case], subject, oracle)
    assert match(subject, first, known, [mutant.case], 0.3).found is None


def test_a_bug_that_is_a_matter_of_rounding_is_named_too(known, oracle):
    """Its errors are others each time; by how much, it is compared with itself."""
    mutant = all_mutants()["loss-of-other-logits"]
    subject = noisy(mutant)
    first = observe(all_cases()[mutant.case], subject, oracle)
    alone = misfit(first, known.observation(mutant.name, mutant.case))
    assert alone > 2 * misfit_limit()
    assert match(subject, first, known, seconds=99).found.names == (mutant.name,)


def test_a_bug_that_is_mostly_chance_fits_nothing_else(oracle):
    mutants = all_mutants()
    chance = mutants["loss-rounded-to-bf16"]
    subject = noisy(mutants["loss-label-smoothing"])
    first = observe(all_cases()[chance.case], subject, oracle)
    only_that = KnownBugs(oracle, {chance.name: chance})
    assert match(subject, first, only_that, seconds=99).found is None


def test_what_a_bug_has_with_itself_is_taken_off_once(oracle, monkeypatch):
    mutants, names = all_mutants(), []

    def noted(self, value, name, case):
        names.append(name)
        return value

    monkeypatch.setattr(KnownBugs, "beyond_blur", noted)
    bug = mutants["loss-rounded-to-bf16"]
    two = KnownBugs(oracle, {each: mutants[each] for each in (bug.name, "rope-q-only")})
    subject = noisy(bug)
    assert match(subject, observe(all_cases()[bug.case], subject, oracle), two).compared == 2
    assert names == [bug.name]


def test_which_bugs_are_tried_in_one_layer():
    mutants = all_mutants()
    tried = [name for name, mutant in mutants.items() if shows_in_a_layer(mutant)]
    assert {"mlp-gelu-erf", "rope-q-only", "norm-in-bf16"} <= set(tried)
    assert not {"grad-rope-sign", "loss-not-shifted", "pool-first-token"} & set(tried)


def test_a_state_between_calls_is_called_so(oracle):
    mutant = all_mutants()["cache-not-new"]
    known = KnownBugs(oracle, {"cache-not-new": mutant})
    (found,) = diagnose(noisy(mutant), failing(mutant.case), oracle, known=known)
    assert found.branch == "state between calls"
    assert "from one call or model to the next" in found.text


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
    assert found.late or found.found
    assert found.matches[0].names == ("stop-never-chosen",)
