"""Failures that the logits do not show: gradients, attentions, losses, generated tokens."""

import dataclasses

import numpy as np
import pytest

from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.diagnosis import diagnose
from gemma_hub_conformance.diagnosis.backward import find_step
from gemma_hub_conformance.diagnosis.matching import KnownBugs
from gemma_hub_conformance.diagnosis.places import first_wrong_token
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.subjects import noisy, planted
from gemma_hub_conformance.diagnosis.watching import Seen
from gemma_hub_conformance.heads import GRADIENTS, SEQUENCE, TOKEN
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import Mutant, StandInModel, control
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.rows import Batch, row, tokens

BATCH = Batch.of([row(tokens(9, 71)), row(tokens(6, 72), left=2)], 9)
DEEP = dataclasses.replace(
    GRADIENTS["gqa"],
    name="deep_gradients",
    config=dataclasses.replace(GQA.config, num_hidden_layers=4),
)


@pytest.fixture
def cause(oracle):
    """The diagnosis of one bug by one case, with no bug known but what is named."""

    def diagnosed(subject, case, *known):
        result = CaseResult(case, Verdict.FAIL, "wrong", 9.0, 9.0, 0.0)
        report = Report("broken", (result,), (), selected=True)
        bugs = {name: all_mutants()[name] for name in known}
        return diagnose(subject, report, oracle, known=KnownBugs(oracle, bugs))[0]

    return diagnosed


# -- gradients -------------------------------------------------------------------------------------

IN_ONE_LAYER = {
    "grad-gelu-erf": "feed-forward: activation",
    "grad-keys-stopped": "attention: scores or rotary positions of the keys",
    "grad-softmax-diagonal": "attention: softmax, scores or rotary positions",
    "grad-norm-without-offset": "norm or residual stream after the attention",
    "grad-norm-weight-missing": "norms",
}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("bug", "where"), IN_ONE_LAYER.items())
def test_a_wrong_backward_in_one_layer_is_found_there(bug, where, layer, oracle):
    prober = Prober(planted(all_mutants()[bug].kind, layer), "float32", oracle)
    wrong = prober.wrong_gradients(Seen(DEEP, BATCH, None))
    step = find_step(DEEP, wrong)
    assert (step.layer, step.where) == (layer, where)
    assert step.wrong == len(wrong)


@pytest.mark.parametrize(
    "checkpoint", [DEEP, GRADIENTS["untied"], TOKEN, *SEQUENCE.values()], ids=lambda x: x.name
)
def test_right_gradients_have_no_wrong_step(checkpoint, oracle):
    prober = Prober(control(), "float32", oracle)
    wrong = prober.wrong_gradients(Seen(checkpoint, BATCH, None))
    assert wrong == ()
    assert find_step(checkpoint, wrong) is None


def test_what_a_layer_passes_on_wrongly_is_its_own_fault():
    names = [n for n in DEEP.weights().names() if n.startswith("model.layers.1.")]
    step = find_step(DEEP, names)
    assert (step.layer, step.where) == (2, "norm or residual stream before the attention")
    assert step.after == ("model.layers.2.input_layernorm",)
    assert not step.alone


def test_around_the_layers():
    names = tuple(DEEP.weights().names())
    assert find_step(DEEP, names).where == "loss or head"
    assert find_step(DEEP, ["model.norm.weight"]).where == "final norm"
    assert find_step(DEEP, ["model.embed_tokens.weight"]).where == "embedding"
    untied = GRADIENTS["untied"]
    assert find_step(untied, tuple(untied.weights().names())).where == "loss"
    assert find_step(untied, ["lm_head.weight"]).where == "head"


def test_a_gradient_case_has_layer_part_and_input(cause):
    subject = planted(all_mutants()["grad-gelu-erf"].kind, 0)
    found = cause(subject, "L5.gradients.causal.gqa", "grad-gelu-erf", "grad-keys-stopped")
    assert (found.layer, found.branch) == (0, "feed-forward")
    assert "model.layers.0.mlp.gate_proj.weight, right after" in found.text
    assert "logits of its inputs are right" in found.text
    assert len(found.shortest_input) == 2  # one token predicts nothing
    assert found.failure is None


def test_directions_are_followed_to_the_parameter(cause):
    found = cause(noisy(all_mutants()["grad-gelu-erf"]), "L5.gradients.along_directions.causal")
    assert (found.layer, found.branch) == (1, "feed-forward")


def test_wrong_logits_come_before_wrong_gradients(cause):
    found = cause(planted(all_mutants()["mlp-gelu-erf"].kind, 1), "L5.gradients.causal.gqa")
    assert (found.layer, found.branch) == (1, "feed-forward")
    assert "backward" not in found.text


# -- attentions and losses -------------------------------------------------------------------------


class LastLayerHalved(StandInModel):
    """Attentions of the last layer are returned at half their size."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        if outputs.attentions is None:
            return outputs
        *others, last = outputs.attentions
        return dataclasses.replace(outputs, attentions=(*others, last / 2))


def test_the_first_wrong_attention_has_its_layer(cause):
    found = cause(noisy(Mutant("halved", LastLayerHalved, "", "")), "L5.attentions.gqa")
    assert (found.layer, found.branch) == (GQA.config.num_hidden_layers - 1, "attention")
    assert "1 of 3" in found.text
    assert "in what is returned" in found.text


def test_attentions_of_a_wrong_layer_are_that_layers(cause):
    subject = planted(all_mutants()["attn-scale-twice"].kind, 1)
    found = cause(subject, "L5.attentions.gqa")
    assert (found.layer, found.branch) == (1, "attention")
    assert "attention: scores" in found.text


def test_a_wrong_loss_of_right_logits(cause):
    found = cause(noisy(all_mutants()["loss-not-shifted"]), "L5.causal.loss.no_padding")
    assert (found.layer, found.branch) == (None, "loss")
    assert "logits of its inputs are right" in found.text


# -- generation ------------------------------------------------------------------------------------


def test_a_wrong_cache_is_found_behind_the_tokens(cause):
    found = cause(noisy(all_mutants()["cache-k-unrotated"]), "L4.generation.greedy")
    assert (found.layer, found.branch) == (0, "attention")
    assert "Call 1 of the cache, slots 7 to 7, is the first. Without a cache it is right." in (
        found.text
    )
    assert "slots a call" in found.text


class Forgetful(StandInModel):
    """From the second sequence on it returns the logits of the first: kept between calls."""

    first: list = []  # noqa: RUF012 - that it is shared is the bug

    def extend(self, inputs, cache):
        outputs, cache = super().extend(inputs, cache)
        if inputs.shape[1] == 1 and len(self.first) < 3:
            self.first.append(np.roll(outputs.logits, 1, axis=-1))
            return dataclasses.replace(outputs, logits=self.first[-1]), cache
        return outputs, cache


def test_tokens_that_the_logits_do_not_explain(cause):
    Forgetful.first.clear()
    subject = Mutant("forgetful", Forgetful, "", "").subject()
    found = cause(subject, "L4.generation.greedy")
    assert (found.layer, found.branch) == (None, "generation")
    assert "The first wrong token is new token 1 of row 0" in found.text
    assert "kept between calls" in found.text


def test_the_first_wrong_token_is_read_from_the_message():
    said = "row 1 is (4, 7, 9) (length); expected (4, 8, 9) (length)"
    assert "new token 1 of row 1: 7 in place of 8" in first_wrong_token(said)
    said = "row 0 is (4, 7) (stop); expected (4, 7, 9) (length)"
    assert "ended by 'stop' after 2; expected 'length' after 3" in first_wrong_token(said)
    assert first_wrong_token("something else") == "something else"
