"""The second process: it finds what this one would, and a run does not hang on it."""

import subprocess
import sys
import time

import numpy as np
import pytest

from gemma_hub_conformance import ahead
from gemma_hub_conformance.ahead import truths_ahead
from gemma_hub_conformance.engine import run_case, select
from gemma_hub_conformance.mutants.bank import control
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import Verdict
from gemma_hub_conformance.seeds import seeded

IDS = (
    "L2.forward.one_token",
    "L5.attentions.gqa",
    "L5.gradients.causal.bias",
    "L3.bfloat16.forward.gqa.left_padding",
)


@pytest.fixture
def started(monkeypatch):
    """The processes that were started; however few the cases are, one is."""
    found = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(ahead, "FEWEST_CASES", 0)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(ahead.subprocess, "Popen", Noted)
    return found


def wait_for(condition):
    late = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < late
        time.sleep(0.05)


def flat(value):
    """All arrays in a result."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        return [array for each in value.values() for array in flat(each)]
    if isinstance(value, tuple):
        return [array for each in value for array in flat(each)]
    return [array for name in value.__slots__ for array in flat(getattr(value, name))]


def test_it_finds_the_same_bits(started):
    learnt, own = Oracle(), Oracle()
    with seeded(3):
        for case in select(IDS):
            run_case(case, control(), own)
    with truths_ahead(IDS, 3, learnt):
        wait_for(lambda: [*map(len, learnt._kept())] == [*map(len, own._kept())])
    for mine, theirs in zip(own._kept(), learnt._kept(), strict=True):
        assert mine
        assert mine.keys() == theirs.keys()
        for key in mine:
            for one, other in zip(flat(mine[key]), flat(theirs[key]), strict=True):
                np.testing.assert_array_equal(one, other)


def test_it_ends_with_the_run(started):
    with truths_ahead(IDS, 0, Oracle()):
        pass
    (process,) = started
    assert process.poll() is not None


def test_it_ends_with_a_run_that_is_broken_off(started):
    with pytest.raises(KeyboardInterrupt), truths_ahead(IDS, 0, Oracle()):
        raise KeyboardInterrupt
    assert started[0].poll() is not None


@pytest.mark.parametrize("script", ["raise SystemExit(3)", "print('no pickle', flush=True)"])
def test_a_run_goes_on_without_it(started, monkeypatch, script):
    monkeypatch.setattr(ahead, "_COMMAND", [sys.executable, "-c", script])
    oracle = Oracle()
    with truths_ahead(IDS, 0, oracle):
        started[0].wait(60)
        (case,) = select(IDS[:1])
        assert run_case(case, control(), oracle).verdict is Verdict.PASS


def test_what_is_known_stays():
    oracle = Oracle()
    oracle.learn(({"a": 1}, {}, {}))
    oracle.learn(({"a": 2, "b": 3}, {}, {"c": 4}))
    assert oracle.found_since([0, 0, 0]) == ({"a": 1, "b": 3}, {}, {"c": 4})
    assert oracle.found_since([1, 0, 0]) == ({"b": 3}, {}, {"c": 4})


@pytest.mark.parametrize(("cases", "processors"), [(1, 8), (200, 1), (200, None)])
def test_a_short_run_or_one_processor_has_none(monkeypatch, cases, processors):
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: processors)
    monkeypatch.setattr(ahead.subprocess, "Popen", None)
    with truths_ahead(["L2.forward.one_token"] * cases, 0, Oracle()):
        pass
