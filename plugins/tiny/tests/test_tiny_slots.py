"""What the checkpoint "tiny-slots" promises, and that its script learns."""

import json

import pytest
from typer.testing import CliRunner

from gemma_hub import Gemma
from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.cli.app import app

BACKENDS = ["torch", "flax"]


@pytest.fixture(scope="module")
def shipped(shipped_checkpoint):
    return shipped_checkpoint("tiny-slots")


@pytest.fixture
def finetuned(training_path):
    from training import finetuned

    return finetuned


def test_it_has_a_head_over_the_slots(shipped):
    checkpoint = open_checkpoint(shipped.folder, task="token_classification")
    config = checkpoint.config
    assert config.id2label[0] == "O"
    assert config.num_labels == 79
    assert {"B-artist", "I-artist", "B-city", "I-timeRange"} < set(config.id2label.values())
    assert checkpoint.weights.shape("score.weight") == (79, config.hidden_size)
    assert checkpoint.weights.shape("score.bias") == (79,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command_line_tags_every_character(backend, shipped):
    pytest.importorskip(f"gemma_hub_{backend}")
    result = CliRunner().invoke(app, ["tag", "tiny-slots", "play some jazz", "--backend", backend])
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert "".join(json.loads(row[-1]) for row in rows) == "play some jazz"
    assert rows[0][2] == "O"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_examples_come_out_again(backend, shipped, finetuned):
    pytest.importorskip(f"gemma_hub_{backend}")
    from training.queries import Query

    examples = shipped.figures["held_out"]["examples"]
    asked = [Query("", ((example["text"], None),)) for example in examples]
    for example, spans in zip(
        examples, finetuned.tagged("tiny-slots", backend, asked), strict=True
    ):
        assert [[slot, example["text"][i:j]] for slot, i, j in spans] == example["slots"]
        shown = ", ".join(f"{slot}: {text}" for slot, text in example["slots"])
        assert f"| {example['text']} | {shown} |" in shipped.card


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_held_out_f1_is_the_cards(backend, shipped, finetuned, held_out_queries):
    pytest.importorskip(f"gemma_hub_{backend}")
    found = finetuned.tagged(shipped.folder, backend, held_out_queries)
    figures = finetuned.slot_figures(held_out_queries, found)
    recorded = shipped.figures["held_out"]
    assert figures == {key: recorded[key] for key in figures}
    assert f"**Held-out span F1: {figures['all']['f1']:.4f}**" in shipped.card


def test_both_backends_agree_on_every_token(shipped, held_out_queries):
    # Some of them: the spans of all are compared with the card's.
    texts = [query.text for query in held_out_queries[::5]]
    labels = []
    for backend in BACKENDS:
        pytest.importorskip(f"gemma_hub_{backend}")
        model = Gemma.load(
            "tiny-slots", task="token_classification", backend=backend, dtype="float32"
        )
        rows = model.tag(texts, batch_size=32)
        labels.append([(tag.start, tag.end, tag.label) for row in rows for tag in row])
    assert len(labels[0]) > 2_000
    assert labels[0] == labels[1]


def test_the_right_labels_give_the_best_possible_score(shipped, finetuned, held_out_queries):
    best = finetuned.best_possible(held_out_queries, shipped.folder)
    assert best == shipped.figures["held_out"]["best_possible_f1"]
    assert best > 0.99


def test_the_script_learns_on_a_small_model(training_path, small_base):
    pytest.importorskip("gemma_hub_flax")
    pytest.importorskip("optax")
    import finetune_slots
    from gemma_hub.errors import NewHeadWarning
    from gemma_hub.tokenizers import GemmaTokenizer
    from training import finetuning, slots
    from training.queries import Data, Query

    asked = [
        Query("PlayMusic", ((f"{n % 10} by ", None), (f"{n // 10}", "artist"))) for n in range(64)
    ]
    settings = finetuning.Settings(epochs=5, patience=5, rows=16, peak_rate=1e-2, warm_up=4)
    data = Data(asked, asked, [])
    names = slots.names_of(asked)
    with pytest.warns(NewHeadWarning, match="num_labels=3"):
        learner = finetune_slots.FlaxLearner(
            small_base, names, settings, finetuning.number_of_steps(data, settings)
        )
    tokenizer = GemmaTokenizer.from_pretrained(small_base)
    judge = finetune_slots.judge_with(names, tokenizer)
    label = finetune_slots.label_with(names)
    history = finetuning.fine_tune(learner, data, tokenizer, label, judge, settings)
    assert history.curve[-1]["loss"] < 0.5 * history.curve[0]["loss"]
    assert history.best["score"] > 0.9
