"""The filters and tests that a template may use, each of them paid for."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from gemma_hub.tokenizers.chat_template.budget import (
    Generated,
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
    PLACE,
)
from gemma_hub.tokenizers.chat_template.operations import (
    compared,
    concatenated,
    formatted,
    free,
    joined,
    operated,
    priced,
    recased,
    replaced,
    searched_back,
    sliced,
    split_lines,
)


def _guarded(
    function: Callable[..., Any],
    price: Callable[..., int] = free,
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
        spend()
        if text:
            value = text_of(value)
        afford(price(value, *rest, **kwargs))
        if each and value:
            value = items_of(value)
        result = function(*args[:place], value, *rest, **kwargs)
        if isinstance(result, Iterator) and type(result).__module__ == "builtins":
            result = Generated(result)
        return admitted(result)

    return guarded


def _of_dict(value: Any, *_: Any, **__: Any) -> int:
    if not isinstance(value, dict):  # Jinja would call the `items` of a namespace
        raise TypeError(f"a {kind_of(value)} has no items to sort")
    return 0


def _keyed(value: Any, *args: Any, attribute: Any = None, **__: Any) -> int:
    if any(isinstance(name, str) and len(name) > 1000 for name in (*args, attribute)):
        raise Stopped("sorts by a name of more than 1000 characters")
    return 0


def _numeral(value: Any, *_: Any, **__: Any) -> int:
    if isinstance(value, str) and len(value) > 1000:
        raise Stopped("takes a text of more than 1000 characters for a number")
    return 0


def _rounded(value: Any, precision: int = 0, *_: Any, **__: Any) -> int:
    if abs(precision) > 20:
        raise Stopped("rounds to more than 20 places")
    return 0


def _indented(text: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
    text = text + ""  # fails where it is none: Jinja would change a list
    afford(split_lines(text))
    size = len(width) if isinstance(width, str) else width
    return priced(len(text) + max(size, 0) * (len(text.splitlines()) + 1), text, width)


def _replace(text: str, old: Any, new: Any, count: int | None = None) -> str:
    old, new, count = str(text_of(old)), str(text_of(new)), -1 if count is None else count
    afford(replaced(str(text), old, new, count))
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
    afford((12 if ensure_ascii else 6) * current_budget.get().weight(value))
    if separators is not None and sum(map(len, separators)) > 20:
        raise Stopped("separates values of JSON by more than 20 characters")
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
        raise Stopped("indents JSON by more than 20 characters")
    parts = []
    for part in encoder.iterencode(value):
        spend(len(part) + PLACE)
        parts.append(part)
    return "".join(parts)


def known_filters() -> dict[str, Callable[..., Any]]:
    from jinja2 import filters as jinja
    from jinja2 import pass_environment
    from markupsafe import escape, soft_str

    @pass_environment
    def join(environment: Any, values: Any, d: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            values = map(jinja.make_attrgetter(environment, attribute), values)
        return joined(str(text_of(d)), [str(text_of(value)) for value in values])

    @pass_environment
    def total(environment: Any, values: Any, attribute: Any = None, start: Any = 0) -> Any:
        item = jinja.make_attrgetter(environment, attribute)
        return functools.reduce(lambda a, b: operated("+", a, item(b)), values, start)

    def fivefold(text: str) -> int:
        return 5 * len(text)

    known: dict[str, Callable[..., Any]] = {
        "abs": _guarded(abs),
        "capitalize": _guarded(jinja.do_capitalize, recased, text=True),
        "default": _guarded(jinja.do_default),
        "dictsort": _guarded(jinja.do_dictsort, _of_dict),
        "escape": _guarded(escape, fivefold, text=True),
        "first": _guarded(jinja.sync_do_first, each=True),
        "float": _guarded(jinja.do_float, _numeral),
        "forceescape": _guarded(jinja.do_forceescape, fivefold, text=True),
        "format": _guarded(formatted, text=True),
        "indent": _guarded(jinja.do_indent, _indented),
        "int": _guarded(jinja.do_int, _numeral),
        "items": _guarded(jinja.do_items),
        "join": _guarded(join, each=True),
        "last": _guarded(jinja.do_last),
        "length": _guarded(len),
        "list": _guarded(jinja.sync_do_list, each=True),
        "lower": _guarded(jinja.do_lower, recased, text=True),
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
        "title": _guarded(jinja.do_title, lambda text: PLACE * len(text), text=True),
        "tojson": _guarded(_tojson),
        "trim": _guarded(jinja.do_trim, searched_back, text=True),
        "unique": _guarded(jinja.sync_do_unique, each=True),
        "upper": _guarded(jinja.do_upper, recased, text=True),
        # What the template's syntax is rewritten to. No template can spell these.
        "(each)": items_of,
        "(made)": admitted,
        "(compared)": compared,
        "(concatenated)": concatenated,
        "(sliced)": sliced,
    }
    return known | {"d": known["default"], "e": known["escape"], "count": known["length"]}


def known_tests() -> dict[str, Callable[..., Any]]:
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
        "odd": _guarded(lambda value: operated("%", value, 2) == 1),
        "even": _guarded(lambda value: operated("%", value, 2) == 0),
        "divisibleby": _guarded(lambda value, by: operated("%", value, by) == 0),
    }
