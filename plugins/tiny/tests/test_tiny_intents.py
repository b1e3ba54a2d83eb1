"""What the checkpoint "tiny-intents" promises, and that its script learns."""

import re

import pytest
from typer.testing import CliRunner

from gemma_hub import Gemma
from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.cli.app import app

BACKENDS = ["torch", "flax"]


@pytest.fixture(scope="module")
def shipped(shipped_checkpoint):
    return shipped_checkpoint("tiny-intents")


@pytest.fixture
def finetuned(training_path):
    from training import finetuned

    return finetuned


def test_it_has_a_head_over_the_intents(shipped, training_path):
    from training.queries import INTENTS

    checkpoint = open_checkpoint(shipped.folder, task="sequence_classification")
    config = checkpoint.config
    assert tuple(config.id2label.values()) == INTENTS
    assert config.problem_type == "single_label_classification"
    assert checkpoint.weights.shape("score.weight") == (7, config.hidden_size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command_line_says_play_music(backend, shipped):
    pytest.importorskip(f"gemma_hub_{backend}")
    command = ["classify", "tiny-intents", "play some jazz", "--backend", backend]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"PlayMusic\t[01]\.\d{4}\tplay some jazz\n", result.stdout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_examples_come_out_again(backend, shipped):
    pytest.importorskip(f"gemma_hub_{backend}")
    model = Gemma.load(
        "tiny-intents", task="sequence_classification", backend=backend, dtype="float32"
    )
    examples = shipped.figures["held_out"]["examples"]
    for example, found in zip(examples, model.classify([e["text"] for e in examples]), strict=True):
        assert found.label == example["label"]
        # Rounded at 5e-4; float32 adds about 1e-5.
        assert found.probability == pytest.approx(example["probability"], abs=6e-4)
        assert f"| {example['text']} | {example['label']} |" in shipped.card


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_held_out_accuracy_is_the_cards(backend, shipped, finetuned, held_out_queries):
    """Every single prediction too, so that both backends agree on all of them."""
    pytest.importorskip(f"gemma_hub_{backend}")
    found = finetuned.classified(shipped.folder, backend, held_out_queries)
    figures = finetuned.intent_figures(held_out_queries, found)
    recorded = shipped.figures["held_out"]
    assert figures == {key: recorded[key] for key in figures}
    assert f"**Held-out accuracy: {100 * figures['accuracy']:.2f} %**" in shipped.card


def test_it_is_as_good_as_promised(shipped):
    held_out = shipped.figures["held_out"]
    assert held_out["accuracy"] >= 0.95
    assert held_out["accuracy"] == pytest.approx(held_out["right"] / 700, abs=1e-6)
    assert len(held_out["wrong"]) == 700 - held_out["right"]


def test_figures_of_intents(finetuned, training_path):
    from training.queries import INTENTS, Query

    asked = [Query(intent, ((intent, None),)) for intent in INTENTS for _ in range(2)]
    found = [query.intent for query in asked]
    found[0] = "PlayMusic"
    figures = finetuned.intent_figures(asked, found)
    assert figures["right"] == 13
    assert figures["accuracy"] == pytest.approx(13 / 14, abs=1e-6)
    assert figures["intents"]["AddToPlaylist"] == {"queries": 2, "precision": 1.0, "recall": 0.5}
    assert figures["intents"]["PlayMusic"]["precision"] == pytest.approx(2 / 3, abs=1e-6)
    assert figures["wrong"] == [
        {"text": "AddToPlaylist", "intent": "AddToPlaylist", "found": "PlayMusic"}
    ]


def test_the_script_learns_on_a_small_model(training_path, small_base):
    pytest.importorskip("gemma_hub_torch")
    import finetune_intents
    from gemma_hub.errors import NewHeadWarning
    from gemma_hub.tokenizers import GemmaTokenizer
    from training import finetuning
    from training.queries import INTENTS, Data, Query

    asked = [Query(intent, ((f"{intent} {n}", None),)) for intent in INTENTS for n in range(8)]
    settings = finetuning.Settings(epochs=16, patience=16, rows=8, peak_rate=1e-2, warm_up=4)
    data = Data(asked, asked, [])
    with pytest.warns(NewHeadWarning, match="num_labels=7"):
        learner = finetune_intents.TorchLearner(
            small_base, settings, finetuning.number_of_steps(data, settings)
        )
    history = finetuning.fine_tune(
        learner,
        data,
        GemmaTokenizer.from_pretrained(small_base),
        finetune_intents.label,
        finetune_intents.judge,
        settings,
    )
    assert history.curve[-1]["loss"] < 0.5 * history.curve[0]["loss"]
    assert history.best["accuracy"] > 0.9
