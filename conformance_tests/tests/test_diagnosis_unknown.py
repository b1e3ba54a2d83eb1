"""Six bugs that are in no bank, each in one layer: called unknown, and found all the same."""

import dataclasses
import math

import numpy as np
import pytest

from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.diagnosis import diagnose
from gemma_hub_conformance.diagnosis.bisection import find_layer
from gemma_hub_conformance.diagnosis.branches import find_place_in_layer
from gemma_hub_conformance.diagnosis.diagnosing import branch_of
from gemma_hub_conformance.diagnosis.matching import KnownBugs
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.subjects import planted
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_numpy.model import Reference

BATCH = Batch.of([row(tokens(9, 71)), row(tokens(6, 72), left=2)], 9)
CASE = "L2.forward.gqa.no_padding"


class WavyActivation(Reference):
    def activation(self, x):
        return super().activation(x) + 0.04 * x * np.sin(3 * x)


class GateOfNeighbour(Reference):
    def mlp(self, i, x):
        at = f"model.layers.{i}.mlp"
        active = self.activation(self.linear(x, f"{at}.gate_proj"))
        product = self.store(np.roll(active, 3, axis=-1) * self.linear(x, f"{at}.up_proj"))
        return self.linear(product, f"{at}.down_proj")


class LoudLastHead(Reference):
    def mix(self, probs, v):
        mixed = super().mix(probs, v)
        mixed[:, :, -1] *= 1.37
        return mixed


class DistanceCounts(Reference):
    def scores(self, q, k):
        scores = super().scores(q, k)
        queries, keys = np.arange(scores.shape[-2])[:, None], np.arange(scores.shape[-1])
        return scores * (1 + 0.11 * (queries - keys))


class OneAngleStands(Reference):
    def angles(self, positions, layer):
        angles = super().angles(positions, layer).copy()
        angles[..., 2] = 0.0
        return angles


class HalfNormed(Reference):
    def rms_norm(self, x, weight):
        normed = super().rms_norm(x, weight)
        half = x.shape[-1] // 2
        return np.concatenate([normed[..., :half], 0.83 * normed[..., half:]], axis=-1)


BUGS = {
    WavyActivation: ("feed-forward", "activation"),
    GateOfNeighbour: ("feed-forward", "projections"),
    LoudLastHead: ("attention", "values or output"),
    DistanceCounts: ("attention", "scores"),
    OneAngleStands: ("attention", "rotary positions"),
    HalfNormed: ("norm", "norms"),
}


def deep(layers):
    config = dataclasses.replace(GQA.config, num_hidden_layers=layers)
    return dataclasses.replace(GQA, name=f"deep_{layers}", config=config)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@pytest.mark.parametrize(("layers", "layer"), [(5, 4), (8, 2)])
def test_the_layer_in_few_models_and_the_branch(bug, layers, layer, oracle):
    seen = Seen(deep(layers), BATCH, None)
    prober = Prober(planted(bug, layer), "float32", oracle)
    found = find_layer(prober, seen)
    assert found.layer == layer
    assert found.runs <= math.ceil(math.log2(layers)) + 2
    assert branch_of(find_place_in_layer(prober, seen, layer)) == BUGS[bug][0]


@pytest.fixture(scope="module")
def known(oracle):
    return KnownBugs(oracle)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_it_is_called_unknown_and_located(bug, known, oracle):
    result = CaseResult(CASE, Verdict.FAIL, "wrong", 9.0, 9.0, 0.0)
    report = Report("broken", (result,), (), selected=True)
    (found,) = diagnose(planted(bug, 1), report, oracle, known=known)
    branch, part = BUGS[bug]
    assert (found.mutant, found.layer, found.branch) == (None, 1, branch)
    assert f"{CASE}: no known bug f" in found.text
    assert part in found.text
    assert "layer 1" in found.advice
    assert found.shortest_input
    assert "(There was time for" not in found.text


def test_they_are_in_no_bank():
    kinds = {mutant.kind for mutant in all_mutants().values()}
    assert kinds.isdisjoint(BUGS)
