"""GemmaTokenizerFast costs little more than the tokenizers package that it runs on."""

import time
from pathlib import Path

import pytest
import tokenizers

from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "data" / "corpus" / "fairy_tales.txt"
WITHIN = 1.2


@pytest.fixture(scope="module")
def saved(gemma_1, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    GemmaTokenizer.from_pretrained(gemma_1).save_pretrained(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def megabyte() -> str:
    if not CORPUS.is_file():
        pytest.skip("the corpus is not part of the repository")
    return CORPUS.read_text("utf-8")[: 1 << 20]


MOST_ROUNDS = 20


def ratio(ours, theirs, rounds: int, limit: float = WITHIN) -> float:
    """Of the quickest of several runs in turn: what else the machine does only slows them.

    On a machine that is busy throughout, one of the two may have no quiet run among the first, so
    there are more where the ratio is too large still.
    """
    best = [float("inf")] * 2
    for count in range(1, MOST_ROUNDS + 1):
        for i, run in enumerate((ours, theirs)):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
        if count >= rounds and best[0] / best[1] < limit:
            break
    return best[0] / best[1]


def test_encoding_a_megabyte(saved, megabyte):
    ours, direct = GemmaTokenizerFast(saved), tokenizers.Tokenizer.from_file(str(saved))
    assert ours.encode(megabyte) == direct.encode(megabyte).ids
    found = ratio(lambda: ours.encode(megabyte), lambda: direct.encode(megabyte).ids, 2)
    assert found < WITHIN


def test_encoding_a_megabyte_in_lines(saved, megabyte):
    ours, direct = GemmaTokenizerFast(saved), tokenizers.Tokenizer.from_file(str(saved))
    lines = megabyte.splitlines()

    def together():
        return [encoding.ids for encoding in direct.encode_batch_fast(lines)]

    assert ours(lines).input_ids == together()
    assert ratio(lambda: ours(lines, return_attention_mask=False), together, 2) < WITHIN


def test_loading_a_tokenizer_json(saved):
    path = str(saved)
    found = ratio(
        lambda: GemmaTokenizerFast.from_pretrained(path),
        lambda: tokenizers.Tokenizer.from_file(path),
        2,
    )
    assert found < WITHIN


def test_converting_a_tokenizer_model_takes_three_loads_once(saved, gemma_1, tmp_path, monkeypatch):
    content = gemma_1.read_bytes()
    attempts = iter(range(100))

    def convert():
        monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / str(next(attempts))))
        GemmaTokenizerFast(content)

    # A load takes one second on a machine where the conversion is to take under three.
    load = lambda: tokenizers.Tokenizer.from_file(str(saved))  # noqa: E731
    assert ratio(convert, load, 1, 3.0) < 3
    assert ratio(lambda: GemmaTokenizerFast(content), load, 1, 1.6) < 1.6
