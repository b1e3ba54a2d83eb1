"""What the hub, the network or the disk refuses: said in plain words, and tried again in vain not
at all; where the hub gives no answer, the cache is used if all is in it."""

import errno
import logging
import re
import shutil
import sys
import threading
import time

import pytest

from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.source import resolved
from gemma_hub.tokenizers import GemmaTokenizer

NAME = "google/gemma-test"
INDEX = "model.safetensors.index.json"
LAST = "model-00002-of-00002.safetensors"


def refusal(text=NAME, error=CheckpointNotFoundError, call=resolved):
    with pytest.raises(error) as caught:
        call(text)
    assert type(caught.value) is error
    assert not re.search("hf_(mine|others|wrong)", str(caught.value))
    return str(caught.value)


# -- answers of the hub ----------------------------------------------------------------------------


def test_a_wrong_path_may_look_like_a_repository(hub):
    message = refusal("models/gemma")
    assert "There is no file or folder 'models/gemma'" in message
    assert f"the Hugging Face hub ({hub.url}) has no repository 'models/gemma'" in message
    assert "Check the name. If it is private, log in with 'hf auth login', or set" in message
    assert message == refusal("models/gemma", call=GemmaConfig.from_pretrained)
    assert message == refusal("models/gemma", call=GemmaTokenizer.from_pretrained)
    assert isinstance(CheckpointNotFoundError(), FileNotFoundError)


def test_a_private_repository(hub, shards, monkeypatch):
    hub.add(NAME, shards, token="hf_mine")
    assert "has no repository" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_others")
    assert "has no repository" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert open_checkpoint(resolved(NAME)).config.vocab_size == 300


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(hub, shards, status):
    """The real hub describes it to everyone, and gives the files to some."""
    hub.add(NAME, shards, gate=(status, "GatedRepo"))
    message = refusal()
    assert f"the repository {NAME!r} of the Hugging Face hub is gated (HTTP {status})" in message
    assert f"Accept its licence at {hub.url}/{NAME} and log in with 'hf auth login'" in message
    assert "HF_TOKEN" in message
    assert message == refusal(call=GemmaConfig.from_pretrained)


def test_a_revision_that_is_not_there(hub, shards):
    hub.add(NAME, shards)
    message = refusal(f"{NAME}@v9")
    assert f"the repository {NAME!r} of the Hugging Face hub has no revision 'v9'" in message
    assert f"{hub.url}/{NAME}/tree/main" in message
    assert "no revision" in refusal(f"{NAME}@{'0' * 40}")


def test_a_wrong_token(hub, shards, monkeypatch):
    hub.add(NAME, shards)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal()
    assert "refuses your token" in message
    assert "hf auth login" in message


def test_a_limit_on_requests(hub, shards):
    hub.add(NAME, shards)
    hub.answers["/api"] = 429
    assert "429" in refusal(error=CheckpointError)


def test_a_file_that_vanishes(hub, shards):
    hub.add(NAME, shards)
    hub.answers[f"/{NAME}"] = 404
    message = refusal(error=CheckpointError)
    assert "config.json of the repository" in message
    assert "404" in message


def test_answers_that_are_not_the_hubs(hub, shards):
    hub.page = b"<html>Welcome to this hotel</html>"
    message = refusal()
    assert "whether this network wants a login first" in message
    assert "not in the cache" in message
    hub.page = b"[]"
    assert "huggingface_hub says" in refusal(error=CheckpointError)
    hub.page = b"{}"
    assert "huggingface_hub says" in refusal(error=CheckpointError)


# -- no answer -------------------------------------------------------------------------------------


def down(hub, monkeypatch):
    hub.stop()


def failing(hub, monkeypatch):
    hub.answers[""] = 503


def silent(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
    hub.before = lambda request: threading.Event().wait(2)


def switched_off(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def elsewhere(hub, monkeypatch):
    hub.page = b"<html>Welcome to this hotel</html>"


WAYS = {
    down: "failed (Connect",
    failing: "is out of order (HTTP 503)",
    silent: "did not answer in time. HF_HUB_ETAG_TIMEOUT",
    switched_off: "Offline mode is on (HF_HUB_OFFLINE)",
    elsewhere: "answers with something that is not the hub's",
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_answer_and_nothing_in_the_cache(hub, shards, cache, monkeypatch, way):
    hub.add(NAME, shards)
    url = hub.url
    way(hub, monkeypatch)
    start = time.monotonic()
    message = refusal()
    assert time.monotonic() - start < 2
    assert f"There is no file or folder {NAME!r}, and the repository {NAME!r}" in message
    assert "is not in the cache" in message
    assert WAYS[way] in message
    assert url in message or way is switched_off
    assert str(cache) in message


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_answer_and_all_in_the_cache(hub, shards, monkeypatch, caplog, way):
    hub.add(NAME, shards)
    folder = resolved(NAME)
    way(hub, monkeypatch)
    hub.forget()
    with caplog.at_level(logging.WARNING, "gemma_hub"):
        assert resolved(NAME) == folder
        assert GemmaConfig.from_pretrained(NAME).vocab_size == 300
        assert GemmaTokenizer.from_pretrained(NAME).vocab_size == 300
    said = [record.message for record in caplog.records if record.name == "gemma_hub.hub"]
    if way is switched_off:
        assert said == []
        assert hub.requests == []
    else:
        assert len(said) == 3
        assert f"Using the copy in the cache, {folder}" in said[0]
    with pytest.raises(CheckpointNotFoundError, match=r"at 'v2' .* is not in the cache"):
        resolved(f"{NAME}@v2")


def test_a_host_that_is_not_there(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://no-such-host.invalid")
    assert "The connection to http://no-such-host.invalid failed" in refusal()


def test_a_host_that_falls_silent_between_files(hub, shards, impatient, no_pauses):
    hub.add(NAME, shards)
    hub.before = lambda request: request.path.endswith(INDEX) and threading.Event().wait(0.5)
    message = refusal(error=CheckpointError)
    assert f"{INDEX} of the repository {NAME!r}" in message
    assert "did not answer in time" in message
    assert "Run it again" in message
    hub.before = None
    hub.forget()
    assert open_checkpoint(resolved(NAME)).config.vocab_size == 300
    assert "config.json" not in hub.fetched


# -- a cache that is not complete ------------------------------------------------------------------


def without(name):
    return lambda folder: (folder / name).unlink()


def without_its_content(name):
    """A link that leads nowhere, as after a blob was removed."""
    return lambda folder: (folder / name).resolve().unlink()


def only_the_config(folder):
    for entry in folder.iterdir():
        if entry.name != "config.json":
            entry.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without(LAST), f"lacks files that its {INDEX} names: {LAST}"),
        (without_its_content(LAST), f"lacks files that its {INDEX} names: {LAST}"),
        (without(INDEX), f"and no {INDEX}"),
        (without("config.json"), "has weights and no config.json"),
        (only_the_config, "has no model.safetensors; it holds config.json"),
    ],
    ids=["shard", "blob", "index", "config", "weights"],
)
def test_a_part_of_it_in_the_cache(hub, shards, offline, damage, words):
    hub.add(NAME, shards)
    damage(resolved(NAME))
    offline()
    message = refusal()
    assert f"the copy of the repository {NAME!r} of the Hugging Face hub in the cache is" in message
    assert "not complete: it" in message
    assert words in message
    assert "Offline mode is on" in message
    assert "hf download" not in message


@pytest.mark.parametrize(
    ("damage", "fetched"),
    [(without(LAST), []), (without_its_content(LAST), [LAST]), (only_the_config, [])],
    ids=["link", "blob", "links"],
)
def test_what_lacks_in_the_cache_is_made_whole(hub, shards, damage, fetched):
    hub.add(NAME, shards)
    damage(resolved(NAME))
    hub.forget()
    assert open_checkpoint(resolved(NAME)).config.vocab_size == 300
    assert hub.fetched == fetched


def test_a_config_alone_in_the_cache_is_a_config(hub, shards, offline):
    hub.add(NAME, shards)
    GemmaConfig.from_pretrained(NAME)
    offline()
    assert GemmaConfig.from_pretrained(NAME).vocab_size == 300
    with pytest.raises(CheckpointNotFoundError, match=r"no tokenizer.model or tokenizer.json"):
        GemmaTokenizer.from_pretrained(NAME)


# -- broken transfers ------------------------------------------------------------------------------


def test_a_transfer_that_breaks_off_once_goes_on(hub, shards, no_pauses, monkeypatch):
    # What is not a whole chunk is not kept.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 256)
    hub.add(NAME, shards)
    hub.cut[LAST] = 1
    folder = resolved(NAME)
    assert {name: (folder / name).read_bytes() for name in shards} == shards
    first, second = (r for r in hub.storage_requests if r.path.endswith(LAST))
    assert "range" not in first.headers
    assert re.fullmatch(r"bytes=[1-9]\d*-", second.headers["range"])


def test_a_transfer_that_always_breaks_off(hub, shards, no_pauses):
    hub.add(NAME, shards)
    hub.cut[LAST] = 1000
    message = refusal(error=CheckpointError)
    assert f"{LAST} of the repository {NAME!r}" in message
    assert "Run it again" in message
    hub.cut.clear()
    hub.forget()
    folder = resolved(NAME)
    assert hub.fetched == [LAST]
    assert (folder / LAST).read_bytes() == shards[LAST]


def test_a_transfer_that_always_breaks_off_says_what_lacks_offline(hub, shards, no_pauses, offline):
    hub.add(NAME, shards)
    hub.cut[LAST] = 1000
    refusal(error=CheckpointError)
    offline()
    assert f"lacks files that its {INDEX} names: {LAST}" in refusal()


# -- this machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(hub, shards, cache, monkeypatch, code):
    hub.add(NAME, shards)

    def full(*arguments, **options):
        raise OSError(code, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        message = refusal(error=CheckpointError)
    assert f"config.json of the repository {NAME!r}" in message
    assert f"the disk of {cache} is full" in message
    assert "HF_HOME" in message
    assert open_checkpoint(resolved(NAME)).config.vocab_size == 300


def test_a_cache_that_cannot_be_written(hub, shards, cache):
    hub.add(NAME, shards)
    cache.parent.mkdir()
    cache.write_text("a file")
    message = refusal(error=CheckpointError)
    assert f"the cache {cache} cannot be written" in message
    assert "HF_HOME" in message


def test_a_cache_that_was_removed_is_made_again(hub, shards, cache):
    hub.add(NAME, shards)
    resolved(NAME)
    shutil.rmtree(cache.parent)
    assert open_checkpoint(resolved(NAME)).config.vocab_size == 300


@pytest.mark.parametrize("call", [resolved, GemmaConfig.from_pretrained])
def test_without_huggingface_hub(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal(call=call)
    assert f"There is no file or folder {NAME!r}" in message
    assert "pip install 'gemma-hub[hub]'" in message
