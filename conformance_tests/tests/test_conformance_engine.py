"""The engine: verdicts, claims, coverage and exit codes; a suite that cannot fail is found out."""

import dataclasses
import json
import re

import numpy as np
import pytest

from gemma_hub.backend import BuildOptions
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.engine import required_cases, run_conformance
from gemma_hub_conformance.mutants.bank import (
    DTYPES,
    FEATURES,
    TASKS,
    StandInBackend,
    StandInModel,
    control,
)
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.spec import Subject
from gemma_hub_numpy.model import Reference

FORWARD = "L2.forward.gqa.left_padding"
CACHE = "L2.cache.gqa.left_padding"
HEADS = [
    "L5.base.last_hidden_state.no_padding",
    "L5.sequence.logits.no_padding",
    "L5.token.logits.no_padding",
]


def _subject(model=StandInModel, features=FEATURES, dtypes=DTYPES, tasks=TASKS) -> Subject:
    return Subject("subject", StandInBackend(Reference, model), features, dtypes, tasks=tasks)


def _verdict(subject, case, oracle):
    return run_conformance(subject, [case], oracle=oracle).results[0]


def _result(id_: str, verdict: Verdict = Verdict.PASS) -> CaseResult:
    return CaseResult(id_, verdict, "why", 1.0, 1.0, 0.1)


class Zeros(StandInModel):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return dataclasses.replace(outputs, logits=np.zeros_like(outputs.logits))


class NotNumbers(StandInModel):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return dataclasses.replace(outputs, logits=outputs.logits * np.nan)


class OneRowLess(StandInModel):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return dataclasses.replace(outputs, logits=outputs.logits[1:])


class Raises(StandInModel):
    def forward(self, inputs):
        raise ZeroDivisionError("on purpose")


class Forward:
    """A model that has only what every model must have."""

    def __init__(self, reference):
        self._model = StandInModel(reference)
        self.native, self.device = reference, "cpu"

    def forward(self, inputs):
        return self._model.forward(inputs)

    def to_numpy(self, array):
        return self._model.to_numpy(array)


class CausalOnly:
    """A backend with nothing but causal logits, which refuses everything else."""

    def __init__(self, name=None):
        self._name = name

    def devices(self):
        return ("cpu",)

    def build(self, config, task, weights, options):
        if task.name != "causal_lm":
            raise UnsupportedFeature(self._name or f"task:{task.name}", "subject")
        return RefusesAttentions(Reference(config, weights))


class RefusesAttentions(Forward):
    def forward(self, inputs):
        if inputs.output_attentions:
            raise UnsupportedFeature("attentions", "subject")
        return super().forward(inputs)


def test_the_manifest_names_every_case_and_no_other():
    assert sorted(required_cases()) == sorted(all_cases())


def test_every_case_has_a_level_a_sentence_and_a_known_feature():
    for case in all_cases().values():
        assert case.level in range(8)
        assert case.doc.endswith(".")
        assert case.needs <= FEATURES | {f"task:{task}" for task in TASKS}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Zeros, "error is .* times the rounding noise"),
        (NotNumbers, "NaN or infinite"),
        (OneRowLess, r"the logits have shape \(2, 23, 131\); expected \(3, 23, 131\)"),
    ],
)
def test_a_wrong_answer_fails(model, message, oracle):
    result = _verdict(_subject(model), FORWARD, oracle)
    assert result.verdict is Verdict.FAIL
    assert re.search(message, result.message)


def test_an_exception_of_the_backend_is_an_error_and_not_a_crash(oracle):
    result = _verdict(_subject(Raises), FORWARD, oracle)
    assert (result.verdict, result.message) == (Verdict.ERROR, "ZeroDivisionError: on purpose")


def test_an_unclaimed_feature_that_is_absent_is_unsupported(oracle):
    subject = _subject(Forward, frozenset())
    assert _verdict(subject, CACHE, oracle).verdict is Verdict.UNSUPPORTED
    assert _verdict(subject, FORWARD, oracle).verdict is Verdict.PASS


@pytest.mark.parametrize(
    "case",
    [
        CACHE,
        "L2.inputs_embeds.unscaled",
        "L1.contract.export_gqa",
        "L2.forward.softcap",
        "L5.attentions.gqa",
        "L5.gradients.causal.gqa",
    ],
)
def test_an_unclaimed_feature_that_is_accepted_fails(case, oracle):
    result = _verdict(_subject(features=frozenset()), case, oracle)
    assert result.verdict is Verdict.FAIL
    assert "was accepted; expected UnsupportedFeature" in result.message


@pytest.mark.parametrize("case", HEADS)
def test_an_unclaimed_task_that_is_accepted_fails(case, oracle):
    result = _verdict(_subject(tasks=("causal_lm",)), case, oracle)
    assert result.verdict is Verdict.FAIL
    assert "the unclaimed feature 'task:" in result.message
    assert "was accepted; expected UnsupportedFeature" in result.message


@pytest.mark.parametrize("case", [*HEADS, "L5.gradients.token", "L5.attentions.mha"])
def test_an_unclaimed_task_or_feature_that_is_refused_is_unsupported(case, oracle):
    subject = Subject("subject", CausalOnly(), frozenset(), DTYPES)
    result = _verdict(subject, case, oracle)
    assert result.verdict is Verdict.UNSUPPORTED, result.message


def test_a_refusal_under_another_name_fails(oracle):
    subject = Subject("subject", CausalOnly("heads"), frozenset(), DTYPES)
    result = _verdict(subject, HEADS[0], oracle)
    assert result.verdict is Verdict.FAIL
    assert "is refused under the name 'heads'" in result.message


def test_a_wrong_gradient_is_named(oracle):
    class Wrong(StandInModel):
        def loss_and_gradients(self, inputs):
            loss, gradients = super().loss_and_gradients(inputs)
            return loss, gradients | {"model.norm.weight": gradients["model.norm.weight"] * 1.001}

    result = _verdict(_subject(Wrong), "L5.gradients.causal.untied", oracle)
    assert result.verdict is Verdict.FAIL
    assert "1 of 12 gradients are wrong: model.norm.weight: error is" in result.message


def test_a_claimed_feature_that_is_absent_fails(oracle):
    result = _verdict(_subject(Forward), CACHE, oracle)
    assert result.verdict is Verdict.FAIL
    assert "claims 'cache'" in result.message


def test_an_unclaimed_dtype_that_is_accepted_fails(oracle):
    case = "L3.bfloat16.forward.gqa.left_padding"
    result = _verdict(_subject(dtypes=("float32",)), case, oracle)
    assert result.verdict is Verdict.FAIL
    assert "the unclaimed dtype 'bfloat16' was accepted" in result.message


def test_a_backend_that_claims_nothing_is_not_certified_by_refusing(oracle):
    report = run_conformance(_subject(Forward, frozenset()), [CACHE], oracle=oracle)
    assert (report.exit_code, report.vacuous) == (5, True)


def test_an_unknown_case_is_refused_with_the_nearest_one(oracle):
    with pytest.raises(InputError, match=r"no case 'L2.cache.capacty'.*'L2.cache.capacity'"):
        run_conformance(control(), ["L2.cache.capacty"], oracle=oracle)


def test_a_run_without_every_required_case_is_vacuous():
    report = Report("x", (_result("a"),), ("a", "b"))
    assert (report.missing, report.exit_code) == (("b",), 5)
    assert "1 of 2 required cases not run" in report.summary
    assert Report("x", (_result("a"), _result("b")), ("a", "b")).exit_code == 0
    assert Report("x", (), ()).exit_code == 5


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.ERROR])
def test_one_failure_or_error_fails_the_run(verdict):
    report = Report("x", (_result("a"), _result("b", verdict)), ("a", "b"))
    assert (report.exit_code, report.failed) == (1, True)
    assert report.summary.startswith("x fails")


def test_the_report_as_json_keeps_infinite_ratios(oracle):
    report = run_conformance(_subject(NotNumbers), [FORWARD], oracle=oracle)
    content = json.loads(report.to_json())
    assert content["exit_code"] == 1
    assert content["cases"][0]["ratio"] == "inf"
    assert content["cases"][0]["verdict"] == "fail"


def test_models_are_shared_between_cases_and_not_between_dtypes():
    subject = control()
    assert subject.model(GQA, "float32") is subject.model(GQA, "float32")
    assert subject.model(GQA, "bfloat16") is not subject.model(GQA, "float32")
    assert subject.options("float32") == BuildOptions(dtype="float32")
