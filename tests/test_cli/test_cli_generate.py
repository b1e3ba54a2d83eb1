"""`gemma-hub generate`: what it prints where, and what it asks the model."""

import io
import json
import sys

import pytest

from gemma_hub.errors import CapacityError

TEXT = "A fox ran \u00fcber\nthe hill."


def test_it_prints_the_prompt_and_the_text_and_nothing_else(cli, fake_lm):
    result = cli("generate", "tiny", "Once upon a time, ")
    assert result.exit_code == 0
    assert result.stdout == f"Once upon a time, {TEXT}\n"
    assert result.stderr == ""
    assert fake_lm.loaded == {
        "source": "tiny", "task": "causal_lm", "backend": None, "dtype": "auto", "device": "auto",
        "backend_options": {},
    }  # fmt: skip


def test_a_long_line_is_not_wrapped(cli, fake_lm):
    prompt = "word " * 100
    assert cli("generate", "tiny", prompt).stdout == f"{prompt}{TEXT}\n"


def test_markup_in_the_prompt_is_text(cli, fake_lm):
    assert cli("generate", "tiny", "[bold]x[/bold] :smile: ").stdout.startswith(
        "[bold]x[/bold] :smile: A"
    )


def test_streaming_prints_the_same(cli, fake_lm):
    result = cli("generate", "tiny", "Once ", "--stream")
    assert result.stdout == f"Once {TEXT}\n"
    assert fake_lm.asked[0]["stream"] is True


def test_every_option_reaches_the_model(cli, fake_lm):
    cli(
        "generate", "tiny", "Once", "--backend", "flax", "--dtype", "bfloat16", "--device", "cpu",
        "--max-new-tokens", "5", "--temperature", "0.5", "--top-k", "9", "--top-p", "0.9",
        "--seed", "11", "--option", "compile=true", "--option", "depth=-3", "--option", "path=a=1",
    )  # fmt: skip
    assert fake_lm.loaded == {
        "source": "tiny", "task": "causal_lm", "backend": "flax", "dtype": "bfloat16",
        "device": "cpu", "backend_options": {"compile": True, "depth": -3, "path": "a=1"},
    }  # fmt: skip
    asked = {name: value for name, value in fake_lm.asked[0].items() if value is not False}
    assert asked == {
        "prompt": "Once", "max_new_tokens": 5, "temperature": 0.5, "top_k": 9, "top_p": 0.9,
        "seed": 11,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["compile"], "'compile' is no NAME=VALUE"),
        (["=true"], "'=true' is no NAME=VALUE"),
        (["compile="], "'compile=' is no NAME=VALUE"),
        (["compile=true", "compile=false"], "compile is given twice"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "generate-many", "chat"])
def test_an_option_of_the_backend_has_a_name_and_a_value(cli, fake_lm, command, given, words):
    arguments = [] if command == "chat" else ["-"]
    options = [word for text in given for word in ("--option", text)]
    result = cli(command, "tiny", *arguments, *options, input="")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())
    assert fake_lm.sources == []


def test_the_rules_are_options(cli, fake_lm):
    cli(
        "generate", "tiny", "Once", "--min-p", "0.1", "--typical-p", "0.9", "--repetition-penalty",
        "1.2", "--no-repeat-ngram-size", "3", "--min-new-tokens", "2", "--stop", "a", "--stop", "b",
    )  # fmt: skip
    assert fake_lm.asked[0] == {
        "prompt": "Once", "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3, "min_new_tokens": 2, "stop": ("a", "b"),
    }  # fmt: skip


def test_a_beam_search_has_options_and_writes_its_text_at_the_end(cli, fake_lm):
    beams = ("generate", "tiny", "Once", "--num-beams", "3", "--length-penalty", "0.5")
    for word, value in {"true": True, "never": "never"}.items():
        result = cli(*beams, "--early-stopping", word)
        assert result.stdout == f"Once{TEXT}\n"
        assert fake_lm.asked[-1] == {
            "prompt": "Once", "num_beams": 3, "length_penalty": 0.5, "early_stopping": value,
        }  # fmt: skip
    assert cli(*beams, "--stream").exit_code == 2
    result = cli(*beams, "--early-stopping", "soon")
    assert result.stderr.startswith("Error: early_stopping is 'soon'; expected True, False or")


def test_drafts_are_options(cli, fake_lm):
    cli("generate", "tiny", "Once", "--prompt-lookup", "3", "--draft-tokens", "6")
    assert fake_lm.asked[0] == {"prompt": "Once", "prompt_lookup": 3, "draft_tokens": 6}
    assert fake_lm.sources == ["tiny"]


@pytest.mark.parametrize("how", ["--stream", "--no-stream", "--json"])
def test_the_draft_is_loaded_like_the_model(cli, fake_lm, how):
    result = cli(
        "generate", "tiny", "Once", "--draft", "small", "--dtype", "bfloat16", "--option",
        "native=true", how,
    )  # fmt: skip
    assert fake_lm.sources == ["tiny", "small"]
    assert fake_lm.loaded == {
        "source": "small", "task": "causal_lm", "backend": None, "dtype": "bfloat16",
        "device": "auto", "backend_options": {"native": True},
    }  # fmt: skip
    assert fake_lm.asked[0]["draft"] is fake_lm
    if how == "--json":
        assert json.loads(result.stdout)["settings"]["draft"] == "small"


def test_a_draft_and_a_lookup_exclude_each_other(cli, fake_lm):
    result = cli("generate", "tiny", "Once", "--draft", "small", "--prompt-lookup", "3")
    assert (result.exit_code, fake_lm.sources) == (2, [])


def test_json_has_text_ids_and_the_seed_that_was_drawn(cli, fake_lm):
    result = cli("generate", "tiny", "Once", "--json", "--temperature", "1")
    record = json.loads(result.stdout)
    assert record["text"] == TEXT
    assert record["token_ids"] == [0, 1, 2, 3]
    assert record["prompt_token_ids"] == [2, 7]
    assert record["finish_reason"] == "length"
    assert record["backend"] == "fake"
    assert record["dtype"] == "float32"
    assert isinstance(record["settings"]["seed"], int)
    assert record["settings"]["seed"] == fake_lm.asked[0]["seed"]


def test_json_and_stream_exclude_each_other(cli, fake_lm):
    assert cli("generate", "tiny", "Once", "--json", "--stream").exit_code == 2


def test_a_dash_reads_the_prompt_from_standard_input(cli, fake_lm):
    cli("generate", "tiny", "-", input="Once upon\na time")
    assert fake_lm.asked[0]["prompt"] == "Once upon\na time"


def test_a_wrong_setting_is_an_error_before_anything_is_loaded(cli, fake_lm):
    result = cli("generate", "tiny", "Once", "--top-p", "7")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: top_p is 7.0; expected")
    assert fake_lm.loaded == {}


def test_a_checkpoint_that_is_not_there_is_an_error(cli, plugins):
    plugins()
    result = cli("generate", "no-such-model", "Once")
    assert result.exit_code == 1
    assert "no-such-model" in result.stderr
    assert result.stdout == ""


def test_ctrl_c_in_a_stream_keeps_what_was_written(cli, fake_lm):
    fake_lm.interrupt_after = 2
    result = cli("generate", "tiny", "Once ", "--stream")
    assert result.exit_code == 130
    assert result.stdout == "Once A fox ran\n"
    assert result.stderr == ""


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_an_error_of_the_model_leaves_no_half_output(cli, fake_lm, monkeypatch, stream):
    def refuse(self, prompt, **settings):
        raise CapacityError("The prompt is too long.")

    monkeypatch.setattr(type(fake_lm), "generate", refuse)
    monkeypatch.setattr(type(fake_lm), "stream", refuse)
    result = cli("generate", "tiny", "Once", stream)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: The prompt is too long.\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """`terminal()` makes standard output a terminal, from then on, and gives what it shows."""

    def start() -> _Terminal:
        screen = _Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return screen

    return start


def test_on_a_terminal_the_prompt_is_dimmed_and_the_text_streams(terminal, fake_lm):
    from gemma_hub.cli.app import app

    screen = terminal()
    with pytest.raises(SystemExit) as end:
        app(["generate", "tiny", "Once "])
    assert end.value.code == 0
    assert "\x1b[2mOnce \x1b[0m" in screen.getvalue()
    assert screen.getvalue().endswith(f"{TEXT}\n")
    assert fake_lm.asked[0]["stream"] is True


def test_control_characters_cannot_drive_the_terminal_and_pass_through_a_pipe(
    terminal, monkeypatch
):
    from gemma_hub.cli.console import write

    screen = terminal()
    write("a\x1b[2Jb\x07\x9bc\td\n")
    assert screen.getvalue() == "a\u241b[2Jb\u2407\ufffdc\td\n"
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    write("a\x1b[2Jb")
    assert pipe.getvalue() == "a\x1b[2Jb"
