"""`gemma-hub chat`: what is typed, answers, commands, files, interruptions, seeds, options."""

import json
import re
from types import SimpleNamespace

import pytest

from gemma_hub.cli.chat_input import Entry, read_entry
from gemma_hub.cli.chat_session import ChatSession
from gemma_hub.cli.conversation import Conversation
from gemma_hub.errors import CapacityError, InputError, TokenizerError
from gemma_hub.outputs import TextPiece


class ScriptedLM:
    """Answers with what it is told to: texts are pieces, exceptions are raised in their place.

    A command asks once before the first message, and reads nothing of that answer.
    """

    def __init__(self, *answers: list) -> None:
        self.backend = SimpleNamespace(name="fake")
        self.dtype, self.device = "float32", "fake:0"
        self.tokenizer = SimpleNamespace(chat_template="a template")
        self.answers = list(answers)
        self.asked: list[dict] = []
        self.refuses: Exception | None = None

    def stream_chat(self, messages, *, system="refuse", memory=None, **settings):
        if self.refuses is not None:
            raise self.refuses
        self.asked.append({"messages": messages, "system": system, **settings})
        return self._pieces(len(self.asked))

    def _pieces(self, number):
        pieces = self.answers.pop(0) if self.answers else [f"answer {number}"]
        for i, piece in enumerate(pieces):
            if isinstance(piece, BaseException):
                raise piece
            yield TextPiece(piece, i)
        yield TextPiece("", None, "length" if "..." in pieces else "stop")

    @property
    def questions(self) -> list[list[str]]:
        """The texts of the messages of each call."""
        return [[message["content"] for message in call["messages"]] for call in self.asked]


class Typed:
    """Lines as a user types them; exceptions are keys such as Ctrl-C. The end is Ctrl-D."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def talk(capsys):
    """`talk(lm, *lines)` gives the session, what was written, and what was said beside it."""

    def run(lm, *lines, seed=None, interactive=True, conversation=None, **settings):
        typed = Typed(*lines)
        session = ChatSession(
            lm,
            settings,
            seed,
            conversation or Conversation(),
            read_line=typed,
            is_interactive=interactive,
        )
        session.run()
        captured = capsys.readouterr()
        return SimpleNamespace(
            session=session,
            turns=[message["content"] for message in session.conversation.messages],
            out=captured.out,
            err=captured.err,
            left=typed.lines,
        )

    return run


# -- what is typed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "entry"),
    [
        (["Hi"], Entry("Hi")),
        ([""], Entry("")),
        (["one\\", "two\\", "", "left"], Entry("one\ntwo\n")),
        (['"""', "one", "", "/undo\\", ' """ ', "left"], Entry("one\n\n/undo\\")),
        (['"""', '"""'], Entry("")),
        (['say """ twice'], Entry('say """ twice')),
        (["/save a b.json "], Entry("/save a b.json ", "/save")),
        (["/system be\\", "brief"], Entry("/system be\nbrief", "/system")),
        ([" /etc"], Entry(" /etc")),
        (["/"], Entry("/", "/")),
    ],
)
def test_an_entry_is_a_line_or_several(lines, entry):
    typed = Typed(*lines)
    assert read_entry(typed) == entry
    assert typed.lines == (["left"] if "left" in lines else [])


def test_the_argument_of_a_command_keeps_its_spaces_inside():
    assert Entry("/save  a b.json ", "/save").argument == "a b.json"
    assert Entry("/undo", "/undo").argument == ""


def test_lines_that_go_on_have_another_prompt():
    typed = Typed("one\\", "two")
    read_entry(typed)
    assert typed.prompts == ["> ", ". "]


@pytest.mark.parametrize(("line", "words"), [('"""', "within a block"), ("x\\", "ends in \\")])
def test_an_end_within_an_entry_is_an_error(line, words):
    with pytest.raises(InputError, match=re.escape(words)):
        read_entry(Typed(line))


# -- answers ---------------------------------------------------------------------------------------


def test_every_turn_is_asked_with_those_before_it(talk):
    lm = ScriptedLM(["A ", "king."], ["His son."])
    told = talk(lm, "Hi", "", "   ", "And?")
    assert lm.questions == [["Hi"], ["Hi", "A king.", "And?"]]
    assert [m["role"] for m in lm.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert told.turns == ["Hi", "A king.", "And?", "His son."]
    assert told.out == "A king.\nHis son.\n\n"
    assert not told.session.has_failed


def test_a_line_below_each_answer_tells_tokens_and_why_it_ended(talk):
    told = talk(ScriptedLM(["A ", "king."], ["a", "b", "..."]), "Hi", "And?")
    first, second = told.err.splitlines()
    assert re.fullmatch(r"2 tokens at [\d.]+ a second", first)
    assert re.fullmatch(r"3 tokens at [\d.]+ a second; length: --max-new-tokens ended it", second)


def test_settings_reach_the_model(talk):
    lm = ScriptedLM()
    talk(lm, "Hi", max_new_tokens=7, seed=None, temperature=0.5)
    assert lm.asked[0].items() >= {"max_new_tokens": 7, "temperature": 0.5}.items()
    assert lm.asked[0]["system"] == "merge"
    assert "seed" not in lm.asked[0]


def test_each_answer_of_a_conversation_has_its_own_seed(talk):
    lm = ScriptedLM()
    talk(lm, "a", "b", "/undo", "b", "/clear", "c", seed=2**64 - 1)
    assert [call["seed"] for call in lm.asked] == [2**64 - 1, 0, 0, 2**64 - 1]


# -- Ctrl-C and errors -----------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_said(talk):
    lm = ScriptedLM(["A ", "ki", KeyboardInterrupt()])
    told = talk(lm, "Hi", "Go on.")
    assert lm.questions[1] == ["Hi", "A ki", "Go on."]
    assert told.out.startswith("A ki\n")
    assert re.search(r"2 tokens at [\d.]+ a second; interrupted\n", told.err)


def test_ctrl_c_before_anything_was_said_drops_the_turn(talk):
    lm = ScriptedLM([KeyboardInterrupt()])
    told = talk(lm, "Hi", "Ho")
    assert lm.questions == [["Hi"], ["Ho"]]
    assert "the turn is dropped" in told.err


def test_ctrl_c_at_the_prompt_clears_and_twice_leaves(talk):
    ctrl_c = KeyboardInterrupt
    lm = ScriptedLM()
    told = talk(lm, ctrl_c, "Hi", ctrl_c, "half\\", ctrl_c, "never read")
    assert lm.questions == [["Hi"]]
    assert told.left == ["never read"]
    assert "Ctrl-C again, Ctrl-D or /quit leaves." in told.err
    assert not told.session.has_failed


def test_ctrl_c_in_a_pipe_ends_the_session(talk):
    with pytest.raises(KeyboardInterrupt):
        talk(ScriptedLM(["A", KeyboardInterrupt()]), "Hi", "Ho", interactive=False)


def test_a_full_model_is_an_error_that_tells_the_way_out(talk):
    lm = ScriptedLM(["one"], [CapacityError("This model has 64.")])
    told = talk(lm, "a", "b", "c")
    assert lm.questions == [["a"], ["a", "one", "b"], ["a", "one", "c"]]
    expected = (
        "Error: The conversation has become too long. This model has 64. "
        "/undo drops the last turn, /clear all of them.\n"
    )
    assert expected in told.err
    assert told.session.has_failed


def test_a_first_message_that_is_too_long_is_not_told_to_undo(talk):
    told = talk(ScriptedLM([CapacityError("This model has 64.")]), "a")
    assert "too long. This model has 64.\n" in told.err


@pytest.mark.parametrize("error", [InputError("It is bad."), RuntimeError("It is bad.")])
def test_an_error_in_an_answer_drops_its_turn_and_nothing_else(talk, error):
    told = talk(ScriptedLM(["one"], ["tw", error], ["three"]), "a", "b", "c")
    assert told.turns == ["a", "one", "c", "three"]
    assert told.out == "one\ntw\nthree\n\n"
    assert ("RuntimeError: It is bad." in told.err) == isinstance(error, RuntimeError)
    assert "It is bad." in told.err


def test_a_reader_that_left_ends_the_session(talk):
    with pytest.raises(BrokenPipeError):
        talk(ScriptedLM(["a", BrokenPipeError()]), "Hi", "Ho")


# -- commands --------------------------------------------------------------------------------------


def test_undo_drops_one_turn_and_clear_all(talk):
    lm = ScriptedLM()
    told = talk(lm, "a", "b", "/undo", "c", "/clear", "d", "/undo", "/undo")
    assert lm.questions[2:] == [["a", "answer 1", "c"], ["d"]]
    assert told.turns == []
    assert told.err.count("Error: ") == 1
    assert "There is no turn to drop" in told.err


def test_quit_leaves(talk):
    told = talk(ScriptedLM(), "/quit", "Hi")
    assert told.left == ["Hi"]


def test_system_is_said_first_until_it_is_taken_away(talk):
    lm = ScriptedLM()
    talk(lm, "/system Be brief.", "a", "/clear", "b", "/system", "c")
    assert lm.questions == [["Be brief.", "a"], ["Be brief.", "b"], ["b", "answer 2", "c"]]
    assert lm.asked[0]["messages"][0]["role"] == "system"


def test_help_lists_every_command(talk):
    told = talk(ScriptedLM(), "/help")
    for command in (
        "/help",
        "/clear",
        "/undo",
        "/save FILE",
        "/load FILE",
        "/system TEXT",
        "/quit",
    ):
        assert f"{command} " in told.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sav x", "There is no command /sav. Did you mean '/save'?"),
        ("/undo it", "/undo takes nothing after it; got 'it'."),
        ("/save", "/save needs a file"),
        ("/load ", "/load needs a file"),
    ],
)
def test_a_wrong_command_is_an_error_and_no_message(talk, line, words):
    lm = ScriptedLM()
    told = talk(lm, line)
    assert words in told.err
    assert lm.asked == []


# -- files -----------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on_elsewhere(talk, tmp_path):
    path = tmp_path / "a king.json"
    talk(ScriptedLM(["König"]), "/system Be brief.", "a", f"/save {path}", "b")
    assert json.loads(path.read_bytes()) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "König"},
    ]
    assert "König" in path.read_text("utf-8")
    lm = ScriptedLM()
    talk(lm, "lost", f"/load {path}", "c", seed=5)
    assert lm.questions[1] == ["Be brief.", "a", "König", "c"]
    assert lm.asked[1]["seed"] == 6
    assert list(tmp_path.iterdir()) == [path]


def test_saving_again_replaces_a_conversation_and_nothing_else(talk, tmp_path):
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    other.write_text('{"mine": 1}', "utf-8")
    told = talk(ScriptedLM(), "a", f"/save {own}", "b", f"/save {own}", f"/save {other}")
    assert len(json.loads(own.read_bytes())) == 4
    assert other.read_text("utf-8") == '{"mine": 1}'
    assert f"{other} is not replaced, since it holds something else" in told.err


def test_a_file_that_cannot_be_written_whole_is_not_touched(talk, tmp_path, monkeypatch):
    path = tmp_path / "own.json"
    talk(ScriptedLM(), "a", f"/save {path}")
    before = path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_hub.checkpoints.output.flush", full)
    told = talk(ScriptedLM(), "b", "c", f"/save {path}", "d")
    assert "No space left on device" in told.err
    assert told.turns[-2] == "d"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_needs_a_conversation_and_a_folder(talk, tmp_path):
    told = talk(ScriptedLM(), f"/save {tmp_path / 'x'}", "a", f"/save {tmp_path / 'no' / 'x'}")
    assert "There is nothing to save" in told.err
    assert "there is no folder" in told.err
    assert list(tmp_path.iterdir()) == []


USER, MODEL = {"role": "user", "content": "a"}, {"role": "model", "content": "b"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no file"),
        (b"[", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        ({"messages": []}, "expected a list of messages"),
        ([], "is empty"),
        ([USER], "ends with a message of the user"),
        ([MODEL], "Turn 0"),
        ([USER, USER], "Turn 1"),
        ([USER, {**MODEL, "role": "robot"}], "'robot'"),
        ([USER, {"role": "model"}], "The content of message 1"),
        ([USER, {**MODEL, "content": [{"type": "text", "text": "b"}]}], "is a list"),
        ([{"role": "system", "content": "s"}], "is no conversation"),
    ],
)
def test_a_bad_file_is_an_error_that_loses_nothing(talk, tmp_path, content, words):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    told = talk(ScriptedLM(["one"]), "/system s", "a", f"/load {path}")
    assert told.turns == ["s", "a", "one"]
    assert words in told.err
    assert str(path) in told.err


def test_the_role_model_becomes_assistant(talk, tmp_path):
    path = tmp_path / "good.json"
    path.write_text(json.dumps([USER, MODEL]), "utf-8")
    told = talk(ScriptedLM(), f"/load {path}")
    assert told.session.conversation.messages == [USER, {**MODEL, "role": "assistant"}]


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """`loads(lm)` makes this the model that is loaded; the options are in `lm.loaded`."""
    from gemma_hub.gemma import Gemma

    def install(lm):
        def load(source, **options):
            lm.loaded = {"source": source, **options}
            return lm

        lm.loaded = {}
        monkeypatch.setattr(Gemma, "load", staticmethod(load))
        return lm

    return install


def test_a_pipe_has_an_answer_for_each_line_and_nothing_else(cli, loads):
    lm = loads(ScriptedLM(["A ", "king."], ["\x1b[1m"]))
    result = cli("chat", "tiny", input="Hi\n\nHo\\\nha")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "A king.\n\x1b[1m\n"
    assert lm.questions[1:] == [["Hi"], ["Hi", "A king.", "Ho\nha"]]


def test_every_option_reaches_the_model(cli, loads):
    lm = loads(ScriptedLM())
    result = cli(
        "chat", "tiny", "--backend", "flax", "--dtype", "bfloat16", "--device", "cpu",
        "--max-new-tokens", "5", "--temperature", "0.5", "--top-k", "9", "--top-p", "0.9",
        "--min-p", "0.1", "--typical-p", "0.9", "--repetition-penalty", "1.2",
        "--no-repeat-ngram-size", "3", "--min-new-tokens", "2", "--stop", "a", "--stop", "b",
        "--seed", "11", "--system", "Be brief.", "--option", "compile=false", input="Hi\n",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert lm.loaded == {
        "source": "tiny", "task": "causal_lm", "backend": "flax", "dtype": "bfloat16",
        "device": "cpu", "backend_options": {"compile": False},
    }  # fmt: skip
    assert lm.questions[1] == ["Be brief.", "Hi"]
    assert {k: v for k, v in lm.asked[1].items() if k not in ("messages", "system")} == {
        "max_new_tokens": 5, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1,
        "typical_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
        "min_new_tokens": 2, "stop": ("a", "b"), "seed": 11,
    }  # fmt: skip


def test_without_a_seed_every_answer_draws_its_own(cli, loads):
    lm = loads(ScriptedLM())
    cli("chat", "tiny", "--temperature", "1", input="Hi\n")
    assert "seed" not in lm.asked[1]


def test_a_failed_answer_in_a_pipe_is_told_by_the_exit_code(cli, loads):
    loads(ScriptedLM(["bad", InputError("It is bad.")], ["good"]))
    result = cli("chat", "tiny", input="a\nb\n")
    assert result.exit_code == 1
    assert result.stdout == "bad\ngood\n"
    assert result.stderr == "Error: It is bad.\n"


def test_bytes_that_are_no_text_concern_their_own_line_only(cli, loads):
    lm = loads(ScriptedLM())
    assert cli("chat", "tiny", input=b"\xff\nf\xc3\xbcr\n").exit_code == 0
    assert lm.questions[-1] == ["\udcff", "answer 2", "f\u00fcr"]


def test_what_would_fail_every_time_fails_before_the_first_prompt(cli, loads):
    lm = loads(ScriptedLM())
    lm.refuses = TokenizerError("This checkpoint has no tokenizer.")
    result = cli("chat", "tiny", input="a\nb\n")
    assert result.exit_code == 1
    assert result.stderr == "Error: This checkpoint has no tokenizer.\n"


def test_a_wrong_setting_is_an_error_before_anything_is_loaded(cli, loads):
    lm = loads(ScriptedLM())
    result = cli("chat", "tiny", "--top-p", "7", input="a\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: top_p is 7.0; expected")
    assert lm.loaded == {}


def test_debug_shows_where_an_error_came_from(cli, loads):
    loads(ScriptedLM([ZeroDivisionError("a bug")]))
    result = cli("--debug", "chat", "tiny", input="a\n")
    assert "raise piece" in result.stderr
    assert result.stderr.endswith("Error: ZeroDivisionError: a bug\n")


@pytest.mark.parametrize(
    ("own", "option", "is_plain", "says"),
    [
        ("own", None, False, False),
        ("own", "--no-turns", True, False),
        (None, None, True, True),
        (None, "--turns", False, False),
        (None, "--no-turns", True, False),
    ],
)
def test_a_checkpoint_without_a_template_goes_on_with_the_text(
    cli, loads, tokenizer, own, option, is_plain, says
):
    lm = loads(ScriptedLM())
    lm.tokenizer = tokenizer
    tokenizer.chat_template = own
    result = cli("chat", "tiny", *([option] if option else []), input="")
    assert ("taken for a base model" in result.stderr) == says
    if not is_plain:
        assert tokenizer.chat_template == own
        return
    messages = [USER, MODEL, {"role": "user", "content": "<end_of_turn> c"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{tokenizer.bos_token}ab\n\n<end_of_turn> c"
