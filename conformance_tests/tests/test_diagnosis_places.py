"""The first wrong layer, its branch and the shortest input are found from outside, in few runs."""

import dataclasses
import math

import numpy as np
import pytest

from gemma_hub.backend import SupportsCache, SupportsGradients
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.diagnosis.bisection import find_layer
from gemma_hub_conformance.diagnosis.branches import find_place_in_layer, find_place_outside
from gemma_hub_conformance.diagnosis.diagnosing import branch_of
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.shrinking import shrink
from gemma_hub_conformance.diagnosis.subjects import noisy, planted
from gemma_hub_conformance.diagnosis.watching import Seen, watched
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import control
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_conformance.spec import prepare, step

BATCH = Batch.of([row(tokens(9, 71)), row(tokens(6, 72), left=2)], 9)


def deep(layers):
    config = dataclasses.replace(GQA.config, num_hidden_layers=layers)
    return dataclasses.replace(GQA, name=f"deep_{layers}", config=config)


class Counting:
    """A backend that counts the models it builds."""

    def __init__(self, backend):
        self.backend, self.built = backend, 0

    def devices(self):
        return self.backend.devices()

    def build(self, *args):
        self.built += 1
        return self.backend.build(*args)


def counted(subject):
    counting = Counting(subject.backend)
    return dataclasses.replace(subject, backend=counting), counting


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("bug", ["mlp-gelu-erf", "rope-q-only"])
def test_the_layer_is_found_in_few_runs(layers, bug, oracle):
    for layer in range(layers):
        subject, backend = counted(planted(all_mutants()[bug].kind, layer))
        seen = Seen(deep(layers), BATCH, None)
        found = find_layer(Prober(subject, "float32", oracle), seen)
        assert found.layer == layer
        assert found.runs == backend.built <= math.ceil(math.log2(layers)) + 2


def test_a_bug_in_every_layer_is_first_in_layer_0(oracle):
    prober = Prober(noisy(all_mutants()["mlp-gelu-erf"]), "float32", oracle)
    seen = Seen(deep(5), BATCH, None)
    assert find_layer(prober, seen).layer == 0


def test_a_right_backend_has_no_wrong_layer(oracle):
    subject, backend = counted(control())
    assert find_layer(Prober(subject, "float32", oracle), Seen(GQA, BATCH, None)) is None
    assert backend.built == 1


IN_LAYER = {
    "mlp-gelu-erf": "feed-forward: activation",
    "mlp-gate-up-swap": "feed-forward: projections",
    "rope-q-only": "attention: rotary positions",
    "attn-scale-twice": "attention: scores",
    "attn-causal-missing": "attention: mask or softmax",
    "norm-without-offset": "norms",
}


@pytest.mark.parametrize(("bug", "where"), IN_LAYER.items())
def test_the_branch_of_a_layer(bug, where, oracle):
    subject = planted(all_mutants()[bug].kind, 1)
    prober = Prober(subject, "float32", oracle)
    assert find_place_in_layer(prober, Seen(GQA, BATCH, None), 1) == where


OUTSIDE = {
    "emb-scale-missing": "embedding",
    "norm-final-missing": "final norm",
    "emb-scale-on-head": "head",
}


@pytest.mark.parametrize(("bug", "where"), OUTSIDE.items())
def test_the_part_around_the_layers(bug, where, oracle):
    prober = Prober(noisy(all_mutants()[bug]), "float32", oracle)
    seen = Seen(GQA, BATCH, None)
    assert find_layer(prober, seen).layer is None
    assert find_place_outside(prober, seen) == where


def test_the_words_for_branches():
    words = ["norms", "final norm", "attention: norm", "attention: scores", "head"]
    assert [branch_of(each) for each in words] == ["norm", "norm", "norm", "attention", "head"]


@pytest.mark.parametrize(
    ("bug", "count"), [("mlp-gelu-erf", 1), ("rope-q-only", 2), ("attn-causal-missing", 2)]
)
def test_the_shortest_input(bug, count, oracle):
    prober = Prober(noisy(all_mutants()[bug]), "float32", oracle)
    small = shrink(prober, Seen(GQA, BATCH, None))
    assert [len(each.ids) for each in small.batch.rows] == [count]
    assert small.batch.mask.all()
    assert prober.fails(small)


def test_padding_stays_where_the_bug_needs_it(oracle):
    prober = Prober(noisy(all_mutants()["pad-attended-prefill"]), "float32", oracle)
    small = shrink(prober, Seen(GQA, BATCH, None))
    assert prober.fails(small)
    assert not small.batch.mask.all()


def test_shrinking_ends(oracle):
    prober = Prober(noisy(all_mutants()["rope-q-only"]), "float32", oracle)
    small = shrink(prober, Seen(GQA, BATCH, None), max_runs=2)
    assert prober.runs == 2
    assert prober.fails(small)


# -- what the inputs are taken from ----------------------------------------------------------------


def test_calls_are_noted_as_they_were_and_those_of_one_cache_are_one_input():
    inputs = []
    model = watched(control().model(GQA, "float32"), GQA, inputs)
    batch = Batch.of([row(tokens(4, 71), left=1), row(tokens(5, 72), 0, range(9, 14))], 5)
    model.forward(prepare(GQA, batch, output_attentions=True))
    cache, start = model.init_cache(2, 5), 0
    for size in (3, 1, 1):
        _, cache = model.extend(step(GQA, batch, start, size, cache), cache)
        start += size
    whole, fed = inputs
    for seen in inputs:
        assert np.array_equal(seen.batch.input_ids, batch.input_ids)
        assert np.array_equal(seen.batch.mask, batch.mask)
        assert np.array_equal(seen.batch.position_ids[batch.mask], batch.position_ids[batch.mask])
    assert (whole.chunks, whole.asked) == (None, ("output_attentions",))
    assert (fed.chunks, fed.asked) == ((3, 1, 1), ())


def test_a_watched_model_has_what_the_model_has():
    class Bare:
        native, device = None, "cpu"

        def forward(self, inputs):
            return inputs

        def to_numpy(self, array):
            return array

    assert not isinstance(watched(Bare(), GQA, []), SupportsCache | SupportsGradients)
    full = watched(control().model(GQA, "float32"), GQA, [])
    assert isinstance(full, SupportsCache)
    assert isinstance(full, SupportsGradients)
    assert full.device == "cpu"
