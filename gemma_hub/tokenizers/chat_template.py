"""Renders a chat template: a program in Jinja that came with a checkpoint, so a hostile one.

Jinja's own sandbox keeps a template from Python's attributes, but lets it loop, grow and nest as
it likes. So its syntax tree is rewritten before it is compiled: whatever can cost something (an
operator, a literal, a comparison, a call, a filter, a round of a loop, a piece of output) goes
through a function of this file, which takes the price from the rendering's budget first. What a
template can reach is listed here by name: statements, methods, filters, tests and functions, on
plain data. Everything else is refused. See `render`.

jinja2 is imported by the first rendering, so that importing this package stays quick.
"""

import functools
import json
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from gemma_hub.errors import InputError, TokenizerError, nearest

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LENGTH = 1 << 20
"""Characters of a template. Those of well-known models have 300 to 20,000."""
MAX_TOKENS = 10_000
"""Of Jinja in a template, its text not counted. Compiling one may take 0.1 ms and 10 kB."""
MAX_SECONDS = 3.0
MAX_STEPS = 1_000_000
MAX_UNITS = 1 << 24
"""Units that a rendering may use up: 64 MiB. See `_Budget`."""
UNITS_PER_INPUT = 64
"""More units for each that the variables hold: a template may copy a conversation this often."""
MAX_DEPTH = 50
"""Of lists in lists, and of macros that call macros."""
MAX_BITS = 1024
"""Of a whole number."""
MAX_NEEDLE = 64
"""Characters to strip or to look back for: it takes time as their number times the text's."""

_PLACE = 16
"""Units of a place in a list, and of a text beyond its characters."""
_CALL = 256
"""Units of a macro that is called, and of a namespace."""


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
    before = _budget.set(_Budget(given))
    try:
        program = _compiled(template)
        parts = program.root_render_func(program.new_context(given))
        return str(program.environment.concat(parts))
    except Exception as error:  # a template can raise nearly anything
        raise _explained(error, program) from error
    finally:
        _budget.reset(before)


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


class _Stopped(Exception):
    """The template does what it may not."""


class _Refusal(Exception):
    """The template called `raise_exception`."""


def _explained(error: Exception, program: "jinja2.Template | None") -> TokenizerError:
    from jinja2 import TemplateSyntaxError

    said = str(getattr(error, "message", None) or error)[:1000]
    if isinstance(error, _Refusal):
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
    if isinstance(error, _Stopped):
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


# -- what it may spend ---------------------------------------------------------------------------


class _Budget:
    """What a rendering may still use up.

    A step is one operation of the template. A unit is a character of a text that was made, or four
    bytes of something else. Units are used up whether or not what was made is kept, so they bound
    the memory of whatever is kept.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.steps = MAX_STEPS
        self.deadline = time.monotonic() + MAX_SECONDS
        self.macros = 0
        self._weights: dict[int, tuple[object, int, int]] = {}
        self.units = self.most = 1 << 62
        self.units = self.most = MAX_UNITS + UNITS_PER_INPUT * self.weight(given)

    def spend(self, units: int = 1) -> None:
        self.steps -= 1
        self.units -= units
        if self.units < 0:
            raise _Stopped(f"makes more than {self.most:,} characters of texts, lists and calls")
        if self.steps < 0:
            raise _Stopped(f"takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise _Stopped(f"takes longer than {MAX_SECONDS:g} seconds")

    def weight(self, *values: object) -> int:
        """Units of `values` with all that they hold, counted as often as they hold it.

        That is what it takes to print or to compare them. Forty lines make a list that holds
        itself 2**40 times, so every list is weighed when it is made.
        """
        return self._checked(sum(self._measured(value)[0] for value in values))

    def _checked(self, weight: int) -> int:
        if weight > self.most:
            raise _Stopped(f"makes a list of more than {self.most:,} characters")
        return weight

    def _measured(self, value: Any) -> tuple[int, int]:
        """Weight, and depth of lists in lists. Nothing changes a list once it is made."""
        if isinstance(value, str):
            return len(value) + _PLACE, 0
        if not isinstance(value, _LISTS):
            return _PLACE, 0
        known = self._weights.get(id(value))
        if known is None:
            parts = [self._measured(part) for part in _parts(value)]
            self.spend(2 * _PLACE * (len(parts) + 1))
            depth = 1 + max((depth for _, depth in parts), default=0)
            if depth > MAX_DEPTH:
                raise _Stopped(f"puts lists in lists more than {MAX_DEPTH} deep")
            weight = self._checked(_PLACE + sum(weight for weight, _ in parts))
            # The value is kept with it, since its id may be given again once it is gone.
            known = self._weights[id(value)] = value, weight, depth
        return known[1:]


_budget: ContextVar[_Budget] = ContextVar("_budget")


def _spend(units: int = 1) -> None:
    _budget.get().spend(units)


def _afford(units: int) -> None:
    """Before something is made that `_admitted` will have paid for: is it within the budget?"""
    budget = _budget.get()
    if units > budget.units:
        budget.spend(units)


class _Generator:
    """What Jinja's `map`, `select` and their like give: true, without a length, read only once."""

    def __init__(self, items: Iterable[Any]) -> None:
        # Made at once: of generators in generators, a hundred thousand deep, Python dies.
        self.items = list(items)
        self._iterator = iter(self.items)

    def __iter__(self) -> Iterator[Any]:
        return self._iterator


_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_LISTS: tuple[Any, ...] = (list, tuple, dict, _Generator, *_VIEWS)


def _parts(value: Any) -> Iterable[Any]:
    source: Any = getattr(value, "mapping", value)  # of a view
    if isinstance(value, (dict, *_VIEWS)):
        return chain.from_iterable(source.items())
    return source.items if isinstance(value, _Generator) else source  # type: ignore[no-any-return]


def _admitted(value: Any) -> Any:
    """`value`, new made, once it is paid for."""
    if isinstance(value, str):
        _spend(len(value) + _PLACE)
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _Stopped(f"makes a number of more than {MAX_BITS} bits")
    elif isinstance(value, (complex, set, frozenset, bytes)):
        raise _Stopped(f"makes a {type(value).__name__}, which no template needs")
    else:
        _budget.get().weight(value)
        _spend()
    return value


def _text(value: Any) -> Any:
    """`value` as `str` prints it; but things without a text are refused, and Markup stays so."""
    from jinja2 import Undefined

    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (int, float, Undefined)):
        return str(value)
    if isinstance(value, (list, tuple, dict, range, *_VIEWS)):
        _afford(10 * _budget.get().weight(value))  # "\U0001f600" for an odd character
        text = str(value)
        _spend(len(text))
        return text
    raise _Stopped(f"prints a {_kind(value)}, which is no text")


def _kind(value: object) -> str:
    return type(value).__name__.strip("_").lower()


def _each(values: Any) -> Iterator[Any]:
    """The items of `values`, and a step for each."""
    from jinja2 import Undefined

    if not isinstance(values, (str, range, Undefined, *_LISTS)):
        raise TypeError(f"a {_kind(values)} has no items to go through")
    units = 2 * _PLACE if isinstance(values, str) else 1  # a text has no items before
    items: Any = values
    for value in items:
        _spend(units)
        yield value


# -- operators -----------------------------------------------------------------------------------

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
    "%": operator.mod,
}
_DIRECTIVE = re.compile(r"%%|%[-+ 0#]*\d{0,2}(?:\.\d{1,2})?[sdif]")


def _operated(sign: str, left: Any, right: Any) -> Any:
    from jinja2 import Undefined

    _spend()
    units = 0
    if sign == "*" and isinstance(right, (str, list, tuple)):
        left, right = right, left
    if isinstance(left, Undefined) or isinstance(right, Undefined):
        pass  # it raises the error that names what is undefined
    elif isinstance(left, (int, float)) and isinstance(right, (int, float)):
        if sign == "**" and isinstance(left, int) and left.bit_length() * right > MAX_BITS:
            raise _Stopped(f"makes a number of more than {MAX_BITS} bits")
    elif sign == "%" and isinstance(left, str):
        return _formatted(left, *(right if isinstance(right, tuple) else (right,)))
    elif sign == "+" and isinstance(left, str) and isinstance(right, str):
        units = _price(len(left) + len(right), left, right)
    elif sign == "+" and type(left) is type(right) and isinstance(left, (list, tuple)):
        units = 2 * _PLACE * (len(left) + len(right))
    elif sign == "*" and isinstance(left, str) and isinstance(right, int):
        units = len(left) * right
    elif sign == "*" and isinstance(left, (list, tuple)) and isinstance(right, int):
        units = 2 * _PLACE * len(left) * right
    else:
        raise TypeError(f"there is no {sign!r} of a {_kind(left)} and a {_kind(right)}")
    _afford(units)
    return _admitted(_OPERATORS[sign](left, right))


def _price(units: int, *texts: Any) -> int:
    """More where Markup is among `texts`, which escapes the others: "&#34;" for a character."""
    return units if all(type(text) is str for text in texts) else 5 * units


def _formatted(text: str, *values: Any) -> Any:
    """`text % values`, of the plainest kind."""
    if len(text) > 10_000 or "%" in _DIRECTIVE.sub("", text):
        raise _Stopped("formats a text with other than plain %s, %d, %i and %f")
    plain = [value if isinstance(value, (int, float)) else _text(value) for value in values]
    units = len(text) + sum(400 if isinstance(value, (int, float)) else len(value) + 100
                            for value in plain)  # fmt: skip
    _afford(_price(units, text, *plain))
    return _admitted(text % tuple(plain))


def _concatenated(*values: Any) -> str:
    return _whole(str(_text(value)) for value in values)


def _whole(parts: Iterable[str]) -> str:
    """The parts in one. What they cost is paid for already."""
    listed = list(parts)
    _spend(sum(map(len, listed)) + _PLACE)
    return "".join(listed)


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    from jinja2 import Undefined

    if not isinstance(value, (str, list, tuple, range, Undefined)):
        raise TypeError(f"a {_kind(value)} cannot be sliced")
    return _admitted(value[start:stop:step])


def _compared(value: Any) -> Any:
    """`value`, of which every list was weighed when it was made."""
    _spend()
    return value


# -- methods -------------------------------------------------------------------------------------


def _free(*_: Any, **__: Any) -> int:
    return 0


def _recased(text: str, *_: Any, **__: Any) -> int:
    return 3 * len(text)


def _searched_back(text: str, needle: str | None = None, *_: Any, **__: Any) -> int:
    if needle is not None and len(needle) > MAX_NEEDLE:
        raise _Stopped(f"strips or looks back for more than {MAX_NEEDLE} characters")
    return 0


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    _searched_back(text, sep)
    parts = len(text) // 2 if sep is None else text.count(sep)
    parts = min(parts, maxsplit) if maxsplit >= 0 else parts
    _spend(len(text))  # the list pays for its places alone
    return 2 * _PLACE * (parts + 1)


def _split_lines(text: str, *_: Any, **__: Any) -> int:
    return _split(text)


def _replaced(text: str, old: str, new: str, count: int = -1) -> int:
    found = text.count(old)
    found = min(found, count) if count >= 0 else found
    return _price(len(text) + found * len(new), text, old, new)


_TEXT_METHODS: dict[str, Callable[..., int]] = {
    name: price
    for names, price in (
        ("startswith endswith removeprefix removesuffix find index count join", _free),
        ("isalnum isalpha isascii isdecimal isdigit isnumeric isspace", _free),
        ("islower istitle isupper", _free),
        ("capitalize casefold lower swapcase title upper", _recased),
        ("strip lstrip rstrip rfind rindex", _searched_back),
        ("split rsplit partition rpartition", _split),
        ("splitlines", _split_lines),
        ("replace", _replaced),
    )
    for name in names.split()
}
_LIST_METHODS: dict[type, tuple[str, ...]] = {
    dict: ("get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "index"),
}
_LOOP = (
    *("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"),
    *("previtem", "nextitem"),
)
_NOTHING = object()


class _Function:
    """What a template may call: a function, or a method of a value."""

    def __init__(self, function: Callable[..., Any], *first: Any) -> None:
        self._function = function
        self._first = first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _admitted(self._function(*self._first, *args, **kwargs))


def _attribute(value: Any, name: str) -> Any:
    """What a template gets for `value.name`, a key apart; `_NOTHING` if there is no such thing."""
    from jinja2.runtime import LoopContext
    from jinja2.utils import Namespace

    if isinstance(value, str) and name in _TEXT_METHODS:
        return _Function(_joined, value) if name == "join" else _Function(_said, value, name)
    if name in _LIST_METHODS.get(type(value), ()):
        return _Function(_asked, value, name)
    if isinstance(value, LoopContext) and name in _LOOP:
        return getattr(value, name)
    if isinstance(value, LoopContext) and name in ("cycle", "changed"):
        return _Function(getattr(value, name))
    if isinstance(value, Namespace) and not name.startswith("_"):
        return getattr(value, name, _NOTHING)
    if hasattr(type(value), name):
        raise _Stopped(f"asks a {_kind(value)} for {name[:100]!r}, which is refused")
    return _NOTHING


def _said(text: str, method: str, *args: Any, **kwargs: Any) -> Any:
    if not all(value is None or isinstance(value, (str, int, tuple)) for value in args):
        raise TypeError(f"{method} takes texts and numbers")  # Markup makes a text of anything
    _afford(_TEXT_METHODS[method](text, *args, **kwargs))
    return getattr(text, method)(*args, **kwargs)


def _asked(values: Any, method: str, *args: Any) -> Any:
    _afford(10 * _budget.get().weight(*args))  # an error of `index` prints what it looked for
    return getattr(values, method)(*args)


def _joined(separator: str, values: Any) -> str:
    parts = list(_each(values))
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("join takes a list of texts")  # Markup makes a text of anything
    size = sum(map(len, parts)) + len(separator) * len(parts)
    _afford(_price(size, separator, *parts))
    return separator.join(parts)


# -- functions -----------------------------------------------------------------------------------

_TIME = re.compile(r"(?:[^%]|%[-_0^#]?[A-Za-z%]){0,200}")


def _raise_exception(message: Any = "") -> NoReturn:
    raise _Refusal(_text(message))


def _strftime_now(form: str) -> str:
    if not _TIME.fullmatch(form):
        raise _Stopped("asks for the time in an odd form")
    return datetime.now().strftime(form)


def _range(*args: int) -> range:
    from jinja2.sandbox import safe_range

    return safe_range(*args)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


# -- filters and tests ---------------------------------------------------------------------------


def _guarded(
    function: Callable[..., Any],
    price: Callable[..., int] = _free,
    *,
    text: bool = False,
    each: bool = False,
) -> Callable[..., Any]:
    """A filter or a test of Jinja, paid for.

    Args:
        function: the value, after the environment where it is marked for it, and arguments.
        price: units for the value and the arguments, for what is made on the way.
        text: it makes a text of any value, which would not be paid for.
        each: it goes through the value.
    """
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value, rest = args[place], args[place + 1 :]
        _spend()
        if text:
            value = _text(value)
        _afford(price(value, *rest, **kwargs))
        if each and value:
            value = _each(value)
        result = function(*args[:place], value, *rest, **kwargs)
        if isinstance(result, Iterator) and type(result).__module__ == "builtins":
            result = _Generator(result)
        return _admitted(result)

    return guarded


def _of_dict(value: Any, *_: Any, **__: Any) -> int:
    if not isinstance(value, dict):  # Jinja would call the `items` of a namespace
        raise TypeError(f"a {_kind(value)} has no items to sort")
    return 0


def _keyed(value: Any, *args: Any, attribute: Any = None, **__: Any) -> int:
    if any(isinstance(name, str) and len(name) > 1000 for name in (*args, attribute)):
        raise _Stopped("sorts by a name of more than 1000 characters")
    return 0


def _numeral(value: Any, *_: Any, **__: Any) -> int:
    if isinstance(value, str) and len(value) > 1000:
        raise _Stopped("takes a text of more than 1000 characters for a number")
    return 0


def _rounded(value: Any, precision: int = 0, *_: Any, **__: Any) -> int:
    if abs(precision) > 20:
        raise _Stopped("rounds to more than 20 places")
    return 0


def _indented(text: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
    text = text + ""  # fails where it is none: Jinja would change a list
    _afford(_split_lines(text))
    size = len(width) if isinstance(width, str) else width
    return _price(len(text) + max(size, 0) * (len(text.splitlines()) + 1), text, width)


def _replace(text: str, old: Any, new: Any, count: int | None = None) -> str:
    old, new, count = str(_text(old)), str(_text(new)), -1 if count is None else count
    _afford(_replaced(str(text), old, new, count))
    return str(text).replace(old, new, count)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As in Transformers: Jinja's own escapes for HTML."""
    # "\u001f" for a character, or "\ud83d\ude00".
    _afford((12 if ensure_ascii else 6) * _budget.get().weight(value))
    if separators is not None and sum(map(len, separators)) > 20:
        raise _Stopped("separates values of JSON by more than 20 characters")
    encoder = json.JSONEncoder(
        ensure_ascii=bool(ensure_ascii),
        indent=indent,
        separators=separators,
        sort_keys=bool(sort_keys),
    )
    if indent is None:
        return encoder.encode(value)
    size = len(indent) if isinstance(indent, str) else indent
    if size > 20:
        raise _Stopped("indents JSON by more than 20 characters")
    parts = []
    for part in encoder.iterencode(value):
        _spend(len(part) + _PLACE)
        parts.append(part)
    return "".join(parts)


def _filters() -> dict[str, Callable[..., Any]]:
    from jinja2 import filters as jinja
    from jinja2 import pass_environment
    from markupsafe import escape, soft_str

    @pass_environment
    def join(environment: Any, values: Any, d: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            values = map(jinja.make_attrgetter(environment, attribute), values)
        return _joined(str(_text(d)), [str(_text(value)) for value in values])

    @pass_environment
    def total(environment: Any, values: Any, attribute: Any = None, start: Any = 0) -> Any:
        item = jinja.make_attrgetter(environment, attribute)
        return functools.reduce(lambda a, b: _operated("+", a, item(b)), values, start)

    def fivefold(text: str) -> int:
        return 5 * len(text)

    known: dict[str, Callable[..., Any]] = {
        "abs": _guarded(abs),
        "capitalize": _guarded(jinja.do_capitalize, _recased, text=True),
        "default": _guarded(jinja.do_default),
        "dictsort": _guarded(jinja.do_dictsort, _of_dict),
        "escape": _guarded(escape, fivefold, text=True),
        "first": _guarded(jinja.sync_do_first, each=True),
        "float": _guarded(jinja.do_float, _numeral),
        "forceescape": _guarded(jinja.do_forceescape, fivefold, text=True),
        "format": _guarded(_formatted, text=True),
        "indent": _guarded(jinja.do_indent, _indented),
        "int": _guarded(jinja.do_int, _numeral),
        "items": _guarded(jinja.do_items),
        "join": _guarded(join, each=True),
        "last": _guarded(jinja.do_last),
        "length": _guarded(len),
        "list": _guarded(jinja.sync_do_list, each=True),
        "lower": _guarded(jinja.do_lower, _recased, text=True),
        "map": _guarded(jinja.sync_do_map, each=True),
        "max": _guarded(jinja.do_max, each=True),
        "min": _guarded(jinja.do_min, each=True),
        "reject": _guarded(jinja.sync_do_reject, each=True),
        "rejectattr": _guarded(jinja.sync_do_rejectattr, each=True),
        "replace": _guarded(_replace, text=True),
        "reverse": _guarded(jinja.do_reverse),
        "round": _guarded(jinja.do_round, _rounded),
        "safe": _guarded(jinja.do_mark_safe, text=True),
        "select": _guarded(jinja.sync_do_select, each=True),
        "selectattr": _guarded(jinja.sync_do_selectattr, each=True),
        "sort": _guarded(jinja.do_sort, _keyed, each=True),
        "string": _guarded(soft_str, text=True),
        "sum": _guarded(total, each=True),
        "title": _guarded(jinja.do_title, lambda text: _PLACE * len(text), text=True),
        "tojson": _guarded(_tojson),
        "trim": _guarded(jinja.do_trim, _searched_back, text=True),
        "unique": _guarded(jinja.sync_do_unique, each=True),
        "upper": _guarded(jinja.do_upper, _recased, text=True),
        # What the template's syntax is rewritten to. No template can spell these.
        "(each)": _each,
        "(made)": _admitted,
        "(compared)": _compared,
        "(concatenated)": _concatenated,
        "(sliced)": _sliced,
    }
    return known | {"d": known["default"], "e": known["escape"], "count": known["length"]}


def _tests() -> dict[str, Callable[..., Any]]:
    from jinja2.tests import TESTS

    jinja: dict[str, Any] = {**TESTS}
    names = (
        "defined undefined none boolean true false integer float number string mapping sequence "
        "iterable callable sameas escaped filter test in == eq equalto != ne > gt greaterthan >= "
        "ge < lt lessthan <= le"
    )
    return {
        **{name: _guarded(jinja[name]) for name in names.split()},
        **{name: _guarded(jinja[name], text=True) for name in ("lower", "upper")},
        # Those of Jinja format a text: "%d" is odd.
        "odd": _guarded(lambda value: _operated("%", value, 2) == 1),
        "even": _guarded(lambda value: _operated("%", value, 2) == 0),
        "divisibleby": _guarded(lambda value, by: _operated("%", value, by) == 0),
    }


# -- the environment -----------------------------------------------------------------------------

_NODES = frozenset(
    "Template Output TemplateData For If Macro CallBlock FilterBlock With Assign AssignBlock "
    "Continue Break Scope Name NSRef Const Tuple List Dict Pair Keyword CondExpr Filter Test Call "
    "Getitem Getattr Slice Concat Compare Operand And Or Not Neg Pos Add Sub Mul Div FloorDiv Mod "
    "Pow".split()
)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> "jinja2.Template":
    if len(template) > MAX_LENGTH:
        raise _Stopped(f"has {len(template):,} characters, more than {MAX_LENGTH:,}")
    # Jinja takes 300 bytes for each digit of a number.
    if any(word.end() - word.start() > 10_000 for word in re.finditer(r"\w+", template)):
        raise _Stopped("has a word of more than 10,000 characters")
    return _environment().from_string(template)


@functools.cache
def _environment() -> "ImmutableSandboxedEnvironment":
    from jinja2 import TemplateSyntaxError, Undefined, nodes, pass_context
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.runtime import Context, Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace as JinjaNamespace
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}`, by which training finds the model's turns: its content."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

        def filter_stream(self, stream: Any) -> Iterator[Any]:
            for count, token in enumerate(stream):
                if count > MAX_TOKENS:
                    raise _Stopped(f"has more than {MAX_TOKENS:,} words of Jinja")
                yield token

    class Rewriter(NodeTransformer):
        """Sends whatever costs something through the functions above."""

        def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
            if (name := type(node).__name__) not in _NODES:
                raise TemplateSyntaxError(f"it uses {name}, which is refused", node.lineno)
            return super().generic_visit(node)

        def visit_For(self, node: nodes.For) -> nodes.Node:
            if node.recursive:
                raise TemplateSyntaxError("a recursive loop is refused", node.lineno)
            self.generic_visit(node)
            node.iter = self._through("(each)", node.iter)
            return node

        def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
            return self._called(node, "filter", filters)

        def visit_Test(self, node: nodes.Test) -> nodes.Node:
            return self._called(node, "test", tests)

        def visit_Call(self, node: nodes.Call) -> nodes.Node:
            return self._called(node)

        def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
            return nodes.Const(node.data, lineno=node.lineno)  # goes through `finalize`

        def visit_Const(self, node: nodes.Const) -> nodes.Node:
            large = isinstance(node.value, int) and node.value.bit_length() > MAX_BITS
            if large or node.value == float("inf"):
                raise TemplateSyntaxError("a number is too large", node.lineno)
            return node

        def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
            if node.attr.startswith("_"):
                raise TemplateSyntaxError("a name with an underscore is refused", node.lineno)
            return node

        def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
            self.generic_visit(node)
            node.expr = self._through("(compared)", node.expr)
            for operand in node.ops:
                operand.expr = self._through("(compared)", operand.expr)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return self._through("(concatenated)", *node.nodes)

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
            self.generic_visit(node)
            if not isinstance(node.arg, nodes.Slice):
                return node
            ends = (node.arg.start, node.arg.stop, node.arg.step)
            return self._through("(sliced)", node.node, *(end or nodes.Const(None) for end in ends))

        def visit_List(self, node: nodes.List) -> nodes.Node:
            return self._through("(made)", self.generic_visit(node))

        def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
            self.generic_visit(node)
            return node if node.ctx == "store" else self._through("(made)", node)

        visit_Dict = visit_List

        def _called(
            self, node: Any, kind: str = "", known: Mapping[str, Any] | None = None
        ) -> nodes.Node:
            if known is not None and node.name not in known:
                hint = nearest(node.name[:100], (name for name in known if name[0].isalpha()))
                said = f"there is no {kind} {node.name[:100]!r} here. {hint}"
                raise TemplateSyntaxError(said.strip(), node.lineno)
            if node.dyn_args is not None or node.dyn_kwargs is not None:
                raise TemplateSyntaxError("arguments with a star are refused", node.lineno)
            return self.generic_visit(node)

        def _through(self, name: str, value: Any, *args: Any) -> nodes.Expr:
            return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)

    class Namespace(JinjaNamespace):
        """`namespace(...)`: the one thing that a template may change."""

        def __init__(self, /, *args: Any, **kwargs: Any) -> None:
            names = dict(*args, **kwargs)
            if any(not isinstance(name, str) or name.startswith("_") for name in names):
                raise _Stopped("gives a namespace a name with an underscore")
            _spend(_CALL)
            super().__init__(names)

        def __repr__(self) -> str:
            return "<Namespace>"

    class Environment(ImmutableSandboxedEnvironment):
        concat = staticmethod(_whole)
        intercepted_binops = frozenset(_OPERATORS)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            return Rewriter().visit(tree)  # type: ignore[no-any-return]

        def getattr(self, obj: Any, attribute: str) -> Any:
            _spend()
            if isinstance(obj, Undefined):
                return obj[attribute]  # raises
            found = _attribute(obj, attribute)
            return self._item(obj, attribute) if found is _NOTHING else found

        def getitem(self, obj: Any, argument: Any) -> Any:
            _spend()
            if isinstance(obj, Undefined):
                return obj[argument]  # raises
            return self._item(obj, argument)

        def _item(self, obj: Any, key: Any) -> Any:
            if isinstance(obj, (str, list, tuple, dict, range)):
                try:
                    return obj[key]
                except (TypeError, LookupError):
                    pass
            found = _attribute(obj, key) if isinstance(key, str) else _NOTHING
            if found is not _NOTHING:
                return found
            return self.undefined(obj=obj, name=key[:100] if isinstance(key, str) else _kind(key))

        def call_binop(self, context: Context, sign: str, left: Any, right: Any) -> Any:
            return _operated(sign, left, right)

        def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            for name in ("_loop_vars", "_block_vars"):  # from Jinja, for functions that ask for it
                kwargs.pop(name, None)
            budget = _budget.get()
            budget.weight(*args, *kwargs.values())
            if not isinstance(obj, Macro):
                if not isinstance(obj, (_Function, Undefined)):
                    raise TypeError(f"a {_kind(obj)} cannot be called")
                return super().call(context, obj, *args, **kwargs)
            budget.spend(_CALL)
            budget.macros += 1
            if budget.macros > MAX_DEPTH:
                raise _Stopped(f"calls macros in macros more than {MAX_DEPTH} deep")
            try:
                return super().call(context, obj, *args, **kwargs)
            finally:
                budget.macros -= 1

    @pass_context
    def finalize(context: Context, value: Any) -> str:  # a context keeps it from compile time
        text = str(_text(value))
        _spend(len(text) + _PLACE)
        return text

    filters, tests = _filters(), _tests()
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[Generation, LoopControlExtension],
        finalize=finalize,
    )
    environment.filters = filters
    environment.tests = tests  # type: ignore[assignment]
    environment.globals = {
        "range": _Function(_range),
        "dict": _Function(_dict),
        "namespace": _Function(Namespace),
        "raise_exception": _Function(_raise_exception),
        "strftime_now": _Function(_strftime_now),
    }
    return environment
