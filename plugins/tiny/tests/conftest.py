"""The training code is a script beside the package, so its folder goes on the path here."""

from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
CORPUS = PROJECT.parents[2] / "shared" / "data" / "corpus" / "fairy_tales.txt"


@pytest.fixture
def training_path(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT))


@pytest.fixture(scope="session")
def corpus_file() -> Path:
    if not CORPUS.is_file():
        pytest.skip("the corpus is not part of the repository")
    return CORPUS
