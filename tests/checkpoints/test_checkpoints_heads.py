"""Checkpoints of every kind, opened for every task: heads left alone, new, and of wrong sizes."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from gemma_hub.checkpoints import describe_checkpoint, open_checkpoint, save_checkpoint
from gemma_hub.errors import CheckpointError, InputError, NewHeadWarning
from gemma_hub.parameters import ArrayWeights, parameter_shapes

EMBEDDING = "model.embed_tokens.weight"
TASKS = ("base", "causal_lm", "sequence_classification", "token_classification")
CLASSIFICATIONS = TASKS[2:]
NAMES = {0: "NEG", 1: "NEU", 2: "POS"}
FIRST_OF_SEED_0 = [0.000661009, 0.017181356, 0.015453411]


@pytest.fixture
def stored(write, arrays, config):
    """stored(task, bare=..., **changes): a checkpoint of three labels as `task` leaves it."""

    def stored(task, bare=False, names=NAMES, **changes):
        made = dataclasses.replace(config.with_labels(id2label=names), **changes)
        draw = np.random.default_rng(7).normal
        tensors = {
            name: arrays[name] if name in arrays else draw(size=shape).astype(np.float32)
            for name, shape in parameter_shapes(made, task).items()
        }
        if bare:
            tensors = {name.removeprefix("model."): array for name, array in tensors.items()}
        return write(tensors, config=made.to_dict(task)), tensors

    return stored


def assert_holds(weights, task, config, tensors):
    assert weights.names() == tuple(parameter_shapes(config, task))
    for name in weights.names():
        array = tensors.get(name, tensors.get(name.removeprefix("model.")))
        assert weights.read(name).tobytes() == array.tobytes()
        assert weights.shape(name) == array.shape


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_each_kind_opens_for_its_own_task(stored, task, bare):
    folder, tensors = stored(task, bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = open_checkpoint(folder, task)
    assert_holds(checkpoint.weights, task, checkpoint.config, tensors)
    assert checkpoint.config.id2label == NAMES
    assert describe_checkpoint(folder).task == task
    assert describe_checkpoint(folder).problems == ()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("task", ["base", "causal_lm"])
@pytest.mark.parametrize("kind", TASKS)
def test_every_tied_kind_opens_as_a_model_without_labels(stored, kind, task, bare):
    folder, tensors = stored(kind, bare)
    checkpoint = open_checkpoint(folder, task)
    assert_holds(checkpoint.weights, task, checkpoint.config, tensors)


@pytest.mark.parametrize("task", ["base", *CLASSIFICATIONS])
def test_a_head_of_its_own_is_left_alone(stored, task):
    folder, tensors = stored("causal_lm", tie_word_embeddings=False)
    labels = {"num_labels": 3} if task in CLASSIFICATIONS else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewHeadWarning)
        weights = open_checkpoint(folder, task, **labels).weights
    assert "lm_head.weight" in tensors
    assert "lm_head.weight" not in weights.names()
    assert weights.read(EMBEDDING).tobytes() == tensors[EMBEDDING].tobytes()


@pytest.mark.parametrize("task", ["base", *CLASSIFICATIONS])
@pytest.mark.parametrize("shape", [(23, 12), (2, 2)])
def test_a_tied_head_that_differs_is_left_alone(write, arrays, config, task, shape):
    stored = arrays | {"lm_head.weight": np.full(shape, 7, np.float32)}
    folder = write(stored, config=config)
    labels = {"num_labels": 3} if task in CLASSIFICATIONS else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewHeadWarning)
        weights = open_checkpoint(folder, task, **labels).weights
    assert weights.read(EMBEDDING).tobytes() == arrays[EMBEDDING].tobytes()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        open_checkpoint(folder)


def test_a_description_is_of_the_stated_task(stored):
    folder, _ = stored("token_classification")
    path = folder / "config.json"
    path.write_text(path.read_text().replace("GemmaForTokenCl", "GemmaForSequenceCl"))
    description = describe_checkpoint(folder)
    assert description.task == "sequence_classification"
    assert len(description.problems) == 1
    assert "score.bias" in description.problems[0]
    for stated in ('["SomeOther"]', "null", '"GemmaModel"', "[7, []]"):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"architectures": json.loads(stated)})
        )
        assert describe_checkpoint(folder).task == "causal_lm"


@pytest.mark.parametrize("kind", ["base", *CLASSIFICATIONS])
def test_an_untied_causal_lm_needs_its_head(stored, kind):
    folder, _ = stored(kind, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"Missing \(1\): lm_head\.weight"):
        open_checkpoint(folder)


# -- new heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSIFICATIONS)
def test_a_missing_head_asks_for_the_number_of_labels(stored, task):
    folder, _ = stored("causal_lm")
    with pytest.raises(CheckpointError, match=f"no score head, which {task} needs. Pass num_label"):
        open_checkpoint(folder, task)


@pytest.mark.parametrize("task", CLASSIFICATIONS)
@pytest.mark.parametrize("kind", ["base", "causal_lm"])
def test_a_new_head_is_announced_and_seeded(stored, kind, task):
    folder, tensors = stored(kind)
    with pytest.warns(NewHeadWarning, match=rf"no head for {task}.*num_labels=40.*seed 3") as said:
        checkpoint = open_checkpoint(folder, task, num_labels=40, seed=3)
    assert len(said) == 1
    weights = checkpoint.weights
    assert checkpoint.config.num_labels == 40
    assert weights.names() == tuple(parameter_shapes(checkpoint.config, task))
    head = weights.read("score.weight")
    assert (head.shape, head.dtype, weights.dtype("score.weight")) == ((40, 12), "f4", "float32")
    assert weights.shape("score.weight") == (40, 12)
    np.testing.assert_array_equal(weights.read("score.weight", slice(3, 5)), head[3:5])
    # 480 numbers of the config's initializer_range, 0.02.
    assert abs(head.mean()) < 0.004
    assert head.std() == pytest.approx(0.02, rel=0.15)
    if task == "token_classification":
        assert not weights.read("score.bias").any()
    assert weights.read(EMBEDDING).tobytes() == tensors[EMBEDDING].tobytes()
    with pytest.warns(NewHeadWarning):
        again = open_checkpoint(folder, task, num_labels=40, seed=3).weights
    assert again.read("score.weight").tobytes() == head.tobytes()
    with pytest.warns(NewHeadWarning):
        other = open_checkpoint(folder, task, num_labels=40, seed=4).weights
    assert other.read("score.weight").tobytes() != head.tobytes()


def test_a_new_head_is_the_same_everywhere(stored):
    folder, _ = stored("base")
    with pytest.warns(NewHeadWarning):
        weights = open_checkpoint(folder, "sequence_classification", num_labels=2).weights
    first = weights.read("score.weight")[0, :3]
    # Written down, so that a change of the draw does not go unseen.
    np.testing.assert_allclose(first, FIRST_OF_SEED_0, rtol=1e-6)


def test_names_stay_where_they_fit(stored):
    folder, _ = stored("causal_lm")
    with pytest.warns(NewHeadWarning):
        checkpoint = open_checkpoint(folder, "token_classification", num_labels=3)
    assert checkpoint.config.id2label == NAMES
    with pytest.warns(NewHeadWarning):
        checkpoint = open_checkpoint(folder, "token_classification", num_labels=2)
    assert checkpoint.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_checkpoint_that_lacks_more_than_the_head_is_no_base(stored):
    folder, tensors = stored("base")
    from safetensors.numpy import save_file

    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Missing \(1\): model\.norm\.weight"):
        open_checkpoint(folder, "sequence_classification", num_labels=3)


# -- heads that do not fit -------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSIFICATIONS)
def test_a_head_of_another_size_than_asked_for(stored, task):
    folder, _ = stored(task)
    with pytest.raises(
        CheckpointError, match=r"score head of shape \(3, 12\), and num_labels is 4"
    ):
        open_checkpoint(folder, task, num_labels=4)
    assert open_checkpoint(folder, task, num_labels=3).config.id2label == NAMES


def test_a_head_of_another_size_than_the_config_says(stored):
    folder, _ = stored("sequence_classification")
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["id2label"], raw["label2id"]
    path.write_text(json.dumps(raw))
    with pytest.raises(
        CheckpointError,
        match=r"score\.weight is \(3, 12\), expected \(2, 12\) from num_labels=2, hidden_size=12",
    ):
        open_checkpoint(folder, "sequence_classification")
    # A writer that names no labels: whoever opens the checkpoint says how many there are.
    checkpoint = open_checkpoint(folder, "sequence_classification", num_labels=3)
    assert checkpoint.config.num_labels == 3


def test_one_kind_of_classifier_is_not_the_other(stored):
    folder, _ = stored("token_classification")
    with pytest.raises(CheckpointError, match=r"Unexpected \(1\): score\.bias.*\n.*token classif"):
        open_checkpoint(folder, "sequence_classification")


def test_a_sequence_classifier_is_no_token_classifier(stored):
    folder, _ = stored("sequence_classification")
    with pytest.raises(CheckpointError, match=r"Missing \(1\): score\.bias.*\n.*sequence classif"):
        open_checkpoint(folder, "token_classification")
    with pytest.raises(CheckpointError, match=r"Missing \(1\): score\.bias"):
        open_checkpoint(folder, "token_classification", num_labels=3)


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("tokens", {}, "There is no task 'tokens'.*Known: base, causal_lm"),
        (None, {}, "There is no task None"),
        ("causal_lm", {"num_labels": 3}, "num_labels is 3 and the task 'causal_lm' has no labels"),
        ("base", {"num_labels": 3}, "'base' has no labels"),
        ("sequence_classification", {"num_labels": 0}, "num_labels is 0; expected an integer"),
        ("sequence_classification", {"num_labels": True}, "num_labels is True"),
        ("sequence_classification", {"num_labels": 3, "seed": None}, "seed is None"),
    ],
)
def test_bad_arguments(stored, task, options, words):
    folder, _ = stored("base")
    with pytest.raises(InputError, match=words):
        open_checkpoint(folder, task, **options)


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_saved_for_a_task_and_only_with_its_parameters(tmp_path, arrays, config, task):
    config = config.with_labels(id2label=NAMES)
    shapes = parameter_shapes(config, task)
    tensors = {n: arrays.get(n, np.ones(shape, np.float32)) for n, shape in shapes.items()}
    save_checkpoint(tmp_path / "out", config, ArrayWeights(tensors), task=task)
    checkpoint = open_checkpoint(tmp_path / "out", task)
    assert_holds(checkpoint.weights, task, config, tensors)
    assert checkpoint.config == config
    del tensors["model.norm.weight"]
    extra = ArrayWeights(tensors | {"score.scale": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"Missing \(1\): model.norm[^\n]*\n.*score\.scale"):
        save_checkpoint(tmp_path / "other", config, extra, task=task)
