"""What a template may do with values: operators, methods and functions, each of them paid for."""

import operator
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

from gemma_hub.tokenizers.chat_template.budget import (
    Refusal,
    Stopped,
    admitted,
    afford,
    current_budget,
    items_of,
    kind_of,
    spend,
    text_of,
)
from gemma_hub.tokenizers.chat_template.limits import (
    MAX_BITS,
    MAX_NEEDLE,
    PLACE,
)

# -- operators -----------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
    "%": operator.mod,
}
_DIRECTIVE = re.compile(r"%%|%[-+ 0#]*\d{0,2}(?:\.\d{1,2})?[sdif]")


def operated(sign: str, left: Any, right: Any) -> Any:
    from jinja2 import Undefined

    spend()
    units = 0
    if sign == "*" and isinstance(right, (str, list, tuple)):
        left, right = right, left
    if isinstance(left, Undefined) or isinstance(right, Undefined):
        pass  # it raises the error that names what is undefined
    elif isinstance(left, (int, float)) and isinstance(right, (int, float)):
        if sign == "**" and isinstance(left, int) and left.bit_length() * right > MAX_BITS:
            raise Stopped(f"makes a number of more than {MAX_BITS} bits")
    elif sign == "%" and isinstance(left, str):
        return formatted(left, *(right if isinstance(right, tuple) else (right,)))
    elif sign == "+" and isinstance(left, str) and isinstance(right, str):
        units = priced(len(left) + len(right), left, right)
    elif sign == "+" and type(left) is type(right) and isinstance(left, (list, tuple)):
        units = 2 * PLACE * (len(left) + len(right))
    elif sign == "*" and isinstance(left, str) and isinstance(right, int):
        units = len(left) * right
    elif sign == "*" and isinstance(left, (list, tuple)) and isinstance(right, int):
        units = 2 * PLACE * len(left) * right
    else:
        raise TypeError(f"there is no {sign!r} of a {kind_of(left)} and a {kind_of(right)}")
    afford(units)
    return admitted(OPERATORS[sign](left, right))


def priced(units: int, *texts: Any) -> int:
    """More where Markup is among `texts`, which escapes the others: "&#34;" for a character."""
    return units if all(type(text) is str for text in texts) else 5 * units


def formatted(text: str, *values: Any) -> Any:
    """`text % values`, of the plainest kind."""
    if len(text) > 10_000 or "%" in _DIRECTIVE.sub("", text):
        raise Stopped("formats a text with other than plain %s, %d, %i and %f")
    plain = [value if isinstance(value, (int, float)) else text_of(value) for value in values]
    units = len(text) + sum(400 if isinstance(value, (int, float)) else len(value) + 100
                            for value in plain)  # fmt: skip
    afford(priced(units, text, *plain))
    return admitted(text % tuple(plain))


def concatenated(*values: Any) -> str:
    return whole(str(text_of(value)) for value in values)


def whole(parts: Iterable[str]) -> str:
    """The parts in one. What they cost is paid for already."""
    listed = list(parts)
    spend(sum(map(len, listed)) + PLACE)
    return "".join(listed)


def sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    from jinja2 import Undefined

    if not isinstance(value, (str, list, tuple, range, Undefined)):
        raise TypeError(f"a {kind_of(value)} cannot be sliced")
    return admitted(value[start:stop:step])


def compared(value: Any) -> Any:
    """`value`, of which every list was weighed when it was made."""
    spend()
    return value


# -- methods -------------------------------------------------------------------------------------


def free(*_: Any, **__: Any) -> int:
    return 0


def recased(text: str, *_: Any, **__: Any) -> int:
    return 3 * len(text)


def searched_back(text: str, needle: str | None = None, *_: Any, **__: Any) -> int:
    if needle is not None and len(needle) > MAX_NEEDLE:
        raise Stopped(f"strips or looks back for more than {MAX_NEEDLE} characters")
    return 0


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    searched_back(text, sep)
    parts = len(text) // 2 if sep is None else text.count(sep)
    parts = min(parts, maxsplit) if maxsplit >= 0 else parts
    spend(len(text))  # the list pays for its places alone
    return 2 * PLACE * (parts + 1)


def split_lines(text: str, *_: Any, **__: Any) -> int:
    return _split(text)


def replaced(text: str, old: str, new: str, count: int = -1) -> int:
    found = text.count(old)
    found = min(found, count) if count >= 0 else found
    return priced(len(text) + found * len(new), text, old, new)


_TEXT_METHODS: dict[str, Callable[..., int]] = {
    name: price
    for names, price in (
        ("startswith endswith removeprefix removesuffix find index count join", free),
        ("isalnum isalpha isascii isdecimal isdigit isnumeric isspace", free),
        ("islower istitle isupper", free),
        ("capitalize casefold lower swapcase title upper", recased),
        ("strip lstrip rstrip rfind rindex", searched_back),
        ("split rsplit partition rpartition", _split),
        ("splitlines", split_lines),
        ("replace", replaced),
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
NOTHING = object()


class Function:
    """What a template may call: a function, or a method of a value."""

    def __init__(self, function: Callable[..., Any], *first: Any) -> None:
        self._function = function
        self._first = first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return admitted(self._function(*self._first, *args, **kwargs))


def attribute_of(value: Any, name: str) -> Any:
    """What a template gets for `value.name`, a key apart; `NOTHING` if there is no such thing."""
    from jinja2.runtime import LoopContext
    from jinja2.utils import Namespace

    if isinstance(value, str) and name in _TEXT_METHODS:
        return Function(joined, value) if name == "join" else Function(_said, value, name)
    if name in _LIST_METHODS.get(type(value), ()):
        return Function(_asked, value, name)
    if isinstance(value, LoopContext) and name in _LOOP:
        return getattr(value, name)
    if isinstance(value, LoopContext) and name in ("cycle", "changed"):
        return Function(getattr(value, name))
    if isinstance(value, Namespace) and not name.startswith("_"):
        return getattr(value, name, NOTHING)
    if hasattr(type(value), name):
        raise Stopped(f"asks a {kind_of(value)} for {name[:100]!r}, which is refused")
    return NOTHING


def _said(text: str, method: str, *args: Any, **kwargs: Any) -> Any:
    if not all(value is None or isinstance(value, (str, int, tuple)) for value in args):
        raise TypeError(f"{method} takes texts and numbers")  # Markup makes a text of anything
    afford(_TEXT_METHODS[method](text, *args, **kwargs))
    return getattr(text, method)(*args, **kwargs)


def _asked(values: Any, method: str, *args: Any) -> Any:
    afford(10 * current_budget.get().weight(*args))  # an error of `index` prints what it looked for
    return getattr(values, method)(*args)


def joined(separator: str, values: Any) -> str:
    parts = list(items_of(values))
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("join takes a list of texts")  # Markup makes a text of anything
    size = sum(map(len, parts)) + len(separator) * len(parts)
    afford(priced(size, separator, *parts))
    return separator.join(parts)


# -- functions -----------------------------------------------------------------------------------

_TIME = re.compile(r"(?:[^%]|%[-_0^#]?[A-Za-z%]){0,200}")


def raise_exception(message: Any = "") -> NoReturn:
    raise Refusal(text_of(message))


def strftime_now(form: str) -> str:
    if not _TIME.fullmatch(form):
        raise Stopped("asks for the time in an odd form")
    return datetime.now().strftime(form)


def bounded_range(*args: int) -> range:
    from jinja2.sandbox import safe_range

    return safe_range(*args)


def made_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)
