"""The options that only this backend has: what `BuildOptions.extra` may hold."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaxOptions:
    """How a model is run, but for its dtype and device.

    Attributes:
        native: run few rows through C++ that is compiled for this processor; see fast_native.py.
    """

    native: bool = False
