"""Backends that say nothing, or say it whatever is asked: none is certified."""

import dataclasses
import time

import numpy as np
import pytest

from gemma_hub.backend import TaskSpec
from gemma_hub.errors import GemmaHubError, InputError, UnsupportedFeature
from gemma_hub.parameters import parameter_shapes
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, DesignedCheckpoint
from gemma_hub_conformance.engine import run_case, run_conformance, select
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import (
    DTYPES,
    FEATURES,
    TASKS,
    StandInBackend,
    StandInModel,
    control,
    reference_package,
)
from gemma_hub_conformance.profiles import required_cases
from gemma_hub_conformance.report import Report, Verdict
from gemma_hub_conformance.seeds import current_seed, seeded
from gemma_hub_conformance.spec import Subject
from gemma_hub_numpy.model import Reference

BAD = (Verdict.FAIL, Verdict.ERROR)


def subject(kind, features=FEATURES, dtypes=DTYPES, tasks=TASKS, **fields) -> Subject:
    """A model class, a backend class or a backend, in the place of the installed reference."""
    backend = kind
    if isinstance(kind, type):
        is_model = issubclass(kind, StandInModel)
        backend = StandInBackend(Reference, kind) if is_model else kind(Reference)
    package = reference_package()
    return Subject("x", backend, features, dtypes, tasks=tasks, package=package, **fields)


def core_until_failure(subject: Subject, oracle, seed: int = 0) -> Report:
    """The core profile up to its first failure; what comes after cannot mend it."""
    results = []
    with seeded(seed):
        for case in select(profile="core"):
            results.append(run_case(case, subject, oracle))
            if results[-1].verdict in BAD:
                break
    return Report("x", tuple(results), required_cases("core"), profile="core", seed=seed)


class Answers(StandInModel):
    """A model whose logits are not the reference's."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        if outputs.logits is None:
            return outputs
        return dataclasses.replace(outputs, logits=self.answer(outputs.logits))

    def extend(self, inputs, cache):
        outputs, cache = super().extend(inputs, cache)
        return dataclasses.replace(outputs, logits=self.answer(outputs.logits)), cache


class Zeros(Answers):
    def answer(self, logits):
        return np.zeros_like(logits)


class NotNumbers(Answers):
    def answer(self, logits):
        return np.full_like(logits, np.nan)


class Constants(Answers):
    def answer(self, logits):
        return np.broadcast_to(np.arange(logits.shape[-1], dtype=np.float32), logits.shape)


class Uniform(Answers):
    def answer(self, logits):
        return np.full_like(logits, -np.log(logits.shape[-1]))


class FirstAnswer(Answers):
    """Whatever is asked gets the answer to the first question, cut or repeated to fit."""

    first = None

    def answer(self, logits):
        if FirstAnswer.first is None:
            FirstAnswer.first = logits
        return np.resize(FirstAnswer.first, logits.shape)


class ByShape(Answers):
    """A question of a shape that was seen before gets the answer of that time."""

    known: dict = {}  # noqa: RUF012 - all models share it, that is the bug

    def answer(self, logits):
        return self.known.setdefault(logits.shape, logits)


class WrongType(StandInModel):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return dataclasses.replace(outputs, logits=outputs.logits.astype(np.float64))


class Learns(StandInModel):
    """Each forward moves a weight a little."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        weight = self.native.parameter("model.norm.weight")  # the array that the model keeps
        weight *= 1.0001
        return outputs


class SwallowsErrors(StandInModel):
    """What cannot be done gives zeros in place of an error."""

    def extend(self, inputs, cache):
        try:
            return super().extend(inputs, cache)
        except GemmaHubError:
            outputs = self.forward(inputs)
            return dataclasses.replace(outputs, logits=outputs.logits * 0), cache


class Exits(StandInModel):
    """Ends the process as if all were well."""

    def forward(self, inputs):
        raise SystemExit(0)


class Sleeps(StandInModel):
    def forward(self, inputs):
        time.sleep(60)
        return super().forward(inputs)


class BuildsAnything(StandInBackend):
    """What it is asked for and does not have, it builds with defaults."""

    def build(self, config, task, weights, options):
        try:
            return super().build(config, task, weights, options)
        except GemmaHubError:
            return self.model(Reference(config, weights, "causal_lm"))


class IgnoresWeights(StandInBackend):
    """Initialises the parameters and does not load them."""

    def build(self, config, task, weights, options):
        own = DesignedCheckpoint("other", "", config, task=task.name).weights()
        return super().build(config, task, own, options)


class ReplaysSeed0(StandInBackend):
    """Answers the designed checkpoints from a recording of the calibrated run."""

    def build(self, config, task, weights, options):
        with seeded(0):
            for each in CHECKPOINTS.values():
                if each.config == config and each.task == task.name:
                    weights = each.weights()
        return super().build(config, task, weights, options)


class RefusesEverything(StandInBackend):
    def build(self, config, task, weights, options):
        raise UnsupportedFeature(f"task:{task.name}", "x")


class Little(StandInModel):
    """Has a forward, and nothing that may be left out."""

    init_cache = extend = export = loss_and_gradients = None

    def forward(self, inputs):
        wanted = {"inputs_embeds": inputs.inputs_embeds is not None}
        wanted["attentions"] = inputs.output_attentions
        for feature, is_wanted in wanted.items():
            if is_wanted:
                raise UnsupportedFeature(feature, "x")
        return super().forward(inputs)


class Float16Only(StandInBackend):
    """Builds causal models in float16 and refuses all else."""

    def build(self, config, task, weights, options):
        if options.dtype != "float16":
            raise InputError(f"dtype is {options.dtype!r}; expected 'float16'.")
        return _only_causal(super(), config, task, weights, options)


class CausalOnly(StandInBackend):
    def build(self, config, task, weights, options):
        return _only_causal(super(), config, task, weights, options)


def _only_causal(backend, config, task, weights, options):
    if task.name != "causal_lm":
        raise UnsupportedFeature(f"task:{task.name}", "x")
    for feature in config.required_features:
        raise UnsupportedFeature(feature, "x")
    return backend.build(config, task, weights, options)


NOT_CERTIFIED = {
    Zeros: "L1.contract.two_models",
    NotNumbers: "L1.contract.two_models",
    Constants: "L1.contract.two_models",
    Uniform: "L1.contract.two_models",
    FirstAnswer: "L1.contract.two_models",
    ByShape: "L1.contract.two_models",
    WrongType: "L0.claims.dtypes",
    Learns: "L1.contract.repeated_call",
    Exits: "L0.claims.features",
    Sleeps: "L0.claims.features",
    BuildsAnything: "L0.claims.nothing_else",
    IgnoresWeights: "L1.contract.two_models",
    RefusesEverything: "L0.claims.features",
}
"""{what it does: the first case of the core profile that it fails}."""


@pytest.mark.parametrize("kind", NOT_CERTIFIED, ids=lambda kind: kind.__name__)
def test_it_is_not_certified_and_the_first_failure_is_named(kind, oracle):
    tested = subject(kind)
    if kind is Sleeps:  # in this process alone; in a new one the reference runs in its place
        tested.package.whole(tested.options("float32"), 60.0)
        tested.time_limit = 0.5
    report = core_until_failure(tested, oracle)
    assert report.exit_code == 1
    assert report.results[-1].id == NOT_CERTIFIED[kind], report.results[-1].message


def test_an_error_that_is_swallowed_is_missed(oracle):
    ids = ["L2.cache.gqa.left_padding", "L2.cache.capacity"]
    results = run_conformance(subject(SwallowsErrors), ids, oracle=oracle).results
    assert [each.verdict for each in results] == [Verdict.PASS, Verdict.FAIL]


def test_after_a_hang_nothing_more_is_run(oracle):
    start = time.monotonic()
    tested = subject(Sleeps, time_limit=0.5)
    report = run_conformance(tested, ["L2.forward.one_token", "L2.forward.single_row"])
    assert time.monotonic() - start < 30
    assert [each.message for each in report.results] == [
        "did not finish within 0.5 s",
        "not run: L2.forward.one_token did not finish within 0.5 s",
    ]
    assert report.exit_code == 1


def test_an_exit_with_status_0_is_an_error(oracle):
    (result,) = run_conformance(subject(Exits), ["L2.forward.one_token"], oracle=oracle).results
    assert (result.verdict, result.message) == (Verdict.ERROR, "SystemExit: 0")


def test_a_recording_of_the_calibrated_run_fails_with_any_other_seed(oracle):
    """With seed 0 its answers are right; the certificate's recheck takes a seed of its own."""
    report = run_conformance(subject(ReplaysSeed0), ["L2.forward.gqa.left_padding"], oracle=oracle)
    assert report.exit_code == 0
    report = core_until_failure(subject(ReplaysSeed0), oracle, seed=17)
    assert report.exit_code == 1
    # In its place a new process runs the installed reference, which is right.
    assert report.results[-1].id == "L1.contract.two_models"
    assert current_seed() == 0


def test_a_backend_made_for_the_designed_checkpoints_fails(oracle):
    mutant = all_mutants()["knows-the-checkpoints"]
    ids = ["L2.forward.gqa.left_padding", "L2.forward.bias.both_sides", mutant.case]
    results = run_conformance(mutant.subject(), ids, oracle=oracle).results
    assert [each.verdict for each in results] == [Verdict.PASS, Verdict.PASS, Verdict.FAIL]


def test_claiming_nothing_is_vacuous(oracle):
    """The whole core profile: every case is refused as it must be, and none says anything."""
    tested = subject(Float16Only(Reference, Little), frozenset(), ("float16",), ("causal_lm",))
    report = run_conformance(tested, profile="core", oracle=oracle)
    assert [each for each in report.results if each.verdict in BAD] == []
    assert (report.exit_code, report.vacuous) == (5, True)
    assert report.counts[Verdict.UNSUPPORTED] == len(report.results)


def test_claiming_little_and_doing_that_is_no_failure(oracle):
    """A forward is a backend. What it leaves out counts as unsupported, for all to see."""
    tested = subject(CausalOnly(Reference, Little), frozenset(), ("float32",), ("causal_lm",))
    ids = ["L0.claims.nothing_else", "L2.forward.one_token", "L2.cache.capacity"]
    report = run_conformance(tested, ids, oracle=oracle)
    verdicts = [each.verdict for each in report.results]
    assert verdicts == [Verdict.PASS, Verdict.PASS, Verdict.UNSUPPORTED], report.results


def test_claiming_nothing_and_doing_everything_fails(oracle):
    tested = subject(StandInModel, frozenset(), ("float32",), ("causal_lm",))
    report = core_until_failure(tested, oracle)
    assert report.exit_code == 1
    assert report.results[-1].id == "L0.claims.nothing_else"


def test_one_that_is_not_installed_fails_level_0(oracle):
    tested = dataclasses.replace(control(), package=None)
    report = core_until_failure(tested, oracle)
    assert report.exit_code == 1
    assert "comes from no installed distribution" in report.results[0].message


def test_the_drawn_model_is_another_for_each_seed_and_fits_its_weights():
    from gemma_hub_conformance.cases.honesty import drawn

    seen = set()
    for seed in range(50):
        with seeded(seed):
            config = drawn().config
            seen.add((config.vocab_size, config.hidden_size, config.head_dim))
            weights = drawn().weights()
            assert set(weights.names()) == set(parameter_shapes(config, TaskSpec().name))
    assert len(seen) == 50
    assert GQA.config.hidden_size == 48  # drawing changes nothing that others share
