"""A backend that raises: where in its own code, on what input, and what it takes."""

import importlib
import json
import sys
import time

import pytest

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.checkpoints import CHECKPOINTS
from gemma_hub_conformance.diagnosis import diagnose, probes
from gemma_hub_conformance.diagnosis.matching import KnownBugs
from gemma_hub_conformance.mutants.bank import DTYPES, FEATURES, TASKS
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.spec import Subject

LAYERS = '''
"""A port whose operations raise where `Fault.when` says."""

from gemma_hub_numpy.model import Reference


class Fault:
    when = staticmethod(lambda model, ids: False)
    other = staticmethod(lambda ids: False)


def check(model, ids):
    if Fault.other(ids):
        raise IndexError("another one")
    if Fault.when(model, ids):
        raise IndexError(f"{len(ids)} rows were too many")


class Ported(Reference):
    def embed(self, ids):
        check(self, ids)
        return super().embed(ids)

    def loss_and_gradients(self, inputs):
        if Fault.when(self, "gradients"):
            return {}["no such gradient"]
        return super().loss_and_gradients(inputs)
'''

BACKEND = '''
"""The backend of the port."""

from gemma_hub_conformance.mutants.bank import StandInModel
from gemma_hub_numpy.backend import NumpyBackend
from raising_port.layers import Fault, Ported


class Raising:
    def devices(self):
        return ("cpu",)

    def build(self, config, task, weights, options):
        NumpyBackend().build(config, task, weights, options)
        if Fault.when("build", config):
            raise NotImplementedError("no such model")
        return StandInModel(Ported(config, weights, task.name))
'''
CHECK_LINE = 1 + LAYERS.splitlines().index(
    '        raise IndexError(f"{len(ids)} rows were too many")'
)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The package `raising_port`, imported."""
    folder = tmp_path_factory.mktemp("site") / "raising_port"
    folder.mkdir()
    for name, text in (("__init__", ""), ("layers", LAYERS), ("backend", BACKEND)):
        (folder / f"{name}.py").write_text(text)
    sys.path.insert(0, str(folder.parent))
    yield importlib.import_module("raising_port.backend")
    sys.path.remove(str(folder.parent))
    for name in [each for each in sys.modules if each.startswith("raising_port")]:
        del sys.modules[name]


@pytest.fixture
def found(port, oracle, monkeypatch):
    """Diagnoses the port with a fault in one case."""

    def diagnosed(case, when):
        monkeypatch.setattr(port.Fault, "when", staticmethod(when))
        subject = Subject("raising", port.Raising(), FEATURES, DTYPES, tasks=TASKS)
        result = CaseResult(case, Verdict.ERROR, "raised", None, None, 0.0)
        report = Report("raising", (result,), (), selected=True)
        (cause,) = diagnose(subject, report, oracle, known=KnownBugs(oracle, {}))
        return cause

    return diagnosed


def test_the_place_the_shortest_input_and_the_feature(found):
    def untied_and_two_tokens(model, ids):
        return (
            model != "build"
            and not model.config.tie_word_embeddings
            and (ids > 11).sum(1).max() > 1
        )

    cause = found("L2.forward.untied.left_padding", untied_and_two_tokens)
    assert cause.exception.startswith("IndexError: ")
    assert cause.raised_in == f"raising_port/layers.py, line {CHECK_LINE}, in `check`"
    assert cause.takes == ("`tie_word_embeddings=False`",)
    assert len(cause.shortest_input) == 2
    assert (cause.mutant, cause.layer, cause.branch) == (None, None, None)
    assert cause.raised_in in cause.text
    assert "2 slots" in cause.text
    assert "IndexError" in cause.advice
    assert json.loads(json.dumps(cause.to_dict())) == cause.to_dict()


def test_another_exception_of_the_same_kind_is_not_the_same(found, port, monkeypatch):
    """One token raises too, elsewhere; so the shortest input for the one in question has two."""
    monkeypatch.setattr(port.Fault, "other", staticmethod(lambda ids: ids.shape[1] == 1))
    cause = found("L2.forward.gqa.no_padding", lambda model, ids: model != "build")
    assert cause.raised_in == f"raising_port/layers.py, line {CHECK_LINE}, in `check`"
    assert len(cause.shortest_input) == 2


def test_what_every_checkpoint_raises_takes_no_feature(found):
    cause = found("L2.forward.bias.no_padding", lambda model, ids: model != "build")
    assert cause.takes == ()
    assert "`gqa` raises it too" in cause.text
    assert len(cause.shortest_input) == 1


def test_padding_that_raises_stays(found):
    cause = found(
        "L2.forward.gqa.left_padding", lambda model, ids: model != "build" and (ids == 3).any()
    )
    assert len(cause.shortest_input) == 1
    assert "in 2 slots" in cause.text


def test_a_model_that_is_not_built(found):
    cause = found(
        "L2.forward.mqa.no_padding",
        lambda model, config: model == "build" and config.num_key_value_heads == 1,
    )
    assert cause.exception == "NotImplementedError: no such model"
    assert cause.raised_in.startswith("raising_port/backend.py, line ")
    assert "`num_key_value_heads=1`" in cause.takes
    assert "Building the model raises it" in cause.text


def test_gradients_that_raise(found):
    cause = found("L5.gradients.causal.gqa", lambda model, ids: ids == "gradients")
    assert cause.exception == "KeyError: 'no such gradient'"
    assert "layers.py" in cause.raised_in
    assert cause.takes == ("`gradients`",)
    assert len(cause.shortest_input) == 1


def test_a_cache_that_raises(found):
    def one_at_a_time(model, ids):
        return model != "build" and ids is not None and ids.shape == (3, 1)

    cause = found("L2.cache.gqa.no_padding", one_at_a_time)
    assert cause.takes == ("a cache",)
    assert "slots a call" in cause.text


def test_an_exception_of_the_case_itself_is_not_called_the_backends(found, port, monkeypatch):
    def without_logits(self, inputs):
        return None

    monkeypatch.setattr(port.StandInModel, "forward", without_logits)
    cause = found("L2.forward.gqa.no_padding", lambda model, ids: False)
    assert cause.exception.startswith("AttributeError")
    assert cause.raised_in == ""
    assert "not the backend's own code" in cause.text


def test_the_config_of_a_smaller_checkpoint_is_what_is_told(found):
    differing = CHECKPOINTS["mqa"].config
    cause = found(
        "L2.forward.mqa.no_padding",
        lambda model, ids: model != "build" and model.config.head_dim == differing.head_dim,
    )
    assert cause.takes == (f"`head_dim={differing.head_dim}`",)
    assert "L2.forward.mqa.no_padding" in all_cases()


def test_what_leaves_the_process_is_an_exception_like_others(found):
    def leave(model, ids):
        if model != "build":
            raise SystemExit(3)

    cause = found("L2.forward.gqa.no_padding", leave)
    assert cause.exception == "SystemExit: 3"
    assert len(cause.shortest_input) == 1


def test_a_backend_that_hangs_is_not_searched_to_the_end(found, monkeypatch):
    monkeypatch.setattr(probes, "MAX_SECONDS", 0.2)
    calls = []

    def hang_from_the_second_call(model, ids):
        if model != "build":
            calls.append(model)
            while len(calls) > 1:
                time.sleep(0.01)
        return model != "build"

    cause = found("L2.forward.gqa.no_padding", hang_from_the_second_call)
    assert "did not finish within 0.2 s" in cause.text
    assert "not run again" in cause.text
    assert len(calls) == 2


def test_a_backend_that_did_harm_is_not_run_again(port, oracle):
    subject = Subject("raising", port.Raising(), FEATURES, DTYPES, tasks=TASKS)
    subject.harm = "L2.forward.gqa.no_padding did not finish within 600 s"
    result = CaseResult("L2.forward.gqa.no_padding", Verdict.ERROR, "hangs", None, None, 0.0)
    report = Report("raising", (result,), (), selected=True)
    (cause,) = diagnose(subject, report, oracle, known=KnownBugs(oracle, {}))
    assert subject.harm in cause.text
    assert subject._models == {}
