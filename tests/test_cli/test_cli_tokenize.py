"""tokenize: its table, its JSON, and the files that it takes."""

import json

import pytest

TEXT = "the <end_of_turn>\n king é"


@pytest.fixture
def folder(tmp_path, tokenizer_model):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    return tmp_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_HUB_CACHE", str(tmp_path / "cache"))


def test_a_line_for_each_token(cli, folder, tokenizer):
    result = cli("tokenize", str(folder), TEXT)
    head, _, *lines = result.stdout.splitlines()
    assert head.split() == ["place", "id", "piece", "span", "characters"]
    ids, spans = tokenizer.encode_with_offsets(TEXT)
    assert len(lines) == len(ids)
    assert lines[0].split() == ["0", str(tokenizer.bos_token_id), "<s>"]
    for place, (line, token_id, span) in enumerate(zip(lines, ids, spans, strict=True)):
        assert line.split()[:2] == [str(place), str(token_id)]
        if place:
            assert f"{span[0]}-{span[1]}" in line
            assert json.dumps(TEXT[slice(*span)], ensure_ascii=False) in line
    assert f"{len(ids)} tokens for {len(TEXT)} characters, by GemmaTokenizer" in result.stderr


@pytest.mark.parametrize("option", ["--fast", "--no-fast"])
def test_json_has_every_token_and_plain_text_no_special_one(cli, folder, tokenizer, option):
    result = cli("tokenize", str(folder), TEXT, option, "--plain", "--no-around", "--json")
    record = json.loads(result.stdout)
    ids = tokenizer.encode(TEXT, add_special_tokens=False, allow_special=False)
    assert [token["id"] for token in record["tokens"]] == ids
    assert not any(token["special"] for token in record["tokens"])
    assert record["tokenizer"] == {"--fast": "GemmaTokenizerFast"}.get(option, "GemmaTokenizer")
    assert record["text"] == TEXT


def test_standard_input_a_file_and_errors(cli, folder):
    given = cli("tokenize", str(folder / "tokenizer.model"), "-", "--json", input="king\n")
    assert json.loads(given.stdout)["text"] == "king\n"
    missing = cli("tokenize", str(folder / "no"), "x")
    assert missing.exit_code == 1
    assert "There is no vocabulary at" in missing.stderr
    empty = cli("tokenize", str(folder), "")
    assert len(empty.stdout.splitlines()) == 3
