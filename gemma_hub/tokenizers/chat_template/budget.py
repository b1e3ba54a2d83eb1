"""Budget: what a rendering has used up, and values that are paid for.

A step is one operation of the template. A unit is a character, or four bytes of something else.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import chain
from typing import Any

from gemma_hub.tokenizers.chat_template.limits import (
    MAX_BITS,
    MAX_DEPTH,
    MAX_SECONDS,
    MAX_STEPS,
    MAX_UNITS,
    PLACE,
    UNITS_PER_INPUT,
)


class Stopped(Exception):
    """The template does what it may not."""


class Refusal(Exception):
    """The template called `raise_exception`."""


class Budget:
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
            raise Stopped(f"makes more than {self.most:,} characters of texts, lists and calls")
        if self.steps < 0:
            raise Stopped(f"takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise Stopped(f"takes longer than {MAX_SECONDS:g} seconds")

    def weight(self, *values: object) -> int:
        """Units of `values` with all that they hold, counted as often as they hold it.

        That is what it takes to print or to compare them. Forty lines make a list that holds
        itself 2**40 times, so every list is weighed when it is made.
        """
        return self._checked(sum(self._measured(value)[0] for value in values))

    def _checked(self, weight: int) -> int:
        if weight > self.most:
            raise Stopped(f"makes a list of more than {self.most:,} characters")
        return weight

    def _measured(self, value: Any) -> tuple[int, int]:
        """Weight, and depth of lists in lists. Nothing changes a list once it is made."""
        if isinstance(value, str):
            return len(value) + PLACE, 0
        if not isinstance(value, LISTS):
            return PLACE, 0
        known = self._weights.get(id(value))
        if known is None:
            parts = [self._measured(part) for part in _parts(value)]
            self.spend(2 * PLACE * (len(parts) + 1))
            depth = 1 + max((depth for _, depth in parts), default=0)
            if depth > MAX_DEPTH:
                raise Stopped(f"puts lists in lists more than {MAX_DEPTH} deep")
            weight = self._checked(PLACE + sum(weight for weight, _ in parts))
            # The value is kept with it, since its id may be given again once it is gone.
            known = self._weights[id(value)] = value, weight, depth
        return known[1:]


current_budget: ContextVar[Budget] = ContextVar("current_budget")


def spend(units: int = 1) -> None:
    current_budget.get().spend(units)


def afford(units: int) -> None:
    """Before something is made that `admitted` will have paid for: is it within the budget?"""
    budget = current_budget.get()
    if units > budget.units:
        budget.spend(units)


class Generated:
    """What Jinja's `map`, `select` and their like give: true, without a length, read only once."""

    def __init__(self, items: Iterable[Any]) -> None:
        # Made at once: of generators in generators, a hundred thousand deep, Python dies.
        self.items = list(items)
        self._iterator = iter(self.items)

    def __iter__(self) -> Iterator[Any]:
        return self._iterator


VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
LISTS: tuple[Any, ...] = (list, tuple, dict, Generated, *VIEWS)


def _parts(value: Any) -> Iterable[Any]:
    source: Any = getattr(value, "mapping", value)  # of a view
    if isinstance(value, (dict, *VIEWS)):
        return chain.from_iterable(source.items())
    return source.items if isinstance(value, Generated) else source  # type: ignore[no-any-return]


def admitted(value: Any) -> Any:
    """`value`, new made, once it is paid for."""
    if isinstance(value, str):
        spend(len(value) + PLACE)
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise Stopped(f"makes a number of more than {MAX_BITS} bits")
    elif isinstance(value, (complex, set, frozenset, bytes)):
        raise Stopped(f"makes a {type(value).__name__}, which no template needs")
    else:
        current_budget.get().weight(value)
        spend()
    return value


def text_of(value: Any) -> Any:
    """`value` as `str` prints it; but things without a text are refused, and Markup stays so."""
    from jinja2 import Undefined

    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (int, float, Undefined)):
        return str(value)
    if isinstance(value, (list, tuple, dict, range, *VIEWS)):
        afford(10 * current_budget.get().weight(value))  # "\U0001f600" for an odd character
        text = str(value)
        spend(len(text))
        return text
    raise Stopped(f"prints a {kind_of(value)}, which is no text")


def kind_of(value: object) -> str:
    return type(value).__name__.strip("_").lower()


def items_of(values: Any) -> Iterator[Any]:
    """The items of `values`, and a step for each."""
    from jinja2 import Undefined

    if not isinstance(values, (str, range, Undefined, *LISTS)):
        raise TypeError(f"a {kind_of(values)} has no items to go through")
    units = 2 * PLACE if isinstance(values, str) else 1  # a text has no items before
    items: Any = values
    for value in items:
        spend(units)
        yield value
