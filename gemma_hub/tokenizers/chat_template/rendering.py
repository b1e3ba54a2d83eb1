"""Renders a chat template: a program in Jinja that came with a checkpoint, so a hostile one.

Jinja's own sandbox keeps a template from Python's attributes, but lets it loop, grow and nest as
it likes. So its syntax tree is rewritten before it is compiled: whatever can cost something (an
operator, a literal, a comparison, a call, a filter, a round of a loop, a piece of output) goes
through a function of this file, which takes the price from the rendering's budget first. What a
template can reach is listed here by name: statements, methods, filters, tests and functions, on
plain data. Everything else is refused. See `render`.

jinja2 is imported by the first rendering, so that importing this package stays quick.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gemma_hub.errors import InputError, TokenizerError
from gemma_hub.tokenizers.chat_template.budget import (
    Budget,
    Refusal,
    Stopped,
    current_budget,
)
from gemma_hub.tokenizers.chat_template.environment import (
    compiled,
)
from gemma_hub.tokenizers.chat_template.limits import (
    MAX_DEPTH,
)

if TYPE_CHECKING:
    import jinja2


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a chat template makes of its variables.

    Undefined names, white space around blocks, `raise_exception`, `strftime_now`, `tojson`,
    `{% generation %}`, `{% break %}` and `{% continue %}` are as in Transformers. Refused are
    `{% include %}`, `{% import %}`, `{% extends %}`, `{% block %}`, `{% autoescape %}`, recursive
    loops, `*args`, and the filters, tests, functions and methods that this file does not list.

    Args:
        template: Jinja text. Whatever it does, it does not get at Python, and is stopped after a
            few seconds, or when it needs 100 MB and some hundred times the size of the variables.
        variables: names for the template: texts, numbers, True, False, None, and lists and
            mappings of those. They are copied.

    Raises:
        TokenizerError: the template refuses the conversation, is not valid Jinja, uses what is
            refused, fails, or wants too much.
        InputError: a variable is no such value.
    """
    given = {name: plain_data(value, name) for name, value in variables.items()}
    program = None
    before = current_budget.set(Budget(given))
    try:
        program = compiled(template)
        parts = program.root_render_func(program.new_context(given))
        return str(program.environment.concat(parts))
    except Exception as error:  # a template can raise nearly anything
        raise _explained(error, program) from error
    finally:
        current_budget.reset(before)


def plain_data(value: Any, path: str, depth: int = 0) -> Any:
    """A copy of `value` in Python's own types, without the methods of others.

    Args:
        value: text, number, True, False, None, or a list or mapping of those.
        path: what an error calls it.
        depth: lists and mappings around it.

    Raises:
        InputError: it is or holds something else, or is nested too deeply.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # one of an enumeration, or of NumPy
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if depth == MAX_DEPTH:
        raise InputError(f"{path[:200]}... is nested more than {MAX_DEPTH} deep. Make it flatter.")
    if isinstance(value, Mapping):
        copied = {}
        for key, item in value.items():
            name = plain_data(key, f"A key of {path}", MAX_DEPTH)
            copied[name] = plain_data(item, f"{path}[{name!r}]", depth + 1)
        return copied
    if isinstance(value, (list, tuple)):
        items = [plain_data(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise InputError(
        f"{path} is a {type(value).__name__}; a chat template takes str, numbers, True, False, "
        "None, and lists and mappings of those. Turn it into one of them."
    )


# -- when it does not work -----------------------------------------------------------------------


def _explained(error: Exception, program: "jinja2.Template | None") -> TokenizerError:
    from jinja2 import TemplateSyntaxError

    said = str(getattr(error, "message", None) or error)[:1000]
    if isinstance(error, Refusal):
        return TokenizerError(
            f"The chat template refuses the conversation: '{said}'. Change the messages, or use a "
            "template that takes them."
        )
    said = said.rstrip(".")
    if isinstance(error, TemplateSyntaxError):
        return TokenizerError(
            f"The chat template cannot be used, line {error.lineno}: {said}. Correct the template."
        )
    line = _line(error.__traceback__, program)
    at = f"at line {line}" if line else "before its first line"
    if isinstance(error, Stopped):
        return TokenizerError(
            f"The chat template was stopped {at}: it {said}. A template comes with a download and "
            "is not trusted. If you wrote it yourself, do without this."
        )
    if isinstance(error, (RecursionError, MemoryError)):
        said = "it is nested too deeply"
    return TokenizerError(
        f"The chat template failed {at}: {said or type(error).__name__}. Look whether the messages "
        "hold what it asks for, or correct the template."
    )


def _line(trace: TracebackType | None, program: "jinja2.Template | None") -> int | None:
    """Line of the template that an error comes from."""
    line = None
    while trace is not None and program is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = program.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line
