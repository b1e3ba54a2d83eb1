"""Which methods of a backend a case calls, and so which mutants it can meet at all.

A mutant overrides a few methods of the reference, of its model or of its backend. A case that calls
none of them on a backend that is right does the same on the mutant, to the bit, and passes.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from gemma_hub_conformance.mutants.bank import Mutant, StandInBackend, StandInModel, control
from gemma_hub_conformance.spec import Subject
from gemma_hub_numpy.model import Reference

Method = tuple[type, str]
"""A class of `BASES` and the name of a method of it."""

BASES: tuple[type, ...] = (Reference, StandInModel, StandInBackend)


def traced(called: set[Method]) -> Subject:
    """A backend that is right and adds every method that is called to `called`."""
    reference, model, backend = (_traced(base, called) for base in BASES)
    subject = control()
    subject.backend = backend(reference, model)
    return subject


def overridden(mutant: Mutant) -> frozenset[Method] | None:
    """The methods that a mutant overrides; None if it overrides something that is no method."""
    base = next(base for base in BASES if issubclass(mutant.kind, base))
    methods = dict(_methods(base))
    found = set()
    for each in mutant.kind.__mro__[: mutant.kind.__mro__.index(base)]:
        for name, member in vars(each).items():
            if name in _OF_EVERY_CLASS or not hasattr(base, name):
                continue  # a name that the base does not have is reached from overridden methods
            if name not in methods or not isinstance(member, FunctionType):
                return None
            found.add((base, name))
    return frozenset(found)


_OF_EVERY_CLASS = {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__"}


def _methods(base: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, function in inspect.getmembers(base):
        if isinstance(function, FunctionType):
            yield name, function


def _traced(base: type, called: set[Method]) -> type:
    """A subclass of `base` that notes each call of a method."""

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def method(*arguments: Any, **named: Any) -> Any:
            called.add((base, name))
            return function(*arguments, **named)

        return method

    members = {name: noting(name, function) for name, function in _methods(base)}
    return type(base.__name__, (base,), members)
