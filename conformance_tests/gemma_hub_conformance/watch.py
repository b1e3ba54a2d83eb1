"""What code changes of its process, and prints; the modules of others that it imports aside."""

import os
import sys
from collections.abc import Callable, Collection
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, Protocol

from gemma_hub_conformance.process_state import changes, snapshot


class Text(Protocol):
    """What is printed."""

    def since_last(self) -> str:
        """What was printed since the last call."""
        ...


class Watch:
    """Watches this process from now on.

    What importing somebody else's module changes or prints is not held against the code that
    imports it: torch sets variables and filters of warnings, some of them when a first model is
    built.

    Attributes:
        changes: what was changed, in words.
        printed: what was printed, in words.
    """

    def __init__(self, packages: Collection[str], text: Text) -> None:
        """Watch.

        Args:
            packages: top-level names of the packages whose imports are part of what is watched.
            text: what is printed.
        """
        self.changes: list[str] = []
        self.printed: list[str] = []
        self._packages = packages
        self._text = text
        self._said = ""
        self._importing = False
        self._variables: dict[str, tuple[str | None, int]] = {}
        sys.addaudithook(self._audit)
        sys.meta_path.insert(0, self)
        text.since_last()
        self._state = snapshot()

    def after(self, stage: str) -> None:
        """Note what was changed and printed since the last stage."""
        now = snapshot()
        found = changes(self._state, now) + self._changed_variables()
        self.changes += [f"{stage} changed {each}" for each in found]
        self._state = now
        said, self._said = self._said + self._text.since_last(), ""
        if said:
            self.printed.append(f"{stage} printed {said!r}")

    def _audit(self, event: str, values: tuple[Any, ...]) -> None:
        """Note that a variable of the environment is set or removed, and what it was.

        Who loaded the backend before this process began may have left it as it will be, so that its
        value alone would show nothing.
        """
        if event in ("os.putenv", "os.unsetenv") and not self._importing:
            name = os.fsdecode(values[0])
            first, count = self._variables.get(name, (os.environ.get(name), 0))
            self._variables[name] = first, count + 1

    def _changed_variables(self) -> list[str]:
        """The variables that were not put back, in words."""
        variables, self._variables = self._variables, {}
        return [
            f"os.environ[{name!r}] from {first!r} to {os.environ.get(name)!r}"
            for name, (first, count) in variables.items()
            if count == 1 or os.environ.get(name) != first
        ]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Python's own answer, so made that importing it is noticed."""
        if name.partition(".")[0] in self._packages:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None and not isinstance(spec.loader, type):
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self._forgive(execute, module)  # type: ignore[method-assign]
        return spec

    def _forgive(self, execute: Callable[[Any], None], module: Any) -> None:
        """Run `execute(module)`; what it changes counts as having been so."""
        if self._importing:  # by another import, which counts as a whole
            execute(module)
            return
        self._importing = True
        self._said += self._text.since_last()
        before = snapshot()
        try:
            execute(module)
        finally:
            now = snapshot()
            for what in before.keys() | now.keys():
                # What was changed already before the import stays a change.
                is_as_it_was = self._state.get(what) == before.get(what)
                if is_as_it_was and before.get(what) != now.get(what):
                    self._state.pop(what, None)
                    if what in now:
                        self._state[what] = now[what]
            self._text.since_last()
            self._importing = False
