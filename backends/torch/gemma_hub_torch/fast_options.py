"""The options that only this backend has: what `BuildOptions.extra` may hold."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOptions:
    """How a model is run, but for its dtype and device.

    Attributes:
        native: run few rows, norms and gates through C++ that is compiled for this processor; see
            fast_native.py.
        compile: run decoding steps of one row through torch.compile; see fast_compile.py.
    """

    native: bool = False
    compile: bool = False
