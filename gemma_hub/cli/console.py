"""Where output goes: results to standard output, everything else to standard error.

Consoles are made when they are used, because tests and callers replace sys.stdout. On a terminal
they colour; in a pipe they are plain and wide, so that another program can read them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 200
# Control characters would let a model's output drive the reader's terminal; these show them.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def out() -> Console:
    """The console of standard output."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def err() -> Console:
    """The console of standard error."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def table(*columns: str) -> Table:
    """An empty table in the style of every command."""
    return Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


def show_table(console: Console, title: str, listed: Table) -> None:
    """Print a table under a heading of its own line, which is not wrapped to the table's width."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(listed)
    console.print()


def size(nbytes: int) -> str:
    """A number of bytes in words, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def write(text: str) -> None:
    """Write generated text to standard output at once, as it is; on a terminal without controls."""
    sys.stdout.write(text.translate(_VISIBLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say_error(message: str) -> None:
    """`Error: message` on standard error, not wrapped."""
    err().print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on standard error while something takes long, on a terminal only."""
    console = err()
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A `progress` callback that draws a bar on standard error; None where that is no terminal."""
    console = err()
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn())
    # Otherwise what a command writes to standard output meanwhile, a pipe perhaps, comes here too.
    live = Progress(*columns, console=console, transient=True, redirect_stdout=False)
    with live as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(
            task, description=what, completed=done, total=total
        )
