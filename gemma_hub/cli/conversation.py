"""Conversation: what was said so far, turn by turn, and its file."""

import json
from pathlib import Path
from typing import Any

from gemma_hub.errors import InputError

Message = dict[str, Any]
"""{"role": "system", "user" or "assistant", "content": text}."""


class Conversation:
    """Whole turns: a question of the user and the model's answer, and the system's text, if any.

    Attributes:
        system: what goes before the first question; empty for nothing.
    """

    def __init__(self, system: str = "") -> None:
        self.system = system
        self._turns: list[Message] = []

    @property
    def answers(self) -> int:
        """How many turns there are."""
        return len(self._turns) // 2

    @property
    def messages(self) -> list[Message]:
        """All of it, the system's message first; what `CausalLM.chat` takes, and a file holds."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self._turns]

    def asking(self, question: str) -> list[Message]:
        """The messages with one more question, which itself stays as it is."""
        return [*self.messages, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        """One more turn."""
        self._turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def undo(self) -> None:
        """Drop the last turn.

        Raises:
            InputError: there is none.
        """
        if not self._turns:
            raise InputError("There is no turn to drop: the conversation is empty.")
        del self._turns[-2:]

    def clear(self) -> None:
        """Drop all turns; the system's text stays."""
        self._turns.clear()

    def save(self, path: Path) -> None:
        """Write the messages as JSON, whole or not at all; an older conversation is replaced.

        Raises:
            InputError: there is nothing to save, something else is at `path`, or it cannot be
                written.
        """
        if not self._turns:
            raise InputError("There is nothing to save: the conversation is empty.")
        target = path.resolve()
        if target.exists():
            try:
                read_messages(target)
            except InputError as error:
                raise InputError(
                    f"{path} is not replaced, since it holds something else: {error} Choose "
                    "another name."
                ) from error
        try:
            content = json.dumps(self.messages, ensure_ascii=False, indent=2).encode("utf-8")
            _write_whole(target, content + b"\n")
        except (OSError, UnicodeEncodeError) as error:
            raise InputError(f"{path} is not written: {error}. Choose another name.") from error

    def load(self, path: Path) -> None:
        """Go on with the conversation of a file that `save` wrote; stays as it is on an error.

        Raises:
            InputError: the file cannot be read, or is no conversation of whole turns.
        """
        messages = read_messages(path)
        first = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        self.system, self._turns = first, messages


def read_messages(path: Path) -> list[Message]:
    """The messages of a file: the system's, if any, and then user and assistant in turn.

    Raises:
        InputError: it is not that; the message names the file and what is wrong in it.
    """
    from gemma_hub.tokenizers.chat import checked_messages, checked_turns

    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        messages = checked_messages(json.loads(path.read_bytes()))
        turns = checked_turns(messages, "merge")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    except InputError as error:
        raise InputError(f"{path} is no conversation. {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}. Give a file that /save wrote.") from error
    if len(turns) % 2:
        raise InputError(
            f"{path} ends with a message of the user; expected whole turns, with an answer last."
        )
    for i, message in enumerate(messages):
        if not isinstance(message["content"], str):
            raise InputError(
                f"{path} is no conversation. The content of message {i} is a list; expected a text."
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _write_whole(target: Path, content: bytes) -> None:
    from gemma_hub.checkpoints.output import flush, whole_file

    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}")
    with whole_file(target, target.name) as folder, (folder / target.name).open("wb") as file:
        file.write(content)
        flush(file)
