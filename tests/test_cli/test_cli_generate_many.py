"""`gemma-hub generate-many`: its lines, where they go, and which line an error names."""

import io
import json
import os
import subprocess
import sys
import threading

import pytest

from gemma_hub import Gemma

TEXTS = ["Once upon a time", "One day", "The king had \u00fc\u2028", "She", "He said that"]
IDS = [2, 5, 9]
SAMPLED = ["--temperature", "0.9", "--seed", "5", "--stop", "s", "--max-new-tokens", "6"]
SETTINGS = {"temperature": 0.9, "seed": 5, "stop": "s", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("gemma_hub_numpy")
    pytest.importorskip("gemma_hub_tiny")
    return Gemma.load("tiny", backend="numpy", dtype="float32")


@pytest.fixture
def lm(real, monkeypatch):
    """The model that every command loads; `lm.loaded` tells how often, with which options."""
    loaded = []

    def load(source, **options):
        loaded.append({"source": source, **options})
        return real

    monkeypatch.setattr(Gemma, "load", staticmethod(load))
    monkeypatch.setattr(real, "loaded", loaded, raising=False)
    return real


@pytest.fixture
def never_generates(lm, monkeypatch):
    monkeypatch.setattr(lm, "generate_many", lambda *_, **__: pytest.fail("it generated"))


@pytest.fixture
def prompts(tmp_path):
    """`prompts(lines)` writes a file of them, by default .txt, and gives its path."""

    def write(*lines, suffix=".txt"):
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(b"".join(b"%s\n" % _bytes(line) for line in lines))
        return str(path)

    return write


def _bytes(line):
    return line if isinstance(line, bytes) else line.encode()


def _records(text):
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def _expected(lm, prompts, **settings):
    results = lm.generate_many(prompts, **settings)
    for index, (prompt, each) in enumerate(zip(prompts, results, strict=True)):
        record = {
            "index": index,
            "prompt": prompt,
            "text": each.text,
            "token_ids": list(each.token_ids),
            "prompt_token_ids": list(each.prompt_token_ids),
            "finish_reason": each.finish_reason,
            "seed": each.seed,
            "logprobs": each.logprobs and list(each.logprobs),
        }
        is_text = isinstance(prompt, str)
        yield {
            name: value
            for name, value in record.items()
            if value is not None and (is_text or name != "prompt")
        }


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--batch-size", "2"], ["--logprobs"]])
def test_each_line_is_what_generate_many_gives(cli, lm, prompts, options):
    result = cli("generate-many", "tiny", prompts(*TEXTS), *SAMPLED, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    expected = list(_expected(lm, TEXTS, logprobs="--logprobs" in options, **SETTINGS))
    assert {each["finish_reason"] for each in expected} == {"stop", "length"}
    assert _records(result.stdout) == expected


def test_the_names_are_those_of_generate_json(cli, lm, prompts):
    one = json.loads(cli("generate", "tiny", TEXTS[0], "--json", *SAMPLED).stdout)
    (many,) = _records(cli("generate-many", "tiny", prompts(TEXTS[0]), *SAMPLED).stdout)
    assert many.pop("index") == 0
    assert many.items() <= one.items()
    assert set(one) - set(many) >= {"logprobs", "score", "drafts"}  # they are null


def test_objects_may_be_texts_or_ids(cli, lm, prompts):
    lines = [
        json.dumps({"prompt": TEXTS[2], "input_ids": None, "id": 7}),
        json.dumps({"input_ids": IDS}),
    ]
    expected = list(_expected(lm, [TEXTS[2], IDS], max_new_tokens=4))
    assert "prompt" not in expected[1]
    short = ["--max-new-tokens", "4"]
    result = cli("generate-many", "tiny", prompts(*lines, suffix=".jsonl"), *short)
    assert _records(result.stdout) == expected
    text = "\n".join(lines)
    result = cli("generate-many", "tiny", "-", "--jsonl", *short, input=text.encode())
    assert _records(result.stdout) == expected
    result = cli("generate-many", "tiny", prompts(*lines, suffix=".jsonl"), "--no-jsonl", *short)
    assert [each["prompt"] for each in _records(result.stdout)] == lines


def test_every_option_reaches_the_model(cli, lm, prompts, monkeypatch):
    asked = []

    def generate_many(given, **arguments):
        asked.append({"given": given, **arguments})
        return iter(())

    monkeypatch.setattr(lm, "generate_many", generate_many)
    result = cli(
        "generate-many", "tiny", prompts(), "--backend", "flax", "--dtype", "bfloat16", "--device",
        "cpu", "--batch-size", "3", "--max-new-tokens", "5", "--temperature", "0.5", "--top-k", "9",
        "--top-p", "0.9", "--min-p", "0.1", "--typical-p", "0.8", "--repetition-penalty", "1.2",
        "--no-repeat-ngram-size", "3", "--min-new-tokens", "2", "--stop", "a", "--stop", "b",
        "--seed", "11", "--logprobs", "--option", "native=true",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "")
    assert lm.loaded == [
        {"source": "tiny", "backend": "flax", "task": "causal_lm", "dtype": "bfloat16",
         "device": "cpu", "backend_options": {"native": True}}
    ]  # fmt: skip
    assert asked == [
        {"given": [], "batch_size": 3, "progress": None, "max_new_tokens": 5, "temperature": 0.5,
         "top_k": 9, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.2,
         "no_repeat_ngram_size": 3, "min_new_tokens": 2, "stop": ("a", "b"), "seed": 11,
         "logprobs": True}
    ]  # fmt: skip


def test_a_file_of_windows_is_read(cli, lm, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffOne day\r\nThe\x0b\x85king".encode())
    result = cli("generate-many", "tiny", str(path), "--max-new-tokens", "1")
    assert [each["prompt"] for each in _records(result.stdout)] == ["One day", "The\x0b\x85king"]


# -- streams ---------------------------------------------------------------------------------------


def test_standard_input_is_continued_as_it_comes(cli, lm):
    lines = [*TEXTS[:4], "", "never read"]
    result = cli("generate-many", "tiny", "-", *SAMPLED, input="\n".join(lines).encode())
    assert result.exit_code == 1
    assert _records(result.stdout) == list(_expected(lm, TEXTS[:4], **SETTINGS))
    assert result.stderr.startswith("Error: Line 5 of standard input is empty; expected a prompt.")


def test_the_results_come_before_the_stream_ends(real, tmp_path):
    command = "from gemma_hub.cli.app import main; main()"
    fifo = tmp_path / "prompts"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-c", command, "generate-many", "tiny", str(fifo), "--backend", "numpy",
         "--batch-size", "1", "--max-new-tokens", "2"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    stop = threading.Timer(60, process.kill)
    stop.start()
    try:
        # For reading too, since otherwise opening waits for a process that may have failed.
        with fifo.open("r+b", buffering=0) as writer:
            writer.write(b"One day\n")
            assert json.loads(process.stdout.readline())["prompt"] == "One day"
        assert (process.wait(), process.stdout.read()) == (0, b"")
    finally:
        stop.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "is empty; expected a prompt"),
        ("nothing", "is no JSON: Expecting value at its character 0; expected an object such as"),
        ("[" * 200_000, "is no JSON that can be read"),
        ("9" * 5_000, "is no JSON that can be read"),
        ('["a"]', "is no JSON object"),
        ('{"text": "a"}', 'has neither of "prompt" and "input_ids"; give exactly one'),
        ('{"prompt": "a", "input_ids": [2]}', 'has both of "prompt" and "input_ids"'),
        ('{"prompt": ""}', 'has an empty "prompt"'),
        ('{"prompt": 3}', 'has a "prompt" that is no text'),
        ('{"input_ids": []}', 'has no "input_ids"'),
        ('{"input_ids": [2, true]}', 'has "input_ids" that are no list of integers'),
        ('{"input_ids": 2}', 'has "input_ids" that are no list of integers'),
        (b'{"prompt": "\xff"}', "is not UTF-8: invalid start byte at its byte 12"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_loaded(cli, lm, prompts, line, words):
    path = prompts('{"prompt": "a"}', line, '{"prompt": "b"}', suffix=".jsonl")
    result = cli("generate-many", "tiny", path)
    assert (result.exit_code, result.stdout, lm.loaded) == (1, "", [])
    assert result.stderr.startswith(f"Error: Line 2 of {path} {words}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"input_ids": IDS * 700}, "has 2100 tokens and max_new_tokens is 64: that needs 2163"),
        ({"input_ids": [2, 99999]}, "has the id 99999 at place 1; expected 0 to 4095"),
        ({"prompt": "\ud800"}, "cannot be encoded. Character 0 of the text is the lone"),
    ],
)
def test_what_the_model_cannot_continue_is_named_before_it_generates(
    cli, never_generates, prompts, line, words
):
    path = prompts('{"prompt": "a"}', json.dumps(line), suffix=".jsonl")
    result = cli("generate-many", "tiny", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: Line 2 of {path} {words}")


def test_a_text_without_a_tokenizer_is_an_error_and_ids_are_not(cli, lm, prompts, monkeypatch):
    monkeypatch.setattr(lm, "tokenizer", None)
    ids, text = json.dumps({"input_ids": IDS}), '{"prompt": "a"}'
    run = ("generate-many", "tiny", "--max-new-tokens", "2")
    (record,) = _records(cli(*run, prompts(ids, suffix=".jsonl")).stdout)
    assert (record["prompt_token_ids"], record["text"]) == (IDS, "")
    path = prompts(ids, text, suffix=".jsonl")
    result = cli(*run, path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: Line 2 of {path} is a text, and this checkpoint has")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--top-p", "7"], 1, "top_p is 7.0; expected"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--output", "/no/such/folder/x"], 2, "there is no folder"),
        (["--num-beams", "2"], 2, "No such option"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_is_loaded(
    cli, lm, prompts, options, code, words
):
    result = cli("generate-many", "tiny", prompts("a"), *options)
    assert (result.exit_code, result.stdout, lm.loaded) == (code, "", [])
    assert words in result.stderr


def test_a_file_that_cannot_be_read_is_an_error(cli, lm, tmp_path):
    for path, reason in {"missing": "No such file", ".": "Is a directory"}.items():
        result = cli("generate-many", "tiny", str(tmp_path / path))
        assert (result.exit_code, lm.loaded) == (1, [])
        assert f"{tmp_path / path} cannot be read: {reason}" in result.stderr


# -- whole or not at all ---------------------------------------------------------------------------


@pytest.fixture
def breaks(lm, monkeypatch):
    """`breaks(error)` makes the model raise after two results."""
    generate_many = lm.generate_many

    def install(error):
        def broken(given, **arguments):
            results = generate_many(given, **arguments)
            yield next(results)
            yield next(results)
            raise error

        monkeypatch.setattr(lm, "generate_many", broken)

    return install


def test_the_output_replaces_a_file_and_nothing_is_left_beside_it(cli, lm, prompts, tmp_path):
    path, output = prompts(*TEXTS), tmp_path / "out.jsonl"
    output.write_text("old")
    result = cli("generate-many", "tiny", path, "--output", str(output), *SAMPLED)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert _records(output.read_text("utf-8")) == list(_expected(lm, TEXTS, **SETTINGS))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left on device"), 1, "cannot be written: No space left"),
    ],
)
def test_a_run_that_breaks_off_leaves_the_output_as_it_was(
    cli, prompts, tmp_path, breaks, error, code, words
):
    breaks(error)
    path, output = prompts(*TEXTS), tmp_path / "out.jsonl"
    output.write_text("old")
    result = cli("generate-many", "tiny", path, "--output", str(output), *SAMPLED)
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr
    assert output.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_ctrl_c_keeps_what_was_written_to_standard_output(cli, lm, prompts, breaks):
    expected = list(_expected(lm, TEXTS, **SETTINGS))[:2]
    breaks(KeyboardInterrupt())
    result = cli("generate-many", "tiny", prompts(*TEXTS), *SAMPLED)
    assert (result.exit_code, result.stderr) == (130, "")
    assert _records(result.stdout) == expected


def test_what_is_no_file_is_not_replaced(cli, lm, prompts, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = cli("generate-many", "tiny", prompts("a"), "--output", str(pipe))
    assert (result.exit_code, lm.loaded) == (2, [])
    assert pipe.is_fifo()


def test_the_prompts_are_not_replaced_by_their_results(cli, lm, prompts):
    path = prompts("a")
    result = cli("generate-many", "tiny", path, "--output", path)
    assert (result.exit_code, lm.loaded) == (2, [])
    assert "--output is the file of the prompts" in result.stderr


# -- the bar ---------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run_on_a_terminal(monkeypatch):
    """Runs the command with standard error on a terminal; gives both outputs."""
    from gemma_hub.cli.app import app

    def run(*arguments, out):
        screen = _Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("TERM", "xterm-256color")
        with pytest.raises(SystemExit) as end:
            app(["generate-many", "tiny", *arguments])
        assert end.value.code == 0
        return out.getvalue(), screen.getvalue()

    return run


def test_the_bar_is_on_standard_error_and_the_results_are_not(lm, prompts, run_on_a_terminal):
    expected = list(_expected(lm, TEXTS, **SETTINGS))
    out, err = run_on_a_terminal(prompts(*TEXTS), *SAMPLED, out=io.StringIO())
    assert _records(out) == expected
    assert "of 5 prompts" in err
    assert "prompt_token_ids" not in err


def test_results_on_a_terminal_have_no_bar_among_them(lm, prompts, run_on_a_terminal):
    out, err = run_on_a_terminal(prompts(*TEXTS), *SAMPLED, out=_Terminal())
    assert len(_records(out)) == len(TEXTS)
    assert "of 5 prompts" not in err
