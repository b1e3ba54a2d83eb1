"""A function of arrays, compiled once for each set of shapes; see compile_cache.py for the disk."""

from collections.abc import Callable, Hashable
from time import perf_counter
from typing import Any

import jax
import numpy as np

from gemma_hub_flax.compile_cache import CompileCache

_SWITCHES = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_compilation_cache_dir")


class Programs:
    """Like `jax.jit(function)`, with programs that outlive the process.

    A call costs about as much as one of `jax.jit`. Sharded arrays, and JAX's own debugging switches
    and compilation cache, are left to `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], *, donated: tuple[int, ...] = ()) -> None:
        """Programs of `function`.

        Args:
            function: takes a hashable value, which each program is compiled for, and pytrees.
            donated: places of arguments whose memory is used for the result.
        """
        self._jitted = jax.jit(function, static_argnums=0, donate_argnums=donated)
        self._programs: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, static: Hashable, *arguments: Any) -> Any:
        """function(static, *arguments)."""
        leaves, tree = jax.tree.flatten(arguments)
        devices = {device for leaf in leaves for device in _devices(leaf)}
        if len(devices) != 1 or _left_to_jax():
            return self._jitted(static, *arguments)
        key = static, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), *devices
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._compiled(static, arguments, *devices)
        return program(*arguments)

    def _compiled(self, static: Hashable, arguments: tuple[Any, ...], device: jax.Device) -> Any:
        lowered = self._jitted.lower(static, *arguments)
        cache = CompileCache.of(lowered, device)
        program = cache.read()
        if program is None:
            start = perf_counter()
            program = lowered.compile()
            cache.write(program, seconds=perf_counter() - start)
        return program


def _devices(leaf: Any) -> Any:
    return () if isinstance(leaf, np.ndarray | np.generic) else leaf.devices()


def _left_to_jax() -> bool:
    return any(jax.config.values.get(name) for name in _SWITCHES)
