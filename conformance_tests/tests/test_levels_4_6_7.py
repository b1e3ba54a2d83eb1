"""Sampling, checkpoints, texts: each case passes what is right and kills mutants of its own."""

import dataclasses
import itertools

import numpy as np
import pytest

from gemma_hub.errors import CheckpointError
from gemma_hub.generation.random import uniform
from gemma_hub.generation.sampling import choose
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub_conformance.cases import sampling, storage, text
from gemma_hub_conformance.engine import load_subject, run_conformance
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants import sampling as sampling_mutants
from gemma_hub_conformance.mutants import storage as storage_mutants
from gemma_hub_conformance.mutants import text as text_mutants
from gemma_hub_conformance.mutants.bank import StandInBackend, control
from gemma_hub_conformance.report import Verdict
from gemma_hub_conformance.rows import row
from gemma_hub_conformance.seeds import seeded
from gemma_hub_conformance.spec import CaseContext, CaseFailed
from gemma_hub_numpy.backend import NumpyBackend
from gemma_hub_numpy.model import Reference

CASES = [case.id for module in (sampling, storage, text) for case in module.cases()]
MUTANTS = [
    mutant
    for module in (sampling_mutants, storage_mutants, text_mutants)
    for mutant in module.bank.mutants
]


def messages(subject, ids, oracle):
    """{id: what is said of it} of the cases that do not pass."""
    results = run_conformance(subject, ids, oracle=oracle).results
    return {each.id: each.message for each in results if each.verdict is not Verdict.PASS}


@pytest.mark.parametrize("name", ["control", "numpy"])
def test_what_is_right_passes(name, oracle):
    subject = control() if name == "control" else load_subject(name)
    assert messages(subject, CASES, oracle) == {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fails_its_case(mutant, oracle):
    (result,) = run_conformance(mutant.subject(), [mutant.case], oracle=oracle).results
    assert result.verdict is Verdict.FAIL, f"{mutant.hint} {result.message}"


def test_every_case_has_a_mutant_and_all_are_registered():
    assert {mutant.case for mutant in MUTANTS} == set(CASES)
    assert {mutant.name for mutant in MUTANTS} <= set(all_mutants())


# -- samples ---------------------------------------------------------------------------------------


def drawn_by_hand(oracle, prompt, settings):
    """Tokens of the reference, from its logits of the whole row at each step."""
    new = []
    for step in range(settings.max_new_tokens):
        truth = oracle.truth(sampling.MODEL, [row((*prompt, *new))], "float32")
        number = uniform(settings.seed, np.arange(1), step)
        new.append(int(choose(truth.logits[-1:], settings, number)[0]))
    return new


@pytest.fixture
def sample(oracle):
    """A context, a prompt, its settings and the reference's tokens."""
    context = CaseContext(control(), oracle)
    settings = GenerationSettings(max_new_tokens=5, temperature=1.0, top_p=0.9, seed=4)
    prompt = (30, 40, 50, 60)
    return context, prompt, settings, drawn_by_hand(oracle, prompt, settings)


def test_the_reference_s_own_tokens_are_right(sample):
    context, prompt, settings, new = sample
    sampling.judge_samples(context, sampling.MODEL, [prompt], [new], settings)


@pytest.mark.parametrize("place", range(5))
def test_any_one_other_token_is_found(sample, place):
    context, prompt, settings, new = sample
    new[place] = 20 if new[place] != 20 else 21
    with pytest.raises(CaseFailed, match=f"new token {place} is"):
        sampling.judge_samples(context, sampling.MODEL, [prompt], [new], settings)


def test_a_row_that_ends_early_is_found(sample):
    context, prompt, settings, new = sample
    with pytest.raises(CaseFailed, match="has 4 new tokens; expected 5"):
        sampling.judge_samples(context, sampling.MODEL, [prompt], [new[:4]], settings)


def test_on_a_border_both_tokens_are_right_and_off_it_one(oracle):
    settings = GenerationSettings(temperature=1.0, seed=0)
    truth = oracle.truth(sampling.MODEL, [row((30, 40))], "float32")
    weights = np.exp(truth.logits[0] - truth.logits[0].max())
    border = float(np.cumsum(weights)[60] / weights.sum())
    right = sampling._right_tokens(truth, 0, settings, border * (1 + 1e-9))
    assert right == {60, 61}
    off = sampling._right_tokens(truth, 0, settings, border * (1 + 1e-4))
    assert len(off) == 1


def test_most_samples_hang_on_no_rounding(oracle):
    settings = GenerationSettings(temperature=1.0, top_k=12, top_p=0.9, seed=0)
    truth = oracle.truth(sampling.MODEL, [row((30, 40))], "float32")
    numbers = uniform(1, np.arange(200), 0)
    unsure = [u for u in numbers if len(sampling._right_tokens(truth, 1, settings, u)) > 1]
    assert len(unsure) <= 1


# -- weights that do not fit -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Refuses(StandInBackend):
    """Refuses what has too much, and says no name where something is wrong."""

    def build(self, config, task, weights, options):
        if set(weights.names()) - set(storage.GQA.weights().names()) - {storage._HEAD}:
            raise CheckpointError("unexpected")
        try:
            return StandInBackend.build(self, config, task, weights, options)
        except CheckpointError:
            raise CheckpointError("something is wrong") from None


def test_surplus_tensors_may_be_refused_and_errors_must_name_the_tensor(oracle):
    subject = dataclasses.replace(control(), backend=Refuses(Reference))
    ids = [f"L6.checkpoint.{name}" for name in ("surplus", "missing", "misshapen")]
    found = messages(subject, ids, oracle)
    assert set(found) == set(ids[1:])
    assert all("the error does not name it" in message for message in found.values())


class OtherErrors(StandInBackend):
    """Fails where a tensor does not fit, in its own words."""

    def build(self, config, task, weights, options):
        try:
            return StandInBackend.build(self, config, task, weights, options)
        except CheckpointError:
            raise RuntimeError("size mismatch") from None


def test_an_error_of_the_framework_is_not_enough(oracle):
    subject = dataclasses.replace(control(), backend=OtherErrors(Reference))
    found = messages(subject, ["L6.checkpoint.misshapen"], oracle)
    assert "RuntimeError (size mismatch); expected a CheckpointError" in next(iter(found.values()))


def test_mixed_types_are_stored_as_they_are():
    weights = storage.MIXED.weights()
    assert {weights.dtype(name) for name in weights.names()} == {"bfloat16", "float16", "float32"}
    assert weights.names() == storage.GQA.weights().names()


# -- texts -----------------------------------------------------------------------------------------


def test_the_vocabulary_has_what_the_cases_need():
    words = text.tokenizer()
    assert words.vocab_size == text.checkpoint().config.vocab_size > 256
    rows = [words.encode(each) for each in text.TEXTS]
    assert max(map(len, rows)) == text.LENGTH
    assert len(set(map(len, rows))) == len(rows)
    assert max(max(ids) for ids in rows) > 255
    marked = [words.encode(each) for each in text.MARKED]
    assert max(map(len, marked)) <= text.LENGTH
    inside = {i for ids in marked for i in ids[1:-1]}
    assert {words.bos_token_id, words.eos_token_id, words.pad_token_id} <= inside
    spelled = words.encode(text.SPELLED[0])
    assert any(one == other for one, other in itertools.pairwise(spelled))


def test_the_streams_have_prompts_of_one_length():
    words = text.tokenizer()
    one = text.TEXTS[1]
    assert len(words.encode(one)) == len(words.encode(one.replace("son", "one")))
    assert one != one.replace("son", "one")


def test_a_text_that_its_tokens_do_not_say_is_found(oracle):
    context, ids = CaseContext(control(), oracle), text.tokenizer().encode("a king")
    text._require_text(context, "a king", ids)
    with pytest.raises(CaseFailed, match="gave 'a kin'; expected 'a king'"):
        text._require_text(context, "a kin", ids)


def test_a_run_of_another_seed_has_other_weights_and_the_same_texts():
    first = text.checkpoint().weights().read("model.norm.weight")
    with seeded(5):
        second = text.checkpoint().weights().read("model.norm.weight")
    assert not np.array_equal(first, second)


def test_a_backend_without_a_cache_samples_and_streams(oracle):
    class Model:
        """Runs whole sequences only."""

        def __init__(self, model):
            self.native, self.device = model.native, model.device
            self.forward, self.to_numpy = model.forward, model.to_numpy

    class Backend(NumpyBackend):
        def build(self, config, task, weights, options):
            return Model(super().build(config, task, weights, options))

    subject = dataclasses.replace(
        control(), backend=Backend(), features=frozenset({"inputs_embeds"}), tasks=("causal_lm",)
    )
    ids = ["L4.sampling.top_p", "L6.checkpoint.widened", "L7.text.generated", "L7.text.streams"]
    assert messages(subject, ids, oracle) == {}
