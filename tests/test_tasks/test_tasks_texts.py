"""embed, score, classify and tag: what they say, and that batches change nothing."""

import dataclasses

import numpy as np
import pytest

from gemma_hub.errors import CapacityError, InputError, TokenizerError

TEXTS = ["the king", "", "a small dog ran to the king and the queen", "é 😀", "the queen"]
METHODS = {
    "base": "embed",
    "causal_lm": "score",
    "sequence_classification": "classify",
    "token_classification": "tag",
}


def numbers(results):
    """Every number in what a method returned, in order."""
    if isinstance(results, np.ndarray):
        return results.ravel().tolist()
    found = []
    for result in results:
        if isinstance(result, list):
            found += numbers(result)
        else:
            for value in dataclasses.astuple(result):
                values = value.values() if isinstance(value, dict) else value
                values = values if isinstance(values, (tuple, type({}.values()))) else [values]
                found += [v for v in values if isinstance(v, (int, float))]
    return found


@pytest.mark.parametrize(("task", "method"), METHODS.items())
def test_results_depend_on_neither_batch_nor_order(build, task, method):
    model = build(task)
    run = getattr(model, method)
    alone = [numbers(run([text])) for text in TEXTS]
    for size in (1, 2, 3, 8):
        together = numbers(run(TEXTS, batch_size=size))
        np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-6, atol=1e-6)
    backwards = run(TEXTS[::-1], batch_size=2)
    np.testing.assert_allclose(
        numbers(backwards[::-1]), np.concatenate(alone), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("task", "method"), METHODS.items())
def test_texts_of_like_length_run_together(build, task, method):
    model = build(task)
    getattr(model, method)(["the king " * 5, "the", "a king " * 5, "a"], batch_size=2)
    first, second = model.contract.calls
    assert first.attention_mask.mean() > 0.6
    assert second.attention_mask.mean() > 0.6
    assert first.shape[1] < second.shape[1]


@pytest.mark.parametrize(("task", "method"), METHODS.items())
@pytest.mark.parametrize(
    ("texts", "options", "error", "words"),
    [
        ("the king", {}, InputError, "texts are str; expected a list"),
        (None, {}, InputError, "texts are NoneType"),
        (["the", 7], {}, InputError, "Text 1 is int"),
        (["the"], {"batch_size": 0}, InputError, "batch_size is 0"),
        (["the"], {"batch_size": 2.0}, InputError, r"batch_size is 2\.0"),
        (["the", "k" * 64], {}, CapacityError, "Text 1 has 65 tokens.*64 positions"),
    ],
)
def test_bad_calls(build, task, method, texts, options, error, words):
    with pytest.raises(error, match=words):
        getattr(build(task), method)(texts, **options)


@pytest.mark.parametrize(("task", "method"), METHODS.items())
def test_no_texts_and_no_tokenizer(build, task, method):
    assert len(getattr(build(task), method)([])) == 0
    with pytest.raises(TokenizerError, match="no tokenizer"):
        getattr(build(task, tokenizer=None), method)(["the"])


# -- each method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embed(build, tokenizer, pooling, normalize):
    model = build("base")
    got = model.embed(TEXTS, pooling, normalize)
    assert got.dtype == np.float32
    for vector, text in zip(got, TEXTS, strict=True):
        x = model.forward([tokenizer.encode(text)]).to_numpy().last_hidden_state[0]
        expected = x.mean(axis=0) if pooling == "mean" else x[-1]
        expected = expected / np.linalg.norm(expected) if normalize else expected
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)


def test_a_vector_of_zeros_is_not_divided(build, monkeypatch):
    model = build("base")
    monkeypatch.setattr(model.contract, "features", lambda inputs: np.zeros((*inputs.shape, 6)))
    assert not model.embed(["the"]).any()


def test_pooling_that_is_not_known(build):
    with pytest.raises(InputError, match="pooling is 'max'; expected 'mean' or 'last'"):
        build("base").embed(["the"], pooling="max")


def test_score(build, tokenizer):
    model = build("causal_lm")
    for text, score in zip(TEXTS, model.score(TEXTS), strict=True):
        ids = tokenizer.encode(text)
        logits = model.forward([ids]).to_numpy().logits[0].astype(np.float64)
        expected = [
            logits[t, following] - np.log(np.exp(logits[t]).sum())
            for t, following in enumerate(ids[1:])
        ]
        assert score.token_ids == tuple(ids[1:])
        np.testing.assert_allclose(score.logprobs, expected, rtol=1e-6, atol=1e-6)
        assert score.total == pytest.approx(sum(expected), abs=1e-6)


def test_classify_chooses_one_label(build, tokenizer):
    model = build("sequence_classification")
    for text, said in zip(TEXTS, model.classify(TEXTS), strict=True):
        logits = model.forward([tokenizer.encode(text)]).to_numpy().logits[0].astype(np.float64)
        expected = np.exp(logits) / np.exp(logits).sum()
        assert list(said.probabilities) == ["noun", "verb", "other"]
        np.testing.assert_allclose(list(said.probabilities.values()), expected, rtol=1e-6)
        assert said.label == ["noun", "verb", "other"][int(logits.argmax())]
        assert said.probability == max(said.probabilities.values())
        assert said.values == {}


def test_classify_several_labels(build, tokenizer):
    model = build("sequence_classification", problem_type="multi_label_classification")
    (said,) = model.classify(["the king"])
    logits = model.forward([tokenizer.encode("the king")]).to_numpy().logits[0].astype(np.float64)
    np.testing.assert_allclose(list(said.probabilities.values()), 1 / (1 + np.exp(-logits)), 1e-6)
    assert said.probability == said.probabilities[said.label] == max(said.probabilities.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"id2label": {0: "height"}, "num_labels": None},
        {"id2label": {0: "height", 1: "width"}, "num_labels": None, "problem_type": "regression"},
    ],
)
def test_classify_gives_the_values_of_a_regression(build, tokenizer, changes):
    model = build("sequence_classification", **changes)
    (said,) = model.classify(["the king"])
    logits = model.forward([tokenizer.encode("the king")]).to_numpy().logits[0]
    assert (said.label, said.probability, said.probabilities) == (None, None, {})
    assert list(said.values) == list(changes["id2label"].values())
    np.testing.assert_allclose(list(said.values.values()), logits, rtol=1e-6)


def test_large_logits_do_not_overflow(build, monkeypatch):
    model = build("sequence_classification")
    monkeypatch.setattr(model.contract, "features", lambda inputs: np.full((*inputs.shape, 6), 1e6))
    for kind in ("single_label_classification", "multi_label_classification"):
        model.config = dataclasses.replace(model.config, problem_type=kind)
        (said,) = model.classify(["the"])
        assert np.isfinite(list(said.probabilities.values())).all()


def test_tag(build, tokenizer):
    model = build("token_classification")
    text = "the é😀 king"
    (tags,) = model.tag([text])
    ids = tokenizer.encode(text)
    logits = model.forward([ids]).to_numpy().logits[0].astype(np.float64)
    assert [tag.token_id for tag in tags] == ids[1:]
    for tag, row in zip(tags, logits[1:], strict=True):
        assert tag.label == ["noun", "verb", "other"][int(row.argmax())]
        assert tag.probability == pytest.approx(float(np.exp(row.max()) / np.exp(row).sum()))
        assert tag.text == text[tag.start : tag.end]
    emoji = [tag for tag in tags if tag.text == "😀"]
    assert [(tag.start, tag.end) for tag in emoji] == [(5, 6)] * 4
    assert tags[-1].end == len(text)
