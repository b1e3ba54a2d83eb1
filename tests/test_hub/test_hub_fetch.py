"""What is fetched of a repository: that which is needed, once."""

import json
import logging
import threading
from pathlib import Path

import pytest

from gemma_hub.checkpoints.formats.stated import COMPANIONS
from gemma_hub.config import GemmaConfig
from gemma_hub.conversion import convert, describe, tensor_hashes
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError
from gemma_hub.source import resolved
from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast

NAME = "google/gemma-test"
INDEX = "model.safetensors.index.json"
# What a repository holds besides, none of which is needed where there are safetensors.
OTHERS = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "README.md": b"# A model\n",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "gemma-test.gguf": b"GGUF",
    "flax_model.msgpack": b"\x80",
    "tf_model.h5": b"\x89HDF",
    "model.onnx": b"onnx",
    "original/model.safetensors": b"elsewhere",
    "training_args.bin": b"pickle",
}


@pytest.fixture
def local(shards, tmp_path):
    """The same checkpoint in a folder, to compare with."""
    folder = tmp_path / "local-copy"
    folder.mkdir()
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    return folder


def files_of(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


# -- what is fetched -------------------------------------------------------------------------------


def test_a_repository_loads_as_its_files_do(hub, shards, local):
    hub.add(NAME, {**OTHERS, **shards})
    assert tensor_hashes(NAME) == tensor_hashes(local)
    assert hub.fetched == sorted(shards)
    assert INDEX in shards


def test_the_second_time_nothing_is_fetched(hub, shards):
    hub.add(NAME, {**OTHERS, **shards})
    first = resolved(NAME)
    hub.forget()
    assert resolved(NAME) == first
    assert hub.fetched == []
    assert hub.asked("HEAD") == ["config.json"]
    assert len(hub.requests) == 2


def test_a_commit_is_asked_for_once(hub, shards):
    commit = hub.add(NAME, shards).names["main"]
    resolved(f"{NAME}@{commit}")
    hub.forget()
    resolved(f"{NAME}@{commit}")
    assert len(hub.requests) == 1


def test_one_file_of_safetensors(hub, single):
    hub.add(NAME, {**OTHERS, **single})
    assert files_of(resolved(NAME)) == sorted(single)
    assert hub.fetched == sorted(single)


def test_the_index_goes_before_a_single_file(hub, shards, single):
    """As in a folder; some repositories hold the same weights twice."""
    hub.add(NAME, {**single, **shards})
    assert hub.fetched == []
    resolved(NAME)
    assert hub.fetched == sorted(shards)


def test_pytorch_files_where_there_are_no_safetensors(hub, single):
    kept = {name: content for name, content in single.items() if "safetensors" not in name}
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "part.bin"}}
    sharded = {
        "pytorch_model.bin.index.json": json.dumps(index).encode(),
        "pytorch_model-00001-of-00002.bin": b"one",
        "part.bin": b"two",
    }
    hub.add("a/single", {**kept, "pytorch_model.bin": b"all", "other.bin": b"not"})
    hub.add("a/sharded", {**kept, **sharded, "other.bin": b"not"})
    assert files_of(resolved("a/single")) == sorted([*kept, "pytorch_model.bin"])
    assert files_of(resolved("a/sharded")) == sorted([*kept, *sharded])


def test_every_companion_of_weights_is_fetched(hub, single):
    """The list here and the list of what goes with weights are two, in two layers."""
    companions = dict.fromkeys((*COMPANIONS, "gemma_hub_probe.json"), b"{}")
    hub.add(NAME, companions | single)
    assert set(files_of(resolved(NAME))) == {*companions, *single}


def test_a_config_is_one_file(hub, shards, local):
    hub.add(NAME, {**OTHERS, **shards})
    assert GemmaConfig.from_pretrained(NAME) == GemmaConfig.from_pretrained(local)
    assert hub.fetched == ["config.json"]


def test_a_tokenizer_is_its_files(hub, shards, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    converted = GemmaTokenizerFast.from_pretrained(tmp_path / "saved/tokenizer.model")
    converted.save_pretrained(tmp_path / "fast")
    saved["tokenizer.json"] = (tmp_path / "fast/tokenizer.json").read_bytes()
    hub.add(NAME, {**OTHERS, **shards, **saved})
    text = "the king and a dog"
    for kind in (GemmaTokenizer, GemmaTokenizerFast):
        assert kind.from_pretrained(NAME).encode(text) == tokenizer.encode(text)
    assert hub.fetched == sorted(saved)


def test_one_file_named(hub, single):
    small = {"tokenizer.model": single["tokenizer.model"]}
    hub.add(NAME, {**small, "a.gguf": b"GGUF a", "b.gguf": b"GGUF b", "c.ckpt": b"c"})
    path = resolved(f"{NAME}:b.gguf")
    assert (path.name, path.read_bytes()) == ("b.gguf", b"GGUF b")
    assert hub.fetched == ["b.gguf", "tokenizer.model"]
    assert resolved(f"{NAME}@main:c.ckpt").read_bytes() == b"c"
    # Its name is no other model's: config.json may be of anything.
    hub.add("a/other", {"config.json": b'{"model_type": "other"}', "a.gguf": b"GGUF"})
    assert resolved("a/other:a.gguf").name == "a.gguf"


def test_a_file_alone(hub):
    hub.add(NAME, {"README.md": b"", "a.gguf": b"GGUF a"})
    assert resolved(f"{NAME}:a.gguf").read_bytes() == b"GGUF a"
    hub.forget()
    resolved(f"{NAME}:a.gguf")
    assert hub.fetched == []


def test_branches_tags_and_commits(hub, shards, offline):
    repository = hub.add(NAME, shards)
    old = repository.names["main"]
    changed = shards | {"generation_config.json": b'{"eos_token_id": 5}'}
    new = repository.commit(changed)
    repository.names |= {"v1.0": old, "refs/pr/1": old}
    for revision, commit in {"main": new, "v1.0": old, old: old, "refs/pr/1": old}.items():
        assert resolved(f"{NAME}@{revision}").name == commit
    assert resolved(NAME).name == new
    # What both commits hold is fetched once.
    assert hub.fetched.count("model-00001-of-00002.safetensors") == 1
    offline()
    for revision, commit in {"main": new, "v1.0": old, old: old, "refs/pr/1": old}.items():
        assert resolved(f"{NAME}@{revision}").name == commit


def test_a_branch_that_moves_meanwhile(hub, shards):
    """All files are of one commit, the one after."""
    repository = hub.add(NAME, shards)
    changed = shards | {"generation_config.json": b'{"eos_token_id": 5}'}

    def move(request):
        if request.method == "HEAD" and repository.names["main"] in repository.commits:
            hub.before = None
            repository.commit(changed)

    hub.before = move
    folder = resolved(NAME)
    assert folder.name == repository.names["main"]
    assert {name: (folder / name).read_bytes() for name in changed} == changed


def test_a_branch_that_always_moves(hub, shards):
    repository = hub.add(NAME, shards)

    def move(request):
        if request.method == "HEAD":
            repository.commit(shards | {"README.md": str(len(hub.requests)).encode()})

    hub.before = move
    with pytest.raises(CheckpointError, match="changes while it is fetched"):
        resolved(NAME)


def test_several_at_once_fetch_once(hub, shards):
    hub.add(NAME, shards)
    found = []
    threads = [threading.Thread(target=lambda: found.append(resolved(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert hub.fetched == sorted(shards)


# -- the cache's links -----------------------------------------------------------------------------


def test_links_of_the_cache_are_read_and_never_copied(hub, shards, local, tmp_path):
    hub.add(NAME, shards)
    folder = resolved(NAME)
    assert all((folder / name).is_symlink() for name in shards)
    assert describe(NAME).problems == ()
    assert describe(NAME).tensors == describe(local).tensors
    convert(NAME, tmp_path / "written")
    assert not any(entry.is_symlink() for entry in (tmp_path / "written").iterdir())
    assert (tmp_path / "written/tokenizer.model").read_bytes() == shards["tokenizer.model"]
    assert tensor_hashes(tmp_path / "written") == tensor_hashes(local)


# -- what is here goes first -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_here_goes_before_a_repository(hub, shards, tmp_path, kind):
    hub.add(NAME, shards)
    here = tmp_path / NAME
    here.mkdir(parents=True)
    (here / "config.json").write_bytes(shards["config.json"])
    assert resolved(kind(NAME)) == Path(NAME)
    assert GemmaConfig.from_pretrained(kind(NAME)).vocab_size == 300
    assert hub.requests == []


def test_a_path_is_never_a_repository(hub, shards):
    hub.add(NAME, shards)
    with pytest.raises(CheckpointNotFoundError, match=r"no config.json at"):
        GemmaConfig.from_pretrained(Path(NAME))
    assert resolved(Path(NAME)) == Path(NAME)
    assert hub.requests == []


# -- logging ---------------------------------------------------------------------------------------


def test_a_load_says_nothing(hub, shards, caplog, capfd, recwarn):
    hub.add(NAME, shards)
    with caplog.at_level(logging.WARNING):
        resolved(NAME)
        resolved(NAME)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")
