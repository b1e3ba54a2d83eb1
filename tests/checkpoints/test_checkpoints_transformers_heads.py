"""Transformers' classes with other heads: their checkpoints open here, and ours there."""

import pytest

from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.parameters import parameter_shapes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES = {
    "base": "GemmaModel",
    "causal_lm": "GemmaForCausalLM",
    "sequence_classification": "GemmaForSequenceClassification",
    "token_classification": "GemmaForTokenClassification",
}
NAMES = {0: "NEG", 1: "NEU", 2: "POS"}


def their_class(task):
    return getattr(transformers, CLASSES[task])


def theirs(task, **changes):
    sizes = {
        "vocab_size": 23,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "id2label": NAMES,
        "label2id": {name: i for i, name in NAMES.items()},
    }
    torch.manual_seed(0)
    model = their_class(task)(transformers.GemmaConfig(**(sizes | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def canonical_state(model, task):
    state = {n: t.numpy() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    return {f"model.{n}": array for n, array in state.items()} if task == "base" else state


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("task", CLASSES)
def test_every_class_there_and_back(tmp_path, task):
    model = theirs(task, problem_type="multi_label_classification", classifier_dropout=0.3)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = open_checkpoint(tmp_path / "theirs", task)
    assert checkpoint.config.id2label == NAMES
    assert checkpoint.config.problem_type == "multi_label_classification"
    assert checkpoint.config.classifier_dropout == 0.3
    state = canonical_state(model, task)
    assert (
        set(checkpoint.weights.names())
        == set(state)
        == set(parameter_shapes(checkpoint.config, task))
    )
    for name, array in state.items():
        assert checkpoint.weights.read(name).tobytes() == array.tobytes()

    save_checkpoint(tmp_path / "ours", checkpoint.config, checkpoint.weights, task=task)
    again, info = their_class(task).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert again.config.architectures == [CLASSES[task]]
    assert again.config.id2label == NAMES
    assert again.config.label2id == {name: i for i, name in NAMES.items()}
    assert again.config.problem_type == "multi_label_classification"
    assert again.config.classifier_dropout == 0.3
    for name, array in canonical_state(again, task).items():
        assert array.tobytes() == state[name].tobytes()


@pytest.mark.parametrize("task", ["base", "causal_lm"])
@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_opens_without_its_labels(tmp_path, kind, task):
    model = theirs(kind)
    model.save_pretrained(tmp_path / "theirs")
    weights = open_checkpoint(tmp_path / "theirs", task).weights
    state = canonical_state(model, kind)
    for name in weights.names():
        assert weights.read(name).tobytes() == state[name].tobytes()


@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_labels_without_names(tmp_path, num_labels):
    model = theirs("sequence_classification", id2label=None, label2id=None, num_labels=num_labels)
    model.save_pretrained(tmp_path / "theirs")
    config = open_checkpoint(tmp_path / "theirs", "sequence_classification").config
    assert config.num_labels == num_labels
    assert config.id2label == model.config.id2label
