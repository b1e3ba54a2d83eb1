"""What the hub and its storage are told: what is needed to fetch files, and nothing else."""

import re

import pytest

from gemma_hub.source import resolved

NAME = "google/gemma-test"
TOKEN = "hf_mine"


@pytest.fixture
def told(hub, shards, monkeypatch):
    """The stand-in, after a model was fetched with a token and found again."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add(NAME, shards, token=TOKEN)
    resolved(NAME)
    resolved(NAME)
    return hub


def test_the_token_goes_to_the_hub_alone(told):
    assert {request.headers.get("authorization") for request in told.requests} == {
        f"Bearer {TOKEN}"
    }
    assert len(told.storage_requests) == 2
    for request in told.storage_requests:
        assert TOKEN not in str(request)


def test_nothing_is_asked_but_for_the_description_and_the_files(told):
    allowed = re.compile(rf"/api/models/{NAME}(/revision/\w+)?|/{NAME}/resolve/\w+/[\w.-]+")
    assert [request.path for request in told.requests if not allowed.fullmatch(request.path)] == []
    assert {request.method for request in told.requests} == {"GET", "HEAD"}


def test_requests_say_what_asks_and_not_what_else_is_installed(told):
    for request in (*told.requests, *told.storage_requests):
        agent = request.headers["user-agent"]
        assert re.fullmatch(r"gemma-hub/\S+; hf_hub/[\d.]+; python/[\d.]+", agent)


def test_a_token_is_in_no_message(hub, shards, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add(NAME, shards, gate=(403, "GatedRepo"))
    with pytest.raises(FileNotFoundError) as caught, caplog.at_level("DEBUG"):
        resolved(NAME)
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in str(error)
        error = error.__cause__
    assert TOKEN not in caplog.text
