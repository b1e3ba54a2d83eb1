"""`gemma-hub`: the application, its options, and what errors become.

Exit codes: 0 all is well; 1 an error, a failed comparison or a problem found; 2 wrong usage;
130 interrupted.
"""

import sys
import traceback
from typing import Annotated, Any

import typer

from gemma_hub.cli.backends import backends
from gemma_hub.cli.bench import bench
from gemma_hub.cli.chat import chat
from gemma_hub.cli.classify import classify
from gemma_hub.cli.console import say_error
from gemma_hub.cli.convert import convert
from gemma_hub.cli.doctor import doctor
from gemma_hub.cli.extensions import CommandGroup
from gemma_hub.cli.formats import formats
from gemma_hub.cli.generate import generate
from gemma_hub.cli.generate_many import generate_many
from gemma_hub.cli.inspect import inspect
from gemma_hub.cli.new_backend import new_backend
from gemma_hub.cli.parity import parity
from gemma_hub.cli.score import score
from gemma_hub.cli.tag import tag
from gemma_hub.cli.tokenize import tokenize
from gemma_hub.cli.verify import verify
from gemma_hub.errors import GemmaHubError

INTERRUPTED = 130


class _Group(CommandGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Older versions of typer say "Aborted" here, and exit with 1.
            raise typer.Exit(INTERRUPTED) from None
        except GemmaHubError as error:
            if ctx.params.get("debug"):
                sys.stderr.write(traceback.format_exc())
            say_error(str(error))
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    name="gemma-hub",
    help="The same Gemma, in any framework, with a proof.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_Group.core = app

_COMMANDS = (
    generate, generate_many, chat, score, classify, tag, tokenize, parity, verify, convert, inspect,
    formats, backends, doctor, bench, new_backend,
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gemma-hub {version('gemma-hub')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """The same Gemma, in any framework, with a proof."""


def main() -> None:
    """Entry point of the console script `gemma-hub`."""
    app(prog_name="gemma-hub")
