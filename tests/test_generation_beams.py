"""Beam search against that of transformers, against all sequences, and on every backend."""

import dataclasses
import itertools

import numpy as np
import pytest

from gemma_hub import Gemma
from gemma_hub.backend import BuildOptions, SupportsCacheRows, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, GemmaHubError, InputError
from gemma_hub.generation.beams import beam_search
from gemma_hub.generation.context import can_edit
from gemma_hub.generation.loop import stream_ids
from gemma_hub.generation.many import generate_many_ids
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.sampling import log_probabilities
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.generation.stopping import StoppedText
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub.plugins.registry import plugin_registry
from gemma_hub.tasks.causal_lm import CausalLM
from gemma_hub.tokenizers import IncrementalDecoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gemma_hub_transformers")

CONFIG = GemmaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=None,
)
PROMPTS = [[2, 5, 9, 11], [2], [2, 7, 7, 7, 7, 3, 30]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Many threads wait for one another on so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(backend, seed=0, config=CONFIG):
    """A model with large random weights, so that rounding decides nothing."""
    random = np.random.default_rng(seed)
    weights = {
        name: random.uniform(-0.6, 1.5, shape)
        if "norm" in name
        else random.standard_normal(shape) / shape[-1] ** 0.5
        for name, shape in parameter_shapes(config, "causal_lm").items()
    }
    options = BuildOptions(dtype="float32", device="cpu")
    loaded = plugin_registry().load(backend).backend
    arrays = ArrayWeights({name: array.astype(np.float32) for name, array in weights.items()})
    return loaded.build(config, TaskSpec("causal_lm"), arrays, options)


def ours(model, prompts, *, config=CONFIG, text=None, prefix=None, **settings):
    chosen = GenerationSettings(**settings)
    return beam_search(model, config, prompts, chosen, text, prefix)


def theirs(model, prompts, **settings):
    """(new ids, score) of each row by transformers."""
    longest = max(map(len, prompts))
    out = model.native.generate(
        torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    lengths = (out.beam_indices != -1).sum(dim=1).tolist()
    new = [
        row[longest : longest + n] for row, n in zip(out.sequences.tolist(), lengths, strict=True)
    ]
    return [
        (tuple(row), score) for row, score in zip(new, out.sequences_scores.tolist(), strict=True)
    ]


def same(found, expected):
    assert [row.token_ids for row in found] == [token_ids for token_ids, _ in expected]
    scores = [score for _, score in expected]
    np.testing.assert_allclose([row.score for row in found], scores, rtol=1e-4, atol=1e-4)


def combination(random):
    """Random settings that ours and theirs both know, and random prompts."""
    beams = int(random.integers(2, 6))
    settings = {
        "num_beams": beams,
        "length_penalty": float(random.uniform(-1, 2)),
        "early_stopping": [False, True, "never"][random.integers(3)],
        "max_new_tokens": int(random.integers(1, 13)),
        "num_return_sequences": int(random.integers(1, beams + 1)),
        "eos_token_id": random.choice(
            np.arange(1, 61), random.integers(1, 16), replace=False
        ).tolist(),
    }
    rows = int(random.integers(1, 4))
    return settings, [random.integers(1, 61, random.integers(1, 9)).tolist() for _ in range(rows)]


# -- against transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_sequences_are_those_of_transformers(seed):
    random = np.random.default_rng(seed)
    model, their_model = build("numpy", seed), build("transformers", seed)
    reasons = set()
    for _ in range(8):
        settings, prompts = combination(random)
        found = ours(model, prompts, **settings)
        same(found, theirs(their_model, prompts, **settings))
        reasons |= {row.finish_reason for row in found}
    assert reasons == {"stop", "length"}


def test_every_kind_of_early_stopping_is_that_of_transformers():
    model, their_model = build("numpy"), build("transformers")
    distinct = []
    for penalty in (0.0, 1.0, 2.0):
        settings = {"num_beams": 3, "max_new_tokens": 12, "length_penalty": penalty}
        settings |= {"eos_token_id": list(range(1, 25)), "num_return_sequences": 3}
        results = set()
        for kind in (False, True, "never"):
            found = ours(model, PROMPTS, early_stopping=kind, **settings)
            same(found, theirs(their_model, PROMPTS, early_stopping=kind, **settings))
            results.add(tuple(row.token_ids for row in found))
        distinct.append(len(results))
    assert max(distinct) == 3  # otherwise the kinds were not told apart


RULES = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7, "no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1, "min_new_tokens": 5},
    {"bad_words": [[5], [7, 8], [9, 9]], "min_new_tokens": 3},
    {"logit_bias": {3: 2.5, 17: -4.0, 20: float("-inf"), 40: 6.0}},
    {"repetition_penalty": 1.3, "logit_bias": {11: 3.0}, "bad_words": [[30]], "min_new_tokens": 2},
]


def in_their_words(rules):
    names = {"bad_words": "bad_words_ids", "logit_bias": "sequence_bias"}
    found = {names.get(name, name): value for name, value in rules.items()}
    if "sequence_bias" in found:
        found["sequence_bias"] = [[[i], b] for i, b in rules["logit_bias"].items()]
    return found


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules))
def test_rules_change_each_beams_log_probabilities_as_in_transformers(rules):
    model, their_model = build("numpy", 7), build("transformers", 7)
    random = np.random.default_rng(3)
    changed = False
    for _ in range(3):
        settings, _ = combination(random)
        settings["max_new_tokens"] = 8
        # Transformers lets a stop id come that is a bad word.
        settings["eos_token_id"] = sorted({*settings["eos_token_id"]} - {5, 30})
        # Of one length: transformers takes padding for tokens of the row.
        prompts = random.integers(1, 61, (2, 5)).tolist()
        found = ours(model, prompts, **settings, **rules)
        same(found, theirs(their_model, prompts, **settings, **in_their_words(rules)))
        changed |= found != ours(model, prompts, **settings)
    assert changed


def test_functions_get_the_prompts_index_and_the_beams_ids_as_in_transformers():
    model, their_model = build("numpy", 9), build("transformers", 9)
    prompts = [[2, 5, 9], [3, 8, 8]]
    called = set()

    def allowed(row, ids):
        called.add((row, tuple(ids[:3].tolist())))
        return range(row + 1, 61, 1 + int(ids[-1]) % 4)

    def processor(row, ids, scores):
        return scores - 0.05 * np.arange(61) * (int(ids[-1]) % 3)

    def their_processor(ids, scores):
        return scores - 0.05 * torch.arange(61) * (ids[:, -1:] % 3)

    settings = {"num_beams": 3, "max_new_tokens": 9, "num_return_sequences": 2, "eos_token_id": 4}
    found = ours(model, prompts, allowed_tokens=allowed, processors=[processor], **settings)
    expected = theirs(
        their_model,
        prompts,
        prefix_allowed_tokens_fn=lambda row, ids: list(allowed(row, ids)),
        logits_processor=[their_processor],
        **settings,
    )
    same(found, expected)
    assert called == {(0, (2, 5, 9)), (1, (3, 8, 8))}


def test_stop_texts_end_beams_as_a_criterion_of_transformers_does(tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    lm = CausalLM(
        build("numpy", 5, config),
        config,
        backend=plugin_registry().load("numpy"),
        dtype="float32",
        tokenizer=tokenizer,
    )
    stops = ("e", "ng")

    def is_stopped(token_ids):
        text = StoppedText(lm._decoder(), stops)
        for token_id in token_ids:
            text.push(token_id)
        return text.is_stopped

    class Stops(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return torch.tensor([is_stopped(row) for row in ids[:, start:].tolist()])

    prompt = tokenizer.encode("the king and")
    start = len(prompt)
    settings = {"num_beams": 4, "max_new_tokens": 10, "num_return_sequences": 4}
    settings |= {"length_penalty": 0.5, "eos_token_id": [1]}
    expected = theirs(
        build("transformers", 5, config), [prompt], stopping_criteria=[Stops()], **settings
    )
    found = lm.generate("the king and", stop=stops, **settings)
    same(found, expected)
    stopped = [row for row in found if row.finish_reason == "stop"]
    assert len(stopped) > 0
    for row in stopped:
        whole = tokenizer.decode(list(row.token_ids), skip_special_tokens=True)
        assert whole.startswith(row.text)
        assert whole != row.text
        assert not any(stop in row.text for stop in stops)


def test_the_copy_of_a_text_goes_on_by_itself(tokenizer):
    first, second, other = (tokenizer.token_to_id(f"<0x{byte}>") for byte in ("C3", "BC", "A9"))
    text = StoppedText(IncrementalDecoder(tokenizer), ["\u00e9"])
    text.push(first)
    copy = text.copy()
    copy.push(other)
    text.push(second)
    assert (text.text, text.is_stopped) == ("\u00fc", False)
    assert (copy.text, copy.is_stopped) == ("", True)


# -- against all sequences -------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [-0.5, 0.0, 1.0, 1.7])
def test_as_many_beams_as_there_are_sequences_find_the_order_of_them_all(uncached_model, penalty):
    size, length, stop = 5, 4, 3
    config = dataclasses.replace(uncached_model.config, vocab_size=size)
    uncached_model.embeddings = uncached_model.embeddings[:size]
    uncached_model.head = uncached_model.head[:, :size]
    prompt = [2, 4]
    scores = {}
    for new in itertools.product(range(size), repeat=length):
        end = new.index(stop) + 1 if stop in new else length
        logits = uncached_model.forward(ModelInputs.prepare(config, [[*prompt, *new]])).logits[0]
        logprobs = log_probabilities(logits[1:-1], np.array(new))[:end]
        scores[new[:end]] = logprobs.sum() / end**penalty
    best = sorted(scores, key=lambda new: -scores[new])
    found = ours(
        uncached_model,
        [prompt],
        config=config,
        num_beams=len(scores),
        num_return_sequences=len(scores),
        max_new_tokens=length,
        length_penalty=penalty,
        early_stopping="never",
        eos_token_id=stop,
    )
    assert [row.token_ids for row in found] == best
    np.testing.assert_allclose([row.score for row in found], [scores[new] for new in best])


def test_of_equal_beams_the_lower_one_and_the_lower_id_come_first(fake_model):
    fake_model.head[:] = 0
    found = ours(fake_model, [[5]], config=fake_model.config, num_beams=3, max_new_tokens=2,
                 num_return_sequences=3)  # fmt: skip
    assert [row.token_ids for row in found] == [(0, 0), (0, 1), (0, 2)]
    assert [row.score for row in found] == [pytest.approx(-np.log(48))] * 3


# -- one result for every model, batch and prefix --------------------------------------------------

WIDE = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 9, "eos_token_id": [4, 8, 15]}


def test_a_model_that_cannot_exchange_rows_gives_the_same(fake_model, uncached_model):
    expected = ours(uncached_model, PROMPTS, config=fake_model.config, **WIDE)
    assert can_edit(uncached_model)
    assert not can_edit(fake_model)
    assert ours(fake_model, PROMPTS, config=fake_model.config, **WIDE) == expected


def test_prompts_do_not_see_one_another():
    model = build("numpy", 2)
    assert isinstance(model, SupportsCacheRows)
    prompts = [*PROMPTS, PROMPTS[1]]
    batch = ours(model, prompts, **WIDE)
    alone = [row for prompt in prompts for row in ours(model, [prompt], **WIDE)]
    assert [row.token_ids for row in batch] == [row.token_ids for row in alone]
    np.testing.assert_allclose([r.score for r in batch], [r.score for r in alone], rtol=1e-4)


@pytest.mark.parametrize("backend", ["numpy", "transformers"])
def test_beams_go_on_from_a_prefix(backend):
    model = build(backend, 2)
    prefix = Prefix(model, CONFIG, [2, 5, 9])
    prompts = [[2, 5, 9, *rest] for rest in ([], [7], [1, 3, 30])]
    found = [row.token_ids for row in ours(model, prompts, prefix=prefix, **WIDE)]
    assert found == [row.token_ids for row in ours(model, prompts, **WIDE)]
    with pytest.raises(InputError, match="Prompt 1 does not begin with the ids of its prefix"):
        ours(model, PROMPTS, prefix=prefix, **WIDE)


def test_every_backend_finds_the_same_sequences():
    texts = ["Once upon a time", "The king"]
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    results = []
    for backend in ("numpy", "torch", "flax"):
        lm = Gemma.load("tiny", backend=backend, dtype="float32")
        results.append(lm.generate(texts, repetition_penalty=1.2, **settings))
    for result in results[1:]:
        assert [row.token_ids for row in result] == [row.token_ids for row in results[0]]
        scores = [[row.score for row in each] for each in (result, results[0])]
        np.testing.assert_allclose(*scores, rtol=1e-4)


def test_a_prompt_is_read_once_and_a_step_feeds_the_running_beams(uncached_model):
    ours(uncached_model, PROMPTS[:2], config=uncached_model.config, num_beams=3, max_new_tokens=4)
    assert [call.shape[0] for call in uncached_model.calls] == [2, 6, 6, 6]


# -- what a result says ----------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own_and_the_score_is_after_the_rules():
    model = build("numpy", 4)
    settings = {**WIDE, "length_penalty": 0.7, "logprobs": True}
    for rules in ({}, {"logit_bias": dict.fromkeys(range(61), -1.5)}):
        for row in ours(model, PROMPTS[:1], **settings, **rules):
            ids = [PROMPTS[0] + list(row.token_ids)]
            logits = model.to_numpy(model.forward(ModelInputs.prepare(CONFIG, ids)).logits)[0]
            expected = log_probabilities(logits[3:-1], np.array(row.token_ids))
            np.testing.assert_allclose(row.logprobs, expected, rtol=1e-4)
            length = len(row.token_ids)
            total = sum(row.logprobs) - (1.5 * length if rules else 0)
            assert row.score == pytest.approx(total / length**0.7)


def test_generate_gives_the_best_first_and_one_for_one_text():
    lm = Gemma.load("tiny", backend="numpy", dtype="float32")
    best = lm.generate("One day", num_beams=3, max_new_tokens=5)
    several = lm.generate("One day", num_beams=3, max_new_tokens=5, num_return_sequences=3)
    assert several[0] == best
    assert [row.score for row in several] == sorted((row.score for row in several), reverse=True)
    assert len({row.token_ids for row in several}) == 3
    assert best.logprobs is None
    assert best.seed is None
    assert lm.generate("One day", max_new_tokens=5).score is None


def test_no_prompts_give_no_results(fake_model):
    assert ours(fake_model, [], config=fake_model.config, num_beams=2) == []
    assert fake_model.calls == []


# -- rules that leave little, and errors -----------------------------------------------------------


def narrow(row, ids):
    """7, 9 or 11 first; after 7 only 7, which bad_words forbids; else 9 or 11."""
    if len(ids) == 1:
        return (7, 9, 11)
    return (7,) if ids[-1] == 7 else (9, 11)


def test_a_beam_without_a_next_token_is_dropped(fake_model):
    found = ours(
        fake_model,
        [[2]],
        config=fake_model.config,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=3,
        allowed_tokens=narrow,
        bad_words=[[7, 7]],
    )
    assert len({row.token_ids for row in found}) == 4
    assert all(set(row.token_ids) <= {9, 11} for row in found)


def test_fewer_beams_run_where_fewer_tokens_are_allowed(fake_model):
    settings = {"config": fake_model.config, "num_beams": 5, "max_new_tokens": 2}
    settings["allowed_tokens"] = lambda row, ids: (9,) if len(ids) == 1 else (11, 12)
    found = ours(fake_model, [[2]], num_return_sequences=2, **settings)
    assert {row.token_ids for row in found} == {(9, 11), (9, 12)}
    with pytest.raises(InputError, match=r"Prompt 0 has 2 continuations .* num_return_sequences"):
        ours(fake_model, [[2]], num_return_sequences=3, **settings)


def test_rules_that_leave_nothing_are_refused(fake_model):
    settings = {"num_beams": 2, "max_new_tokens": 3, "bad_words": [[7, 7]]}
    settings["allowed_tokens"] = lambda row, ids: (7,)
    with pytest.raises(InputError, match="Prompt 0 has 0 continuations under the rules"):
        ours(fake_model, [[2]], config=fake_model.config, **settings)


def test_broken_logits_and_broken_processors_are_errors(fake_model):
    settings = {"config": fake_model.config, "num_beams": 2, "max_new_tokens": 3}
    with pytest.raises(GemmaHubError, match="row 0 at step 0 hold NaN"):
        ours(fake_model, [[2]], processors=[lambda row, ids, scores: scores * np.nan], **settings)
    fake_model.embeddings[7] = np.nan
    with pytest.raises(GemmaHubError, match="row 1 at step 0 hold NaN"):
        ours(fake_model, [[2], [7]], **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 0}, "num_beams is 0; expected an integer from 1 up"),
        ({"num_beams": 2, "temperature": 0.7}, "temperature is 0.7; a beam search draws nothing"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3 and num_beams"),
        ({"num_beams": 2, "length_penalty": 11}, "length_penalty is 11; expected a number from"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": "always"}, "early_stopping is 'always'; expected True, False or \"ne"),
        ({"early_stopping": 1}, "early_stopping is 1; expected"),
        ({"num_beams": 2, "prompt_lookup": 2}, "a beam search takes no drafts"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        GenerationSettings(**settings)


def test_beams_are_neither_streamed_nor_mixed_with_prompts_that_come_and_go(fake_model):
    settings = GenerationSettings(num_beams=2)
    with pytest.raises(InputError, match=r"num_beams is 2; .* cannot be streamed"):
        stream_ids(fake_model, fake_model.config, [[2]], settings)
    with pytest.raises(InputError, match="num_beams"):
        generate_many_ids(fake_model, fake_model.config, [[2]], settings, batch_size=2)


def test_a_prompt_that_is_too_long_is_an_error_before_any_work(fake_model):
    with pytest.raises(CapacityError, match="needs 71 positions"):
        ours(fake_model, [[3] * 60], config=fake_model.config, num_beams=2, max_new_tokens=12)
    assert fake_model.calls == []
