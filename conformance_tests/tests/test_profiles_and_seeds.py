"""Profiles cover the suite; a seed other than 0 draws everything anew."""

import numpy as np
import pytest

from gemma_hub.errors import InputError
from gemma_hub_conformance.checkpoints import CHECKPOINTS
from gemma_hub_conformance.engine import load_subject, run_conformance, select
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.oracle import witness_seeds
from gemma_hub_conformance.profiles import PROFILES, required_cases
from gemma_hub_conformance.report import Verdict
from gemma_hub_conformance.rows import tokens
from gemma_hub_conformance.seeds import current_seed, seeded

CASES = ["L2.forward.gqa.left_padding", "L2.cache.chunks_of_3", "L5.gradients.causal.bias"]


def test_every_required_case_is_in_a_profile_and_full_has_all():
    assert required_cases("full") == tuple(required_cases())
    parts = [set(required_cases(name)) for name in ("core", "bf16", "training")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    heads = set(required_cases()) - set().union(*parts)
    assert heads
    assert all(id_.startswith("L5") for id_ in heads)


def test_a_profile_runs_its_cases_and_no_others():
    ids = [case.id for case in select(profile="bf16")]
    assert tuple(ids) == required_cases("bf16")
    report = run_conformance(load_subject("numpy"), profile="bf16")
    assert (report.exit_code, report.profile) == (0, "bf16")
    assert "(bf16)" in report.summary
    with pytest.raises(InputError, match="not in the profile 'bf16'"):
        select(["L2.forward.one_token"], "bf16")
    with pytest.raises(InputError, match=r"no profile 'bf61'\. Did you mean 'bf16'"):
        select(profile="bf61")
    assert set(PROFILES) == {"core", "bf16", "training", "full"}


def drawn():
    weights = CHECKPOINTS["gqa"].weights("float32")
    return tokens(9, 3), weights.read("model.norm.weight").copy(), tuple(witness_seeds())


def test_a_seed_draws_weights_inputs_and_witnesses_anew():
    usual = drawn()
    with seeded(1):
        assert current_seed() == 1
        first, again = drawn(), drawn()
    with seeded(2):
        second = drawn()
    assert current_seed() == 0
    assert np.array_equal(first[1], again[1])
    assert first[0] == again[0]
    for one, other in ((usual, first), (usual, second), (first, second)):
        assert one[0] != other[0]
        assert not np.array_equal(one[1], other[1])
        assert set(one[2]).isdisjoint(other[2])
    assert np.array_equal(drawn()[1], usual[1])


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1"])
def test_a_seed_that_is_none(seed):
    with pytest.raises(InputError, match="expected an integer from 0 up"):
        run_conformance(load_subject("numpy"), CASES, seed=seed)


def test_with_a_fresh_seed_right_is_right_and_wrong_is_wrong():
    report = run_conformance(load_subject("torch"), CASES, seed=20_261_126)
    assert report.counts[Verdict.PASS] == len(CASES), report.to_json()
    for name in ("mlp-gelu-erf", "rope-interleaved", "grad-of-sum"):
        mutant = all_mutants()[name]
        wrong = run_conformance(mutant.subject(), [mutant.case], seed=20_261_126)
        assert wrong.counts[Verdict.FAIL] == 1, name
