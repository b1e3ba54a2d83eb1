"""Fine-tuning, without a framework: queries, slots, batches and the loop."""

import dataclasses

import numpy as np
import pytest


@pytest.fixture
def queries(training_path):
    from training import queries

    return queries


@pytest.fixture
def slots(training_path):
    from training import slots

    return slots


@pytest.fixture
def finetuning(training_path):
    from training import finetuning

    return finetuning


@pytest.fixture
def query(queries):
    parts = (("play ", None), ("some jazz", "genre"), (" by ", None), (" Bob ", "artist"))
    return queries.Query("PlayMusic", parts)


# -- queries ---------------------------------------------------------------------------------------


def test_spans_are_places_in_the_text_without_spaces_at_their_ends(query):
    assert query.text == "play some jazz by  Bob "
    assert query.spans == [("genre", 5, 14), ("artist", 19, 22)]
    assert [query.text[i:j] for _, i, j in query.spans] == ["some jazz", "Bob"]


def test_a_changed_file_is_refused(queries, tmp_path):
    (tmp_path / "train_AddToPlaylist.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"train_AddToPlaylist\.json has sha256"):
        queries.read(tmp_path, "train")


def test_the_split_keeps_held_out_queries_out(queries):
    train = [queries.Query(i, ((f"{i} {n}", None),)) for i in queries.INTENTS for n in range(50)]
    validate = [train[3], train[120], queries.Query("PlayMusic", (("new", None),))]
    data = queries.split(train, validate, seed=1)
    assert data.held_out == validate
    learned, stopping = ({q.text for q in part} for part in (data.training, data.stopping))
    assert not learned & stopping
    assert learned | stopping == {q.text for q in train} - {q.text for q in validate}
    for intent in queries.INTENTS:
        assert sum(q.intent == intent for q in data.stopping) in (4, 5)
    assert queries.split(train, validate, seed=1) == data
    assert queries.split(train, validate, seed=2) != data


def test_substitution_keeps_slots_and_changes_their_texts(queries, query):
    values = {"genre": ["rock"], "artist": ["Ann"]}
    rng = np.random.default_rng(0)
    assert queries.substituted(query, values, 0.0, rng) == query
    changed = queries.substituted(query, values, 1.0, rng)
    assert changed.text == "play rock by Ann"
    assert changed.spans == [("genre", 5, 9), ("artist", 13, 16)]
    texts = {queries.substituted(query, values, 0.5, rng).text for _ in range(50)}
    assert len(texts) == 4  # each slot by itself: filled anew or not
    assert queries.values_of([query, query])["genre"] == ["some jazz"] * 2


def test_the_files_are_the_benchmark(queries, queries_folder):
    train, validate = (queries.read(queries_folder, part) for part in ("train", "validate"))
    assert (len(train), len(validate)) == (2100, 700)
    assert sum(len(q.spans) for q in validate) == 1794
    assert len({slot for q in train for slot, _, _ in q.spans}) == 39


# -- slots -----------------------------------------------------------------------------------------


def test_the_labels_of_words_go_to_their_tokens(slots, query):
    text = query.text  # "play some jazz by  Bob "
    offsets = [(0, 4), (4, 9), (9, 12), (12, 14), (14, 18), (18, 20), (20, 22), (22, 23)]
    labels = slots.labels_of(text, query.spans, offsets)
    assert labels == ["O", "B-genre", "I-genre", "I-genre", "O", "B-artist", "B-artist", "O"]
    assert slots.spans_of(text, labels, offsets) == query.spans


def test_a_word_is_read_from_its_last_token(slots):
    offsets = [(0, 2), (2, 4)]
    assert slots.spans_of("Rome", ["B-artist", "B-city"], offsets) == [("city", 0, 4)]
    assert slots.spans_of("Rome", ["B-artist", "O"], offsets) == []
    # Two byte tokens of one character.
    assert slots.spans_of("é", ["O", "B-city"], [(0, 1), (0, 1)]) == [("city", 0, 1)]


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("B-x B-x O", [("x", 0, 1), ("x", 2, 3)]),
        ("B-x I-x O", [("x", 0, 3)]),
        ("I-x I-x I-x", [("x", 0, 5)]),
        ("B-x I-y I-y", [("y", 0, 5)]),
        ("I-x O I-x", [("x", 0, 1), ("x", 4, 5)]),
        ("O O O", []),
    ],
)
def test_how_labels_make_spans(slots, labels, spans):
    assert slots.spans_of("a b c", labels.split(), [(0, 1), (1, 3), (3, 5)]) == spans


def test_punctuation_is_a_word_of_its_own(slots):
    text, spans = "in New-York.", [("city", 3, 11)]
    offsets = [(0, 2), (2, 6), (6, 7), (7, 11), (11, 12)]
    labels = slots.labels_of(text, spans, offsets)
    assert labels == ["O", "B-city", "I-city", "I-city", "O"]
    assert slots.spans_of(text, labels, offsets) == spans


def test_names_of_labels(slots, query):
    assert slots.names_of([query]) == ["O", "B-artist", "I-artist", "B-genre", "I-genre"]


def test_a_span_is_right_only_if_slot_start_and_end_are(slots):
    expected = [[("x", 0, 4), ("y", 5, 9)], [("x", 2, 3)], []]
    found = [[("x", 0, 4), ("y", 5, 8)], [("y", 2, 3)], [("x", 0, 1)]]
    score = slots.score(expected, found)
    assert (score.expected, score.found, score.right) == (3, 4, 1)
    assert (score.precision, score.recall) == (1 / 4, 1 / 3)
    assert score.f1 == pytest.approx(2 / 7)
    by_slot = slots.scores_by_slot(expected, found)
    assert {name: (s.expected, s.found, s.right) for name, s in by_slot.items()} == {
        "x": (2, 2, 1), "y": (1, 2, 0)
    }  # fmt: skip
    assert slots.score([[]], [[]]).f1 == 0.0


# -- batches and the loop --------------------------------------------------------------------------


class Characters:
    """A tokenizer whose tokens are characters."""

    def encode_with_offsets(self, text):
        return [2, *map(ord, text)], [(0, 0), *((i, i + 1) for i in range(len(text)))]


def test_labels_of_tokens_leave_out_bos_and_padding(finetuning, query):
    def label(query, offsets):
        return [7 if start == 0 else 0 for start, _ in offsets]

    other = dataclasses.replace(query, parts=(("hi", None),))
    batch = finetuning.make_batch([query, other], Characters(), label)
    assert batch.ids.shape == batch.labels.shape == (2, 32)
    assert batch.ids[1, :4].tolist() == [2, ord("h"), ord("i"), 0]
    assert batch.mask.sum(1).tolist() == [24, 3]
    assert batch.labels[1, :4].tolist() == [-100, 7, 0, -100]
    assert (batch.labels == -100).sum() == 2 + 8 + 29


def test_an_epoch_holds_every_query_once(finetuning, queries):
    asked = [queries.Query("PlayMusic", ((f"{n:03}", "year"),)) for n in range(100)]
    settings = finetuning.Settings(epochs=1, patience=1, rows=10, substitution=0.0)

    def label(query, _):
        return int(query.text)

    def epochs(settings):
        batches = finetuning.training_batches(asked, Characters(), label, settings)
        return [[next(batches).labels for _ in range(10)] for _ in range(2)]

    first, second = epochs(settings)
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == [*range(100)]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(epochs(settings), [first, second])
    assert not np.array_equal(epochs(dataclasses.replace(settings, seed=1)), [first, second])


def test_the_rate_goes_up_and_down_to_zero(finetuning):
    settings = finetuning.Settings(epochs=1, patience=1, peak_rate=1.0, warm_up=10)
    rates = [finetuning.learning_rate(step, 110, settings) for step in range(111)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == 0.5
    assert rates[110] == 0.0


class Scripted:
    """A learner whose score after each epoch is given; its weights are the number of steps."""

    def __init__(self):
        self.step = 0

    def update(self, batch):
        self.step += 1
        return 1.0

    def logits(self, batch):
        return np.zeros((len(batch.ids), 2))

    def weights(self):
        return self.step

    def restore(self, weights):
        self.step = weights


def test_it_stops_without_progress_and_keeps_the_best(finetuning, queries):
    asked = [queries.Query("PlayMusic", ((f"{n}", None),)) for n in range(4)]
    data = queries.Data(asked, asked[:2], [])
    scores = iter([0.1, 0.5, 0.3, 0.5, 0.4, 0.9])
    learner = Scripted()
    history = finetuning.fine_tune(
        learner,
        data,
        Characters(),
        lambda *_: 0,
        lambda *_: {"score": next(scores)},
        finetuning.Settings(epochs=9, patience=3, rows=2),
    )
    assert [point["score"] for point in history.curve] == [0.1, 0.5, 0.3, 0.5, 0.4]
    assert history.best["epoch"] == 2
    assert learner.step == 4  # two steps an epoch
