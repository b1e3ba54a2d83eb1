"""Which texts name a repository of the hub."""

import pytest

from gemma_hub.hub import repository


@pytest.mark.parametrize(
    "text",
    [
        "google/gemma-2b",
        "google/gemma-1.1-2b-it",
        "g/g",
        "google/gemma_2b.v3",
        "google/gemma-2b@main",
        "google/gemma-2b@v1.0",
        "google/gemma-2b@refs/pr/3",
        "google/gemma-2b@" + "0a" * 20,
        "google/gemma-2b:gemma-2b.gguf",
        "google/gemma-2b@main:2b.ckpt",
    ],
)
def test_names_of_repositories(text):
    found = repository(text)
    assert found is not None
    name, _, file = text.partition(":")
    name, _, revision = name.partition("@")
    assert (found.text, found.name) == (text, name)
    assert (found.revision or "", found.file or "") == (revision, file)


@pytest.mark.parametrize(
    "text",
    [
        *("", "tiny", "gemma-2b", "/a", "a/", "/", "/a/b", "a//b", "a/b/c"),
        *("./a/b", "../b", "a/..", "a/../b", ".a/b", "a/.b", "~/a", "~a/b"),
        *(r"a\b", r"C:\a\b", "C:/a", "a/b\\c", "a/b ", " a/b", "a/b\n", "a/b\0"),
        *("models/tiny.gguf", "models/tiny.ckpt", "models/model.safetensors", "a/b.GGUF"),
        *("a/config.json", "a/tokenizer.model", "a/b.git"),
        *("a/b--c", "a/b..c", "a-/b", "a/b-", "a/b.", "é/b"),
        *("a/" + "b" * 97, "a" * 97 + "/b"),
        *("a/b@", "a/b@../c", "a/b@/c", "a/b@c/", "a/b@c..d", "a/b@-c"),
        *("a/b:", "a/b:c", "a/b:c.bin", "a/b:../c.gguf", "a/b:d/c.gguf", "a/b:/c.gguf"),
        *("hf://a/b", "https://huggingface.co/a/b"),
    ],
)
def test_what_is_no_name_of_a_repository(text):
    assert repository(text) is None
