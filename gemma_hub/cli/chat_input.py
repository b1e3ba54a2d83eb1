"""What a user types into a chat: messages of one line or more, and commands."""

from collections.abc import Callable
from dataclasses import dataclass

from gemma_hub.errors import InputError

ReadLine = Callable[[str], str]
"""(prompt) -> the next line without its end. EOFError where there is none."""

PROMPT, MORE = "> ", ". "
FENCE = '"""'


@dataclass(frozen=True, slots=True)
class Entry:
    """One message, or one command.

    Attributes:
        text: all of it; may be empty.
        command: its first word where that begins with "/", else empty.
    """

    text: str
    command: str = ""

    @property
    def argument(self) -> str:
        """What stands after the command."""
        return self.text.removeprefix(self.command).strip()


def read_entry(read_line: ReadLine) -> Entry:
    r'''The next entry: a line and, where it ends in "\", those after it; or a block in """.

    A block is never a command, nor is a line with a space before its "/".

    Raises:
        EOFError: the input has ended.
        InputError: it ended within an entry.
    '''
    line = read_line(PROMPT)
    if line.strip() == FENCE:
        return Entry("\n".join(_block(read_line)))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_next(read_line, "after a line that ends in \\; leave it out to end there."))
    text = "\n".join(lines)
    return Entry(text, text.split(maxsplit=1)[0] if text.startswith("/") else "")


def _block(read_line: ReadLine) -> list[str]:
    lines: list[str] = []
    while (
        line := _next(read_line, f"within a block; end it with a line {FENCE}.")
    ).strip() != FENCE:
        lines.append(line)
    return lines


def _next(read_line: ReadLine, where: str) -> str:
    try:
        return read_line(MORE)
    except EOFError:
        raise InputError(f"The input ended {where}") from None
