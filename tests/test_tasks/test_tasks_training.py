"""forward with labels, loss_and_gradients, saving, and what a backend lacks: for every task."""

import json

import numpy as np
import pytest

from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.errors import InputError, UnsupportedFeature
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import parameter_shapes

TASKS = ("base", "causal_lm", "sequence_classification", "token_classification")
IDS = [[2, 5, 9], [2, 7, 0]]
LABELS = {
    "causal_lm": [[2, 5, 9], [2, 7, -100]],
    "sequence_classification": [2, 0],
    "token_classification": [[0, 1, 2], [0, 1, -100]],
}
ARCHITECTURES = {
    "base": "GemmaModel",
    "causal_lm": "GemmaForCausalLM",
    "sequence_classification": "GemmaForSequenceClassification",
    "token_classification": "GemmaForTokenClassification",
}


@pytest.mark.parametrize("task", TASKS)
def test_forward_gives_what_the_task_is_for(build, task):
    model = build(task)
    out = model.forward(IDS)
    shapes = {
        "causal_lm": (2, 3, model.config.vocab_size),
        "sequence_classification": (2, 3),
        "token_classification": (2, 3, 3),
    }
    if task == "base":
        assert out.logits is None
        assert out.last_hidden_state.shape == (2, 3, 6)
    else:
        assert out.last_hidden_state is None
        assert out.logits.shape == shapes[task]
    assert out.loss is None


@pytest.mark.parametrize("task", LABELS)
def test_loss_and_gradients(build, task):
    model = build(task)
    mask = [[1, 1, 1], [1, 1, 0]]
    loss, gradients = model.loss_and_gradients(IDS, mask, labels=LABELS[task])
    assert loss == np.sum(LABELS[task])
    assert {n: g.shape for n, g in gradients.items()} == parameter_shapes(model.config, task)
    (inputs,) = model.contract.calls
    np.testing.assert_array_equal(inputs.attention_mask, np.asarray(mask, bool))
    np.testing.assert_array_equal(inputs.labels, LABELS[task])
    assert model.forward(IDS, mask, labels=LABELS[task]).loss == loss


@pytest.mark.parametrize("task", ["causal_lm", "token_classification"])
def test_the_number_of_items_reaches_the_backend(build, task):
    model = build(task)
    model.loss_and_gradients(IDS, labels=LABELS[task], num_items_in_batch=9)
    model.forward(IDS, labels=LABELS[task], num_items_in_batch=7)
    assert [call.num_items_in_batch for call in model.contract.calls] == [9, 7]


@pytest.mark.parametrize("task", TASKS)
def test_bad_calls_are_input_errors(build, task):
    model = build(task)
    embeds = np.zeros((2, 3, 6), np.float32)
    with pytest.raises(InputError, match="Got neither of input_ids and inputs_embeds"):
        model.forward()
    with pytest.raises(InputError, match="Got both of input_ids and inputs_embeds"):
        model.forward(IDS, inputs_embeds=embeds)
    with pytest.raises(InputError, match="labels is None; a loss needs labels"):
        model.loss_and_gradients(IDS, labels=None)
    wrong = "has no loss" if task == "base" else "labels has shape"
    with pytest.raises(InputError, match=wrong):
        model.forward(IDS, labels=np.zeros((3, 2), np.int64))
    assert model.contract.calls == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("feature", "arguments"),
    [
        ("attentions", {"input_ids": IDS, "output_attentions": True}),
        ("inputs_embeds", {"inputs_embeds": np.zeros((2, 3, 6), np.float32)}),
    ],
)
def test_a_feature_that_the_backend_lacks(build, task, feature, arguments):
    model = build(task, features=frozenset())
    with pytest.raises(UnsupportedFeature, match=f"'fake' does not support '{feature}'"):
        model.forward(**arguments)


class NoTraining:
    """A model that computes logits only."""

    device, native = "fake:0", None

    def __init__(self, config, task, weights):
        self.shape = (2, 3, config.vocab_size)

    def forward(self, inputs):
        return ModelOutputs(np.zeros(self.shape, np.float32))

    def to_numpy(self, array):
        return array


def test_a_backend_that_cannot_train(build, tmp_path):
    model = build("causal_lm", model=NoTraining, features=frozenset())
    with pytest.raises(UnsupportedFeature, match="'gradients'"):
        model.loss_and_gradients(IDS, labels=IDS)
    with pytest.raises(UnsupportedFeature, match="'loss:causal_lm'"):
        model.forward(IDS, labels=IDS)
    with pytest.raises(UnsupportedFeature, match="'export'"):
        model.save(tmp_path / "out")


@pytest.mark.parametrize("task", TASKS)
def test_what_is_saved_opens_for_the_same_task(build, tmp_path, task):
    model = build(task)
    model.save(tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["architectures"] == [ARCHITECTURES[task]]
    assert raw["id2label"] == {"0": "noun", "1": "verb", "2": "other"}
    assert raw["label2id"] == {"noun": 0, "verb": 1, "other": 2}
    again = open_checkpoint(tmp_path / "out", task)
    assert again.config.id2label == model.config.id2label
    assert again.weights.names() == model.contract.weights.names()
    for name in again.weights.names():
        assert again.weights.read(name).tobytes() == model.contract.weights.read(name).tobytes()


@pytest.mark.parametrize("task", TASKS)
def test_repr_counts_the_head(build, task):
    count = {"base": 0, "causal_lm": 0, "sequence_classification": 18, "token_classification": 21}
    model = build(task)
    body = model.config.num_parameters
    assert f"parameters={body + count[task]:_})" in repr(model)
    assert repr(model).startswith(f"{type(model).__name__}(backend='fake', dtype='float32'")


def test_every_array_of_a_result_becomes_numpy():
    out = ModelOutputs(
        logits=1, hidden_states=(2, 3), as_numpy=lambda value: np.full(2, value), loss=4,
        attentions=(5,), last_hidden_state=6,
    ).to_numpy()  # fmt: skip
    assert out.as_numpy is np.asarray
    arrays = (out.logits, *out.hidden_states, out.loss, *out.attentions, out.last_hidden_state)
    assert [array.tolist() for array in arrays] == [[n, n] for n in range(1, 7)]
    assert ModelOutputs().to_numpy() == ModelOutputs(as_numpy=np.asarray)
