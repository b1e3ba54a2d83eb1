"""ChatSession: messages and commands in, answers out, until the input ends."""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_hub.cli.chat_input import FENCE, Entry, ReadLine, read_entry
from gemma_hub.cli.console import err, say_error, table, write
from gemma_hub.cli.conversation import Conversation
from gemma_hub.cli.generation_options import speed
from gemma_hub.errors import CapacityError, GemmaHubError, InputError, nearest
from gemma_hub.generation.prefix import ChatMemory

if TYPE_CHECKING:
    from gemma_hub.tasks.causal_lm import CausalLM

_SEEDS = 2**64


@dataclass(slots=True)
class _Answer:
    """What has come of an answer."""

    text: str = ""
    tokens: int = 0
    finish_reason: str = "interrupted"


class ChatSession:
    """One user and one model.

    An error drops the turn that it came in, and the session goes on.

    Attributes:
        conversation: what was said so far.
        has_failed: whether there was an error.
    """

    def __init__(
        self,
        lm: "CausalLM",
        settings: dict[str, Any],
        seed: int | None,
        conversation: Conversation,
        *,
        read_line: ReadLine,
        is_interactive: bool,
        shows_tracebacks: bool = False,
    ) -> None:
        """A session that has read nothing.

        Args:
            lm: what answers.
            settings: of every answer, as `CausalLM.chat` takes them; a seed in it is not used.
            seed: answer n of a conversation, counted from 0, draws with `seed` + n modulo 2**64;
                None draws a new seed for each.
            conversation: what the session begins with.
            read_line: where lines come from.
            is_interactive: whether somebody sits there: then Ctrl-C stops an answer and not the
                session, and there are notes.
            shows_tracebacks: whether errors come with theirs.
        """
        self.conversation = conversation
        self.has_failed = False
        self._lm, self._seed = lm, seed
        self._settings = {name: value for name, value in settings.items() if name != "seed"}
        self._read_line = read_line
        self._is_interactive, self._shows_tracebacks = is_interactive, shows_tracebacks
        self._memory = ChatMemory()
        self._is_over = False

    def check(self) -> None:
        """Raise now what every message would: no tokenizer, more new tokens than positions."""
        self._pieces("Hi")

    def run(self) -> None:
        """Read and answer until the input ends, /quit, or Ctrl-C twice in a row at the prompt."""
        interrupts = 0
        while not self._is_over:
            try:
                entry = read_entry(self._read_line)
                interrupts = 0
                self._take(entry)
            except EOFError:
                self._end_line()
                return
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                self._end_line()
                interrupts += 1
                if interrupts == 2:
                    return
                self.note("Ctrl-C again, Ctrl-D or /quit leaves.")
            except GemmaHubError as error:
                self._say(error)

    def note(self, text: str) -> None:
        """A dim line, if somebody sits there."""
        if self._is_interactive:
            err().print(text, style="dim", soft_wrap=True)

    def _end_line(self) -> None:
        if self._is_interactive:
            write("\n")

    def _say(self, error: GemmaHubError) -> None:
        self.has_failed = True
        if self._shows_tracebacks:
            sys.stderr.write("".join(traceback.format_exception(error)))
        say_error(str(error))

    def _take(self, entry: Entry) -> None:
        if entry.command:
            self._obey(entry)
        elif entry.text.strip():
            self._answer(entry.text)

    # -- answers -------------------------------------------------------------------------------

    def _pieces(self, question: str, memory: "ChatMemory | None" = None) -> Any:
        settings = self._settings
        if self._seed is not None:
            settings = {**settings, "seed": (self._seed + self.conversation.answers) % _SEEDS}
        asked = self.conversation.asking(question)
        return self._lm.stream_chat(asked, system="merge", memory=memory, **settings)

    def _answer(self, question: str) -> None:
        """Write the answer as it comes, and keep the turn unless it fails."""
        answer, start = _Answer(), time.perf_counter()
        try:
            for piece in self._pieces(question, self._memory):
                write(piece.text)
                answer.text += piece.text
                answer.tokens += piece.token_id is not None
                answer.finish_reason = piece.finish_reason or answer.finish_reason
            write("\n")
        except KeyboardInterrupt:
            write("\n")
            if not self._is_interactive:
                raise
        except BrokenPipeError:
            raise  # nobody reads the answers any more
        except Exception as error:  # such as memory that ran out, which /clear frees
            if answer.text:
                write("\n")
            raise self._explained(error) from error
        self._keep(question, answer, time.perf_counter() - start)

    def _explained(self, error: Exception) -> GemmaHubError:
        advice = (
            "/undo drops the last turn, /clear all of them." if self.conversation.answers else ""
        )
        if isinstance(error, CapacityError):
            return InputError(f"The conversation has become too long. {error} {advice}".rstrip())
        if isinstance(error, GemmaHubError):
            return error
        return GemmaHubError(f"{type(error).__name__}: {error} {advice}".rstrip())

    def _keep(self, question: str, answer: _Answer, seconds: float) -> None:
        if answer.finish_reason == "interrupted" and not answer.text:
            self.note("Interrupted before anything was said; the turn is dropped.")
            return
        self.conversation.add(question, answer.text)
        how = {
            "stop": "",
            "length": "; length: --max-new-tokens ended it",
        }.get(answer.finish_reason, f"; {answer.finish_reason}")
        self.note(f"{speed(answer.tokens, seconds)}{how}")

    # -- commands ------------------------------------------------------------------------------

    def _obey(self, entry: Entry) -> None:
        command = _COMMANDS.get(entry.command)
        if command is None:
            hint = nearest(entry.command, _COMMANDS)
            raise InputError(
                f"There is no command {entry.command}. {hint}{' ' if hint else ''}/help lists "
                "them. A message that begins with / is written with a space before it."
            )
        if entry.argument and not command.argument:
            raise InputError(f"{entry.command} takes nothing after it; got {entry.argument!r}.")
        if command.argument == "FILE" and not entry.argument:
            raise InputError(f"{entry.command} needs a file: {entry.command} king.json")
        command.obey(self, entry.argument)

    def _help(self, _: str) -> None:
        listed = table("command", "what it does")
        for name, command in _COMMANDS.items():
            listed.add_row(f"{name} {command.argument}".rstrip(), command.help)
        console = err()
        console.print(listed)
        console.print(
            f"A line that ends in \\ goes on; lines between two lines {FENCE} are one message. "
            "Ctrl-C stops an answer, Ctrl-D leaves.",
            style="dim",
        )

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        self._memory = ChatMemory()
        self.note("A new conversation.")

    def _undo(self, _: str) -> None:
        self.conversation.undo()
        self.note(f"The last turn is dropped; {_turns(self.conversation)} left.")

    def _save(self, name: str) -> None:
        self.conversation.save(_path(name))
        self.note(f"{_turns(self.conversation)} saved to {name}.")

    def _load(self, name: str) -> None:
        self.conversation.load(_path(name))
        self.note(f"{_turns(self.conversation)} loaded from {name}.")

    def _system(self, text: str) -> None:
        self.conversation.system = text
        self.note("It goes before your first message." if text else "No text of the system.")

    def _quit(self, _: str) -> None:
        self._is_over = True


@dataclass(frozen=True, slots=True)
class _Command:
    argument: str
    help: str
    obey: Callable[[ChatSession, str], None]


_COMMANDS = {
    "/help": _Command("", "list the commands", ChatSession._help),
    "/clear": _Command("", "begin a new conversation", ChatSession._clear),
    "/undo": _Command("", "drop the last turn", ChatSession._undo),
    "/save": _Command("FILE", "write the messages as JSON", ChatSession._save),
    "/load": _Command("FILE", "go on with a saved conversation", ChatSession._load),
    "/system": _Command(
        "TEXT", "put a text before your first message; without TEXT none", ChatSession._system
    ),
    "/quit": _Command("", "leave", ChatSession._quit),
}


def _turns(conversation: Conversation) -> str:
    return f"{conversation.answers} turn{'s' if conversation.answers != 1 else ''}"


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name} is no path: {error}") from error
