"""A module's parameters, taken out of it at every call without walking through it at every call.

`nnx.split` walks the whole tree in Python, which takes longer than a small model's matrices. Flax
only: a module of torch is called as it is.
"""

from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter, is_
from typing import Any

import jax
from flax import nnx
from jax import Array


class Structure:
    """All of a module but its arrays; equal to itself only, so that looking it up costs nothing.

    Attributes:
        graphdef: what `nnx.merge` needs beside the state.
        treedef: how the arrays become that state.
    """

    def __init__(self, graphdef: Any, treedef: Any) -> None:
        self.graphdef, self.treedef = graphdef, treedef

    def state(self, leaves: list[Array]) -> nnx.State:
        """The arrays, or their gradients, as a state."""
        state: nnx.State = jax.tree.unflatten(self.treedef, leaves)
        return state

    def module(self, leaves: list[Array]) -> Any:
        """A module with these arrays."""
        return nnx.merge(self.graphdef, self.state(leaves))


# What a variable holds, whatever it is; `get_value` looks at it first, five times slower.
_value: Callable[[Any], Any] = getattr(nnx.Variable, "get_raw_value", attrgetter("raw_value"))

# One for all models of the same shape, so that they share what was compiled.
_structure: Callable[[Any, Any], Structure] = lru_cache(maxsize=256)(Structure)


class ModuleState:
    """The structure and the arrays of a module as they are now.

    Arrays that a training step puts into the module's variables are seen at once. A submodule, a
    variable or a plain attribute that is replaced anywhere in the module is noticed too, and then
    the module is split anew.
    """

    def __init__(self, module: nnx.Module) -> None:
        self._module = module
        self._split()

    def __call__(self) -> tuple[Structure, list[Array]]:
        """The structure, and the arrays in its order."""
        if not all(_same(now, then) for now, then in self._seen):
            self._split()
        leaves = [_value(variable) for variable in self._variables]
        if leaves and all(isinstance(leaf, Array) for leaf in leaves):
            return self._structure, leaves
        return self._split()

    def _split(self) -> tuple[Structure, list[Array]]:
        graphdef, state = nnx.split(self._module)
        leaves, treedef = jax.tree.flatten(state)
        self._structure = _structure(graphdef, treedef)
        nodes = [node for _, node in nnx.iter_graph(self._module)]
        self._seen = [
            (vars(node), tuple(vars(node).values()))
            for node in nodes
            if isinstance(node, nnx.Pytree) and not isinstance(node, nnx.Variable)
        ]
        owners = {id(_value(each)): each for each in nodes if isinstance(each, nnx.Variable)}
        # Empty where a leaf is no variable's own value: then every call splits.
        found = [owners.get(id(leaf)) for leaf in leaves]
        self._variables: list[Any] = found if all(each is not None for each in found) else []
        return self._structure, leaves


def _same(now: dict[str, Any], then: tuple[Any, ...]) -> bool:
    return len(now) == len(then) and all(map(is_, now.values(), then))
