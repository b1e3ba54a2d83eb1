"""The comparison: right backends pass, wrong ones are named with the place, broken ones shown."""

import json

import numpy as np
import pytest

import gemma_hub
from gemma_hub.error_model import RATIO_LIMIT
from gemma_hub.errors import BackendNotFoundError, InputError, PluginError
from gemma_hub.parity import ParityReport

PLACES = ["embedding", "layer 0", "layer 1", "layer 2", "final norm", "logits"]


def test_right_backends_pass_at_every_place_with_a_ratio_near_one(run, backend):
    report = run({"one": backend(), "two": backend()})
    assert [row.place for row in report.rows] == PLACES
    assert report.passed
    assert report.first_divergence is None
    assert report.tokens_equal
    for row in report.rows:
        assert 0.5 < row.band[0] < 1 < row.band[1] < 2
        for name in ("one", "two"):
            assert 0.5 < row.cells[name].ratio < 2, (row.place, name)
    assert "every layer within" in report.verdict
    assert [run.distribution for run in report.backends] == ["gemma-hub-fake"] * 2
    assert {run.device for run in report.backends} == {"fake:0"}


@pytest.mark.parametrize("place", PLACES)
def test_the_first_wrong_place_is_named(run, backend, place):
    report = run({"good": backend(), "bad": backend(wrong_at=place)})
    assert not report.passed
    assert report.first_divergence == ("bad", place)
    assert f"bad diverges first at {place}" in report.verdict
    before = report.rows[: PLACES.index(place)]
    assert all(row.cells["bad"].passed for row in before)
    assert all(row.cells["good"].passed for row in report.rows)
    assert report.rows[PLACES.index(place)].cells["bad"].ratio > RATIO_LIMIT


def test_the_last_layer_shows_at_the_final_norm(run, backend):
    report = run({"bad": backend(wrong_at="layer 3")})
    assert report.first_divergence == ("bad", "final norm")


def test_a_cache_that_forgets_shows_in_the_tokens_alone(run, backend):
    report = run({"bad": backend(wrong_at="cache")})
    assert all(row.cells["bad"].passed for row in report.rows)
    assert report.first_divergence == ("bad", "tokens")
    assert not report.tokens_equal
    assert "bad generates other tokens" in report.verdict
    check = next(check for check in report.tokens if check.verdict == "different")
    assert check.at is not None
    assert check.at > 0  # the first new token comes from the prompt alone


def test_a_backend_that_raises_is_a_failed_column_and_the_others_are_measured(run, backend):
    report = run({"broken": backend(error=RuntimeError("out of memory")), "good": backend()})
    assert not report.passed
    assert report.first_divergence == ("broken", "run")
    assert report.backends[0].error == "RuntimeError: out of memory"
    assert report.verdict == "broken did not run: RuntimeError: out of memory."
    assert all(list(row.cells) == ["good"] for row in report.rows)
    assert all(row.cells["good"].passed for row in report.rows)


def test_the_verdict_names_every_backend_that_is_wrong_and_the_first_place_comes_first(
    run, backend
):
    report = run(
        {
            "late": backend(wrong_at="logits"),
            "good": backend(),
            "early": backend(wrong_at="layer 1"),
            "forgets": backend(wrong_at="cache"),
        }
    )
    assert report.divergences == {"late": "logits", "early": "layer 1", "forgets": "tokens"}
    assert report.first_divergence == ("early", "layer 1")
    for sentence in (
        "late diverges first at logits",
        "early diverges first at layer 1",
        "forgets generates other tokens",
    ):
        assert sentence in report.verdict
    assert "good" not in report.verdict


def test_a_plugin_that_does_not_load_is_a_failed_column(run, backend):
    report = run({"broken": PluginError("flax is not installed."), "good": backend()})
    assert report.backends[0].error == "flax is not installed."
    assert report.rows


def test_no_result_at_all_is_no_pass_and_measures_no_noise(run, backend, registry):
    reference = backend()
    report = run(
        {"broken": backend(error=ValueError("no"))}, registry=registry({"numpy": reference})
    )
    assert not report.passed
    assert report.rows == ()
    assert report.tokens == ()
    assert not report.tokens_equal
    assert len(reference.built) == 1  # the continuations


def test_a_backend_without_hidden_states_is_a_failed_column(run, backend, monkeypatch):
    wrong = backend()
    build = wrong.build

    def without_states(*args):
        model = build(*args)
        outputs = model.outputs
        model.outputs = lambda *a: type(outputs(*a))(outputs(*a).logits)
        return model

    monkeypatch.setattr(wrong, "build", without_states)
    report = run({"bad": wrong})
    assert "no hidden_states; expected 5" in report.backends[0].error


def test_a_value_that_is_not_finite_fails_and_the_json_stays_valid(run, backend, tmp_path):
    wrong = backend()
    build = wrong.build

    def with_nan(*args):
        model = build(*args)
        forward = model.forward

        def spoiled(inputs):
            outputs = forward(inputs)
            outputs.hidden_states[1][0, -1, 0] = np.nan
            return outputs

        model.forward = spoiled
        return model

    wrong.build = with_nan
    report = run({"bad": wrong})
    assert report.first_divergence == ("bad", "layer 0")
    assert "NaN or infinite" in report.verdict
    report.to_json(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert values["passed"] is False
    assert values["rows"][1]["cells"]["bad"]["ratio"] is None


def test_an_unknown_backend_is_an_error_before_anything_is_built(run, backend, registry):
    reference = backend()
    known = registry({"numpy": reference, "one": backend()})
    with pytest.raises(BackendNotFoundError, match="'too'"):
        run({}, backends=["one", "too"], registry=known)
    assert reference.built == []


@pytest.mark.parametrize("reference", [None, PluginError("It is broken.")])
def test_without_the_reference_the_error_names_the_distribution(run, backend, registry, reference):
    found = registry({} if reference is None else {"numpy": reference})
    with pytest.raises(PluginError, match=r"float64 reference.*pip install gemma-hub-numpy"):
        run({"one": backend()}, registry=found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backends": []}, "at least one name"),
        ({"backends": "torch"}, "at least one name"),
        ({"backends": ["one", "one"]}, "each once"),
        ({"dtype": "float64"}, "dtype is 'float64'; expected one of float32"),
        ({"witnesses": 1}, "witnesses is 1; expected an integer from 2 up"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"texts": []}, "at least one text"),
        ({"texts": "text"}, "expected a list"),
        ({"texts": ["text"]}, "no tokenizer.model"),
    ],
)
def test_a_wrong_argument_is_named(run, backend, arguments, message):
    with pytest.raises(InputError, match=message):
        run({"one": backend()}, **arguments)


def test_prompts_may_be_ids_and_the_default_ones_fit_the_model(run, backend):
    report = run({"one": backend()}, texts=[[1, 2, 3], (4,)])
    assert [text.prompt_token_ids for text in report.texts] == [(1, 2, 3), (4,)]
    assert len(report.tokens) == 4
    longest = max(len(text.prompt_token_ids) for text in run({"one": backend()}).texts)
    assert longest == 32 - 6  # max_position_embeddings less the new tokens


def test_progress_is_told_from_the_beginning_to_the_end(run, backend):
    seen = []
    run({"one": backend()}, progress=lambda *step: seen.append(step))
    done = [step[1] for step in seen]
    assert done == list(range(len(seen)))
    assert {step[2] for step in seen} == {len(seen) - 1}
    assert seen[1][0] == "one: running"


def test_the_report_says_how_it_was_made(run, backend):
    values = json.loads(json.dumps(run({"one": backend()}).to_dict(), allow_nan=False))
    assert values["schema"] == "gemma-hub-parity/1"
    assert values["seeds"] == {"sampling": 3, "witnesses": [1, 2, 3, 4, 5, 6]}
    assert values["dtype"] == "float32"
    assert values["config"]["num_hidden_layers"] == 4
    assert {"Python", "numpy", "gemma-hub"} <= values["versions"].keys()
    assert values["rows"][0]["cells"]["one"]["passed"] is True


def test_every_witness_is_built_with_its_own_seed_in_the_dtype(run, backend, registry):
    reference = backend()
    run({"one": backend()}, registry=registry({"numpy": reference}), texts=[[1]], dtype="bfloat16")
    witnesses = [options for options in reference.built if options.extra]
    assert [options.extra["witness"] for options in witnesses] == [1, 2, 3, 4, 5, 6] * 2
    assert {options.dtype for options in witnesses} == {"bfloat16"}


def test_the_package_is_the_function_whatever_was_imported_from_it():
    assert callable(gemma_hub.parity)
    with pytest.raises(TypeError, match="source"):
        gemma_hub.parity()
    assert ParityReport.__name__ == "ParityReport"
