"""The limit of the misfit follows from its evidence, and the evidence can be seen again."""

import json

import pytest

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.diagnosis.local import ranked_in_layer
from gemma_hub_conformance.diagnosis.matching import KnownBugs, match
from gemma_hub_conformance.diagnosis.measure import LAYER, Tally, calibration
from gemma_hub_conformance.diagnosis.misfits import PATH, Naming, limit_between, misfit_limit
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.recording import observe
from gemma_hub_conformance.diagnosis.subjects import noisy, planted
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.rows import Batch, row, tokens

CONTENT = json.loads(PATH.read_text(encoding="utf-8"))
RIGHT, WRONG = (Naming(**CONTENT[which]) for which in ("largest_right", "smallest_wrong"))


def measured(naming, oracle):
    """The misfit of the two bugs of `naming`, as it is now."""
    mutants = {name: all_mutants()[name] for name in (naming.bug, naming.known)}
    if naming.case == f"layer {LAYER}":
        seen = Seen(GQA, Batch.of([row(tokens(23, 1)), row(tokens(17, 2), left=6)], 23), None)
        prober = Prober(planted(mutants[naming.bug].kind, LAYER), "float32", oracle)
        return ranked_in_layer(prober, seen, LAYER, mutants).misfits[naming.known]
    subject = noisy(mutants[naming.bug])
    first = observe(all_cases()[naming.case], subject, oracle)
    return match(subject, first, KnownBugs(oracle, mutants), (), 99).misfits[naming.known]


def test_the_limit_is_the_one_that_the_evidence_gives():
    assert limit_between(RIGHT, WRONG) == CONTENT["misfit_limit"] == misfit_limit()
    assert RIGHT.misfit < misfit_limit() < WRONG.misfit
    assert RIGHT.bug == RIGHT.known
    assert WRONG.bug != WRONG.known


@pytest.mark.parametrize("naming", [RIGHT, WRONG], ids=["largest_right", "smallest_wrong"])
def test_the_evidence_can_be_seen_again(naming, oracle):
    assert measured(naming, oracle) == pytest.approx(naming.misfit, rel=0.1)


def test_every_known_bug_was_measured_and_at_least_nine_in_ten_are_named():
    assert CONTENT["mutants"] == len(all_mutants())
    missed = [Naming(**each) for each in CONTENT["never_alike"]]
    assert len(missed) < 0.1 * CONTENT["mutants"]
    assert all(each.misfit >= WRONG.misfit for each in missed)


def test_overlapping_evidence_gives_no_limit():
    right, wrong = Naming(0.3, "a", "a", "case"), Naming(0.2, "b", "a", "case")
    with pytest.raises(ValueError, match="no limit separates them"):
        limit_between(right, wrong)


def test_what_is_never_alike_takes_no_part_in_the_limit_and_is_listed():
    tally = Tally()
    tally.note("a", "case", {"a": 0.01, "b": 0.5, "c": 0.04}, ("a", "c"))
    tally.note("b", "case", {"a": 0.16, "b": 0.9}, ("b",))
    content = calibration(tally)
    assert content["misfit_limit"] == 0.04
    assert content["largest_right"]["bug"] == "a"
    assert content["smallest_wrong"] == {"misfit": 0.16, "bug": "b", "known": "a", "case": "case"}
    assert [each["bug"] for each in content["never_alike"]] == ["b"]
