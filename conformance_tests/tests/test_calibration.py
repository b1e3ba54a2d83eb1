"""The limits in the error model are the derived ones, and the pages say what the code does."""

import json
from pathlib import Path

import pytest

from gemma_hub.error_model import RATIO_LIMIT, WORST_RATIO_LIMIT
from gemma_hub_conformance.calibrate import PATH, Limit, Observation, witness
from gemma_hub_conformance.engine import load_subject, run_conformance
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.pages import filled

CONTENT = json.loads(PATH.read_text(encoding="utf-8"))
LIMITS = {"ratio": RATIO_LIMIT, "worst_ratio": WORST_RATIO_LIMIT}
DOCS = Path(__file__).parents[2] / "docs"


def _observation(name: str, which: str) -> Observation:
    return Observation(**CONTENT[name][which])


@pytest.mark.parametrize("name", LIMITS)
def test_the_constant_is_the_one_that_the_evidence_gives(name):
    derived = Limit.between(
        [_observation(name, "worst_valid")], [_observation(name, "weakest_mutant")]
    )
    assert derived.limit == CONTENT[name]["limit"] == LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_has_room_on_both_sides(name):
    assert _observation(name, "worst_valid").value * 1.5 < LIMITS[name]
    assert _observation(name, "weakest_mutant").value / 1.5 > LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_the_evidence_can_be_seen_again(name, oracle):
    worst, weakest = _observation(name, "worst_valid"), _observation(name, "weakest_mutant")
    is_witness = worst.run.startswith("witness ")
    valid = witness(int(worst.run.split()[1])) if is_witness else load_subject(worst.run)
    mutant = all_mutants()[weakest.run].subject()
    (right,) = run_conformance(valid, [worst.case], oracle=oracle).results
    (wrong,) = run_conformance(mutant, [weakest.case], oracle=oracle).results
    # Not the same figures: witnesses sum in an order that is the processor's in part.
    assert getattr(right, name) < 1.1 * worst.value
    assert getattr(wrong, name) > weakest.value / 1.1


def test_every_backend_of_the_repository_was_among_the_valid_runs():
    assert {"control", "torch", "flax"} <= set(CONTENT["valid_runs"])
    assert CONTENT["mutants"] == len(all_mutants())


def test_overlapping_evidence_gives_no_limit():
    with pytest.raises(ValueError, match="no limit separates them"):
        Limit.between([Observation(2.0, "right", "a")], [Observation(1.5, "wrong", "b")])


@pytest.mark.parametrize("page", ["reference/conformance.md", "explanation/error-model.md"])
def test_the_generated_parts_of_the_page_are_up_to_date(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert "<!-- generated:" in text
    assert filled(text) == text, "run python -m gemma_hub_conformance.pages docs/" + page
