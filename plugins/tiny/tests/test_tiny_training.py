"""The training script: the split, the rows, the vocabulary, and taking a run up again."""

import itertools

import numpy as np
import pytest

TALE = (
    "Once upon a time there was a king who had three sons. The youngest went out to seek his "
    'fortune. "Take this bread," said the old woman. He thanked her, and rode on.\n\n'
    "On the third day he came to a castle. Nobody was there! A fire burned in the hall; he sat "
    "down and waited."
)


@pytest.fixture
def corpus(training_path):
    from training import corpus

    return corpus


@pytest.fixture
def vocabulary(training_path):
    from training import vocabulary

    return vocabulary


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


# -- the split -------------------------------------------------------------------------------------


def test_every_paragraph_is_on_one_side_of_the_split(corpus, corpus_file):
    text = corpus.read(corpus_file)
    training, held_out = corpus.split(text)
    assert len(corpus.books(text)) == 6
    paragraphs = sum(len(s.text.split()) for s in [*training, *held_out])
    # Lost are four lines with nothing under them: two titles of tales in chapters, and a cry in
    # capitals with the line after it.
    assert 0 <= len(text.split()) - paragraphs <= 30
    seen = {s.body for s in training}
    assert not seen & {s.body for s in held_out}


def test_a_twentieth_of_each_book_is_held_out(corpus, corpus_file):
    text = corpus.read(corpus_file)
    _, held_out = corpus.split(text)
    for name, book in corpus.books(text).items():
        size = sum(len(s.text) for s in held_out if s.body in book[len(book) // 2 :])
        assert 0.045 < size / len(book) < 0.065, name


def test_another_corpus_is_refused(corpus, tmp_path):
    path = tmp_path / "fairy_tales.txt"
    path.write_text("Once upon a time")
    with pytest.raises(SystemExit, match="It is another corpus"):
        corpus.read(path)


# -- rows ------------------------------------------------------------------------------------------


def test_training_rows_cover_the_story_and_start_where_sentences_do(corpus):
    story = corpus.Story("THE KING", TALE)
    rng = np.random.default_rng(0)
    covered, with_title, ends = set(), 0, 0
    for _ in range(20):
        rows = list(
            corpus.training_rows(
                [story], characters, text_of, rng, length=80, bos=2, eos=1, cut_rate=0.0
            )
        )
        for row in rows:
            assert row[0] == 2
            assert len(row) <= 81
            ended = row[-1] == 1
            ends += ended
            text = text_of(row[1 : len(row) - ended])
            start = story.text.index(text)
            assert start == 0 or story.text[start - 1] in " \n"
            covered |= set(range(start, start + len(text)))
        with_title += text_of(rows[0][1:]).startswith("THE KING\n\nOnce")
    assert covered == set(range(len(story.text)))
    assert 4 <= with_title <= 16
    assert ends >= 18  # a last row that is full has no room for <eos>


def test_held_out_rows_hold_every_token_once(corpus):
    stories = [corpus.Story("T", TALE), corpus.Story("", "é")]
    rows, size = corpus.held_out_rows(stories, characters, length=50, bos=2)
    assert all(row[0] == 2 and 1 < len(row) <= 51 for row in rows)
    assert text_of([i for row in rows for i in row[1:]]) == "T\n\n" + TALE + "é"
    assert size == len(TALE) + 3 + 2


def test_cutting_changes_pieces_and_not_text(corpus, vocabulary):
    processor = vocabulary.load(vocabulary_of(vocabulary))
    rng = np.random.default_rng(0)
    ids = corpus.broken(processor.encode, TALE, 0.1, rng)
    assert processor.decode(ids) == TALE
    assert len(ids) > len(processor.encode(TALE))
    assert corpus.broken(processor.encode, TALE, 0.0, rng) == processor.encode(TALE)


def vocabulary_of(vocabulary) -> bytes:
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(3000)]
    return vocabulary.train(" ".join(words[i : i + 10]) for i in range(0, 3000, 10))


def test_a_wrong_special_id_is_refused(vocabulary, monkeypatch):
    model = vocabulary_of(vocabulary)
    monkeypatch.setitem(vocabulary.IDS, "<end_of_turn>", 108)
    with pytest.raises(SystemExit, match="<end_of_turn>"):
        vocabulary.check(model)


# -- the loop --------------------------------------------------------------------------------------


@pytest.fixture
def loop(training_path):
    pytest.importorskip("gemma_hub_torch")
    from training import loop

    return loop


def test_the_rate_warms_up_and_falls_to_its_last_value(loop):
    settings = loop.Settings(steps=1000, warm_up=100, peak_rate=1.0, last_rate=0.1)
    rates = [loop.learning_rate(step, settings) for step in range(1001)]
    assert rates[0] == 0.01
    assert max(rates) == rates[99] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[99:]))
    assert rates[550] == pytest.approx(0.55)
    assert rates[1000] == pytest.approx(0.1)


def test_padding_is_no_target(loop):
    ids, targets = loop.pad([[2, 5, 6, 1], [2, 7]], 4)
    assert ids.tolist() == [[2, 5, 6, 0], [2, 0, 0, 0]]
    assert targets.tolist() == [[5, 6, 1, -100], [7, -100, -100, -100]]


def test_a_run_taken_up_again_ends_where_one_in_a_piece_does(loop, corpus, vocabulary, tmp_path):
    import torch

    from gemma_hub.config import GemmaConfig

    config = GemmaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    stories = [corpus.Story(f"TALE {i}", TALE) for i in range(9)]
    data = loop.Data(stories, stories[:1], vocabulary_of(vocabulary))
    settings = loop.Settings(steps=8, rows=4, length=32, warm_up=2, evaluate_every=2)

    whole = loop.Run(config, settings, data, tmp_path / "whole")
    whole.train(minutes=5, compiled=False)
    parts = loop.Run(config, settings, data, tmp_path / "parts")
    parts.train(minutes=0, compiled=False)  # one step
    assert parts.step == 1
    again = loop.Run.load(config, data, tmp_path / "parts")
    again.train(minutes=5, compiled=False)

    assert again.step == whole.step == 8
    for name, expected in whole.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], expected), name
    assert whole.curve[-1]["held_out"] < whole.curve[0]["held_out"]
    assert again.curve[-1]["held_out"] == whole.curve[-1]["held_out"]
