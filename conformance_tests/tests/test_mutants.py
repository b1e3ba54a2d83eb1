"""Every known bug is killed by the case that is there for it; what is right is left alone."""

import pytest

from gemma_hub_conformance.calibrate import SEEDS, witness
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.engine import run_conformance
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.report import Verdict

# One case of each kind of input; the whole suite ran on every seed when the limits were derived.
CONTROL_CASES = [
    "L2.forward.gqa.left_padding",
    "L2.forward.mha.right_padding",
    "L2.forward.small_limit.both_sides",
    "L2.positions.offset_8190",
    "L2.positions.packed",
    "L2.hidden_states.gqa",
    "L2.cache.chunks_of_7_9_7",
    "L3.bfloat16.forward.gqa.left_padding",
    "L5.sequence.logits.both_sides",
    "L5.causal.loss.left_padding",
    "L5.gradients.causal.bias",
]


@pytest.mark.parametrize("name", sorted(all_mutants()))
def test_the_mutant_is_killed_by_its_case(name, oracle):
    mutant = all_mutants()[name]
    (result,) = run_conformance(mutant.subject(), [mutant.case], oracle=oracle).results
    assert result.verdict is Verdict.FAIL, f"{mutant.hint} {result.message}"


def test_there_are_enough_mutants_and_each_has_a_hint():
    mutants = all_mutants().values()
    assert len(mutants) >= 200
    assert all(mutant.hint.endswith(".") for mutant in mutants)


def test_every_kind_of_case_of_level_5_has_a_mutant():
    level_5 = {id_ for id_ in all_cases() if id_.startswith("L5")}
    without = level_5 - {mutant.case for mutant in all_mutants().values()}
    # The same check under a padding or a type that adds nothing to what the others show.
    repeats = ("right_padding", "both_sides", "bfloat16")
    assert {id_ for id_ in without if not id_.endswith(repeats)} == set()


def test_most_cases_of_level_2_have_a_mutant_of_their_own_kind():
    behaviours = {".".join(id_.split(".")[:2]) for id_ in all_cases() if id_.startswith("L2")}
    covered = {".".join(mutant.case.split(".")[:2]) for mutant in all_mutants().values()}
    # padding.left_sweep repeats forward.left_padding at other widths.
    assert behaviours - covered == {"L2.padding"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_witness_with_a_fresh_seed_is_no_false_alarm(seed, oracle):
    report = run_conformance(witness(seed), CONTROL_CASES, oracle=oracle)
    assert [result.message for result in report.results if result.message] == []
    assert report.counts[Verdict.PASS] == len(CONTROL_CASES)
