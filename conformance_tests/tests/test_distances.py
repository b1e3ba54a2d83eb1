"""Distances between backends: right ones are close, a wrong one stands apart, none breaks it."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from gemma_hub.error_model import RATIO_LIMIT
from gemma_hub.errors import InputError
from gemma_hub_conformance import distances
from gemma_hub_conformance.distances import REFERENCE, measure_distances
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import DTYPES, FEATURES, StandInBackend, StandInModel
from gemma_hub_conformance.seeds import current_seed
from gemma_hub_conformance.spec import Subject
from gemma_hub_numpy.backend import NumpyBackend
from gemma_hub_numpy.model import Reference


@pytest.fixture(autouse=True)
def one_checkpoint(monkeypatch):
    monkeypatch.setattr(distances, "COMPARED", ("gqa",))


def correct(name, seed):
    """A right float32 backend with roundings of its own."""
    return Subject(name, NumpyBackend(), FEATURES, DTYPES, extra={"witness": seed})


def of_model(kind, name="subject", features=FEATURES, dtypes=DTYPES, **rest):
    return Subject(name, StandInBackend(Reference, kind), features, dtypes, **rest)


def changed(change):
    """A model whose logits are `change` of the right ones."""

    class Changed(StandInModel):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            return dataclasses.replace(outputs, logits=change(outputs.logits))

    return Changed


def ratios(found):
    return {(each.first, each.second, each.way): each.ratio for each in found}


def test_right_backends_are_as_far_apart_as_roundings(oracle):
    found = measure_distances([correct("a", 1), correct("b", 2)], oracle)
    by_pair = ratios(found)
    assert len(found) == len(by_pair) == 3 * 2  # pairs, ways
    assert not [each for each in found if each.reason]
    for way in ("forward", "cache"):
        from_truth = [by_pair[REFERENCE, name, way] for name in "ab"]
        assert all(0.5 < ratio < 2 for ratio in from_truth)
        assert by_pair["a", "b", way] == pytest.approx(2**0.5, rel=0.3)


def test_a_distance_has_no_direction(oracle):
    a, b = correct("a", 1), correct("b", 2)
    one, other = (
        ratios(measure_distances([a, b], oracle)),
        ratios(measure_distances([b, a], oracle)),
    )
    for way in ("forward", "cache"):
        assert one["a", "b", way] == pytest.approx(other["b", "a", way], rel=1e-9)


def test_a_wrong_backend_stands_apart_from_all_others(oracle):
    wrong = all_mutants()["mlp-gelu-erf"].subject()
    found = measure_distances([wrong, correct("a", 1), correct("b", 2)], oracle)
    for (first, second, _), ratio in ratios(found).items():
        if wrong.name in (first, second):
            assert ratio > 2 * RATIO_LIMIT
        else:
            assert ratio < RATIO_LIMIT


def test_two_that_are_far_apart_are_not_both_near_the_truth(oracle):
    # What the page says of twice the limit; it holds since a distance is a norm.
    subjects = [
        correct("a", 1),
        all_mutants()["mlp-gelu-erf"].subject(),
        of_model(changed(np.tanh)),
    ]
    names = [REFERENCE, *(each.name for each in subjects)]
    by_pair = ratios(measure_distances(subjects, oracle))
    for way in ("forward", "cache"):
        for first, second in itertools.combinations(names[1:], 2):
            sides = sum(by_pair[REFERENCE, name, way] for name in (first, second))
            assert by_pair[first, second, way] <= sides * (1 + 1e-9)


def fail(error):
    def change(_):
        raise error

    return changed(change)


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        (of_model(fail(ZeroDivisionError("on purpose"))), "subject: ZeroDivisionError: on purpose"),
        (of_model(fail(SystemExit(0))), "subject: SystemExit: 0"),
        (of_model(changed(lambda x: x[1:])), "subject: the logits have shape (2, 23, "),
        (of_model(changed(lambda _: None)), "subject: the logits have shape ()"),
        (of_model(changed(lambda _: "nothing")), "subject: AttributeError: 'str' object"),
        (of_model(StandInModel, dtypes=("bfloat16",)), "subject: does not claim the dtype"),
    ],
    ids=["raises", "exits", "shape", "none", "text", "dtype"],
)  # fmt: skip
def test_what_gives_no_logits_has_a_reason_and_stops_nobody(oracle, subject, says):
    found = measure_distances([correct("a", 1), subject], oracle)
    for each in found:
        if each.way == "forward" and "subject" in (each.first, each.second):
            assert each.ratio is None
            assert each.reason.startswith(says)
    assert ratios(found)[REFERENCE, "a", "forward"] < 2
    assert ratios(found)[REFERENCE, "a", "cache"] < 2


def test_a_backend_without_a_cache_is_compared_without_one(oracle):
    subject = of_model(StandInModel, features=FEATURES - {"cache"})
    forward, cache = measure_distances([subject], oracle)
    assert forward.ratio < RATIO_LIMIT
    assert (cache.ratio, cache.reason) == (None, "subject: does not claim 'cache'")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_far_also_from_the_same(oracle, value):
    first, second = (of_model(changed(lambda x: np.full_like(x, value)), name) for name in "ab")
    found = ratios(measure_distances([first, second], oracle))
    pairs = itertools.combinations((REFERENCE, "a", "b"), 2)
    assert {found[*pair, "forward"] for pair in pairs} == {np.inf}


def test_a_backend_that_hangs_is_called_once(oracle):
    calls = []

    def hang(_):
        calls.append(1)
        time.sleep(60)

    subject = of_model(changed(hang), time_limit=0.5)
    forward, cache = measure_distances([subject], oracle)
    assert forward.reason == "subject: did not finish within 0.5 s"
    assert cache.reason == "subject: not run: gqa, forward did not finish within 0.5 s"
    assert calls == [1]


def test_a_backend_that_hung_in_the_cases_is_not_called(oracle):
    subject = of_model(fail(AssertionError("called")), harm="L1.x did not finish within 1 s")
    assert {each.reason for each in measure_distances([subject], oracle)} == {
        "subject: not run: L1.x did not finish within 1 s"
    }


def test_the_seed_is_that_of_the_run_and_ends_with_it(oracle):
    # A fresh subject for each: its models are kept by the seed that they were built under.
    first, other = (measure_distances([correct("a", 1)], oracle, seed=seed) for seed in (0, 5))
    assert first[0].ratio != other[0].ratio
    assert measure_distances([correct("a", 1)], oracle)[0].ratio == first[0].ratio
    assert current_seed() == 0
    with pytest.raises(InputError, match="The seed is -1"):
        measure_distances([correct("a", 1)], oracle, seed=-1)


def test_progress_is_told(oracle):
    told = []
    measure_distances([correct("a", 1)], oracle, progress=told.append)
    assert told == ["comparing backends: gqa, forward", "comparing backends: gqa, cache"]


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(run):
    """Of one case that is quick."""
    return lambda *arguments: run(*arguments, "--case", "L1.contract.devices")


def test_the_command_compares_and_writes_it_down(run, tmp_path):
    path = tmp_path / "report.json"
    outcome = run("numpy", "--compare", "torch", "--compare", "torch", "--json", str(path))
    assert outcome.exit_code == 0, outcome.output
    assert "Distance of their logits, in units of rounding noise" in outcome.output
    found = json.loads(path.read_text())["distances"]
    pairs = [(each["first"], each["second"]) for each in found if each["way"] == "cache"]
    assert pairs == [(REFERENCE, "numpy"), (REFERENCE, "torch"), ("numpy", "torch")]
    assert all(each["ratio"] < RATIO_LIMIT for each in found)


def test_a_wrong_backend_to_compare_with_changes_no_verdict(run, monkeypatch):
    wrong = all_mutants()["mlp-gelu-erf"].subject()
    monkeypatch.setattr("gemma_hub_conformance.command._others", lambda *_: [wrong])
    outcome = run("numpy", "--compare", "wrong")
    assert outcome.exit_code == 0, outcome.output
    assert "mlp-gelu-erf" in outcome.output


@pytest.mark.parametrize("name", ["numpy", "gemma-hub-numpy:numpy"])
def test_a_backend_is_not_compared_with_itself(run, name):
    outcome = run("numpy", "--compare", name)
    assert outcome.exit_code == 2
    assert "--compare numpy is the backend under test; name another one." in outcome.output


def test_an_unknown_backend_to_compare_with_exits_3_before_the_run(run):
    outcome = run("numpy", "--compare", "abacus")
    assert outcome.exit_code == 3
    assert "abacus" in outcome.output
    assert "numpy passes" not in outcome.output
