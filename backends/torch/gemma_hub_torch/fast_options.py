"""The options that only this backend has: what `BuildOptions.extra` may hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from gemma_hub.options import read_switches


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOptions:
    """How a model is run, but for its dtype and device.

    Attributes:
        native: multiply few rows by C++ that is compiled for this processor; see fast_native.py.
        compile: run decoding steps of one row through torch.compile; see fast_compile.py.
    """

    native: bool = False
    compile: bool = False

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Self:
        """The options that `extra` names; the others have their defaults.

        Raises:
            InputError: an unknown name, or a value of a wrong type.
        """
        return read_switches(cls, "torch", extra)
