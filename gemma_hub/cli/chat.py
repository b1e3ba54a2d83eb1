"""`gemma-hub chat`: a conversation with a model, on a terminal or through a pipe."""

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gemma_hub.cli import generation_options as options
from gemma_hub.cli import texts
from gemma_hub.cli.chat_input import ReadLine
from gemma_hub.cli.chat_session import ChatSession
from gemma_hub.cli.console import err
from gemma_hub.cli.conversation import Conversation

if TYPE_CHECKING:
    from gemma_hub.tasks.causal_lm import CausalLM

# A model that never saw Gemma's turns goes on with a text: this is one, in paragraphs.
_PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message['content'] }}
    {%- if message['role'] == 'assistant' %}{{ '\\n\\n' }}{% endif %}
{%- endfor %}"""


def chat(
    context: typer.Context,
    source: texts.Source,
    backend: texts.Backend = None,
    dtype: texts.Dtype = "auto",
    device: texts.Device = "auto",
    option: texts.Option = None,
    system: Annotated[
        str | None, typer.Option(help="Text that goes before your first message.")
    ] = None,
    turns: Annotated[
        bool | None,
        typer.Option(
            help="Gemma's turns, or one plain text that a base model goes on with.",
            show_default="turns if the checkpoint has a chat template",
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
) -> None:
    """Talk with a model: /help lists the commands. In a pipe: an answer to each line."""
    # Checked before the model is loaded.
    settings = options.chosen_settings(context)
    backend_options = texts.backend_options(option)
    model = texts.loaded(source, "causal_lm", backend, dtype, device, backend_options)
    lm = cast("CausalLM", model)
    _choose_template(lm, source, turns)
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    session = ChatSession(
        lm,
        options.as_keywords(settings),
        seed,
        Conversation(system or ""),
        read_line=_line_reader(is_interactive),
        is_interactive=is_interactive,
        shows_tracebacks=bool(context.find_root().params.get("debug")),
    )
    session.check()
    session.note(f"{source}: {lm.backend.name}, {lm.dtype} on {lm.device}. /help lists commands.")
    session.run()
    if session.has_failed and not is_interactive:
        raise typer.Exit(1)


def _choose_template(lm: "CausalLM", source: str, turns: bool | None) -> None:
    """Let a base model go on with a text, since it knows no turns."""
    tokenizer: Any = lm.tokenizer
    if turns is None and getattr(tokenizer, "chat_template", "") is None:
        turns = False
        err().print(
            f"{source} has no chat template, so it is taken for a base model, which goes on with "
            "your text. With --turns it gets Gemma's turns.",
            style="dim",
            soft_wrap=True,
        )
    if turns is False:
        tokenizer.chat_template = _PLAIN_TEMPLATE


def _line_reader(is_interactive: bool) -> ReadLine:
    """Reads lines: with arrow keys and a history where somebody types and there is a readline."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text spoil their own message, which the tokenizer refuses, and no other.
        sys.stdin.reconfigure(errors="surrogateescape")
    if not is_interactive:
        return _read_line
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import changes what input() does
    return input


def _read_line(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
