"""`gemma-hub classify`, `tag` and `score`: what they load, and their lines and JSON."""

import json
from types import SimpleNamespace

import pytest

from gemma_hub.errors import CheckpointError
from gemma_hub.outputs import Score
from gemma_hub.tasks.sequence_classification import Classification
from gemma_hub.tasks.token_classification import Tag

TASKS = {
    "classify": "sequence_classification",
    "tag": "token_classification",
    "score": "causal_lm",
}


class FakeModel:
    """Says something of each text that depends on its length."""

    def __init__(self):
        self.backend = SimpleNamespace(name="fake", distribution="gemma-hub-fake", version="1.2")
        self.dtype, self.device = "float32", "fake:0"
        self.loaded, self.is_regression = {}, False

    def classify(self, texts):
        if self.is_regression:
            return [Classification(None, None, {}, {"height": len(t) / 3}) for t in texts]
        p = {"short": 0.75, "long": 0.25}
        return [Classification("short", p["short"], p, {}) for _ in texts]

    def tag(self, texts):
        return [[Tag("W", 0, len(t), t, 7, 0.5), Tag("S", 0, 1, t[:1], 8, 1.0)] for t in texts]

    def score(self, texts):
        return [Score((5, 6), (-0.5, -len(t) / 4), -0.5 - len(t) / 4) for t in texts]


@pytest.fixture
def model(monkeypatch):
    from gemma_hub.gemma import Gemma

    fake = FakeModel()

    def load(source, **options):
        fake.loaded = {"source": source, **options}
        return fake

    monkeypatch.setattr(Gemma, "load", staticmethod(load))
    return fake


@pytest.mark.parametrize(("command", "task"), TASKS.items())
def test_options_reach_the_model(cli, model, command, task):
    assert cli(command, "tiny", "one").exit_code == 0
    assert model.loaded == {
        "source": "tiny", "task": task, "backend": None, "dtype": "auto", "device": "auto",
        "backend_options": None,
    }  # fmt: skip
    cli(command, "tiny", "one", "--backend", "flax", "--dtype", "bfloat16", "--device", "cpu")
    assert model.loaded == {
        "source": "tiny", "task": task, "backend": "flax", "dtype": "bfloat16", "device": "cpu",
        "backend_options": None,
    }  # fmt: skip


def test_classify(cli, model):
    result = cli("classify", "tiny", "one\ttwo\nthree", "x " * 200)
    first, second = result.stdout.splitlines()
    assert first == "short\t0.7500\tone two three"
    assert second == "short\t0.7500\t" + "x " * 200
    assert result.stderr == ""


def test_classify_with_a_regression(cli, model):
    model.is_regression = True
    assert cli("classify", "tiny", "four").stdout == "height=1.3333\tfour\n"
    record = json.loads(cli("classify", "tiny", "four", "--json").stdout)
    assert record["results"][0]["values"] == {"height": 4 / 3}


def test_tag(cli, model):
    result = cli("tag", "tiny", "a b", "\u00fc\n")
    assert result.stdout.split("\n") == [
        '0\t3\tW\t0.5000\t"a b"',
        '0\t1\tS\t1.0000\t"a"',
        "",
        '0\t2\tW\t0.5000\t"\u00fc\\n"',
        '0\t1\tS\t1.0000\t"\u00fc"',
        "",
    ]


def test_score(cli, model):
    assert cli("score", "tiny", "four", "").stdout == "-1.5000\t2\tfour\n-0.5000\t2\t\n"


@pytest.mark.parametrize("command", TASKS)
def test_standard_input_has_a_text_on_each_line(cli, model, command):
    piped = json.loads(
        cli(command, "tiny", "one", "-", "four", "--json", input="two\r\n\nthree\x0bx").stdout
    )
    assert [result["text"] for result in piped["results"]] == [
        "one",
        "two",
        "",
        "three\x0bx",
        "four",
    ]


@pytest.mark.parametrize("command", TASKS)
def test_json_says_what_made_it(cli, model, command):
    record = json.loads(cli(command, "tiny", "four", "--json").stdout)
    (result,) = record.pop("results")
    assert record == {
        "source": "tiny", "backend": "fake", "distribution": "gemma-hub-fake", "version": "1.2",
        "dtype": "float32", "device": "fake:0",
    }  # fmt: skip
    expected = {
        "classify": {"label": "short", "probability": 0.75, "values": {},
                     "probabilities": {"short": 0.75, "long": 0.25}},
        "tag": {"tags": [
            {"label": "W", "start": 0, "end": 4, "text": "four", "token_id": 7, "probability": 0.5},
            {"label": "S", "start": 0, "end": 1, "text": "f", "token_id": 8, "probability": 1.0},
        ]},
        "score": {"token_ids": [5, 6], "logprobs": [-0.5, -1.0], "total": -1.5},
    }  # fmt: skip
    assert result == {"text": "four", **expected[command]}


@pytest.mark.parametrize("command", TASKS)
def test_a_text_is_needed(cli, model, command):
    assert cli(command, "tiny").exit_code == 2


def test_an_error_is_one_line_on_standard_error(cli, model, monkeypatch):
    from gemma_hub.gemma import Gemma

    def load(source, **options):
        raise CheckpointError("no score head. Pass num_labels.")

    monkeypatch.setattr(Gemma, "load", staticmethod(load))
    result = cli("classify", "tiny", "one")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: no score head" in result.stderr
