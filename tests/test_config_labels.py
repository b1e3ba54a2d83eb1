"""The config of a classification head: labels, problem type, dropout."""

import dataclasses
import json
import pickle

import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import ConfigError

NAMES = {0: "NEG", 1: "NEU", 2: "POS"}
IN_JSON = {"0": "NEG", "1": "NEU", "2": "POS"}


def read(**raw):
    return GemmaConfig.from_dict(json.loads(json.dumps(raw)))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, {0: "LABEL_0", 1: "LABEL_1"}),
        ({"num_labels": 3}, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}),
        ({"num_labels": 1}, {0: "LABEL_0"}),
        ({"id2label": NAMES}, NAMES),
        ({"id2label": IN_JSON}, NAMES),
        ({"id2label": {"2": "POS", "0": "NEG", "1": "NEU"}, "num_labels": 3}, NAMES),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "num_labels": 1}, {0: "LABEL_0"}),
    ],
)
def test_labels(given, names):
    config = GemmaConfig(**given)
    assert list(config.id2label.items()) == list(names.items())
    assert config.num_labels == len(names)
    assert config.label2id == {name: i for i, name in names.items()}
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_labels": 0}, "num_labels is 0; expected an integer from 1 to"),
        ({"num_labels": True}, "num_labels is True"),
        ({"num_labels": "2"}, "num_labels is '2'"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"num_labels": 2, "id2label": NAMES}, "num_labels is 2 and id2label names 3"),
        ({"id2label": {}}, "id2label is {}; expected an object"),
        ({"id2label": ["NEG"]}, "id2label is .'NEG'.; expected an object"),
        ({"id2label": {0: "a", 2: "b"}}, "has the id 2; expected each of 0 to 1 once"),
        ({"id2label": {"0": "a", 0: "b"}}, "has the id 0"),
        ({"id2label": {"x": "a"}}, "has the id 'x'"),
        ({"id2label": {"9" * 5000: "a"}}, "has the id '999"),
        ({"id2label": {-1: "a"}}, "has the id -1"),
        ({"id2label": {True: "a", 0: "b"}}, "has the id True"),
        ({"id2label": {0: 7}}, "names 0 7; expected a text"),
        ({"id2label": {0: "a", 1: "a"}}, "a name to two ids: a"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'; expected one of regression"),
        ({"problem_type": ["regression"]}, "problem_type is "),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "needs two"),
        ({"classifier_dropout": 1.0}, "classifier_dropout is 1.0; expected a number from 0"),
        ({"classifier_dropout": "0.1"}, "classifier_dropout is '0.1'"),
        ({"classifier_dropout": -0.1}, "classifier_dropout is -0.1"),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        GemmaConfig(**given)


def test_label2id_says_the_same_or_nothing():
    inverse = {"NEG": 0, "NEU": 1, "POS": 2}
    assert read(label2id=inverse).id2label == NAMES
    assert read(label2id=inverse, id2label=IN_JSON).id2label == NAMES
    assert read(label2id=None, id2label=IN_JSON).id2label == NAMES
    with pytest.raises(ConfigError, match="not the inverse of id2label"):
        read(label2id={"NEG": 1, "NEU": 0, "POS": 2}, id2label=IN_JSON)
    with pytest.raises(ConfigError, match="num_labels is 5 and id2label names 3"):
        read(label2id=inverse, num_labels=5)
    for wrong in (7, {"NEG": []}, {"NEG": "0"}, ["NEG"]):
        with pytest.raises(ConfigError, match=r"label2id is .*; expected an object {name: id}"):
            read(label2id=wrong)
    for nothing in ({}, None):
        assert read(label2id=nothing, id2label=nothing) == GemmaConfig()


@pytest.mark.parametrize(
    ("raw", "dropout"),
    [
        ({}, 0.1),
        ({"classifier_dropout": None}, 0.1),
        ({"classifier_dropout": 0}, 0.0),
        ({"classifier_dropout": 0.3, "hidden_dropout": 0.2}, 0.3),
        ({"hidden_dropout": 0.2}, 0.2),
        ({"classifier_dropout": None, "hidden_dropout": 0.2}, 0.2),
    ],
)
def test_dropout_of_the_token_classifier(raw, dropout):
    assert read(**raw).classifier_dropout == dropout


@pytest.mark.parametrize("task", ["base", "causal_lm", "token_classification"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_labels": 5},
        {"id2label": NAMES, "problem_type": "regression"},
        {"classifier_dropout": 0.25},
        {"classifier_dropout": 0.0},
    ],
)
def test_written_and_read_for_every_task(fields, task):
    config = GemmaConfig(**fields)
    written = json.loads(json.dumps(config.to_dict(task)))
    assert GemmaConfig.from_dict(written) == config


def test_labels_are_written_where_they_say_something():
    assert "id2label" not in GemmaConfig().to_dict()
    assert "id2label" not in GemmaConfig().to_dict("base")
    assert GemmaConfig().to_dict("sequence_classification")["label2id"] == {
        "LABEL_0": 0,
        "LABEL_1": 1,
    }
    assert GemmaConfig(id2label=NAMES).to_dict()["id2label"] == IN_JSON


def test_other_labels():
    config = GemmaConfig(id2label=NAMES, problem_type="regression")
    assert config.with_labels(2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert config.with_labels(id2label={0: "x"}).num_labels == 1
    assert config.with_labels(2).problem_type == "regression"
    assert dataclasses.replace(GemmaConfig(), num_labels=4).num_labels == 4
    with pytest.raises(ConfigError, match="num_labels is 2 and id2label names 3"):
        config.with_labels(2, NAMES)
