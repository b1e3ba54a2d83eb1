"""The options that only this backend has: what `BuildOptions.extra` may hold."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from gemma_hub.errors import InputError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOptions:
    """How a model is run, but for its dtype and device.

    Attributes:
        pack_weights: bring the weights into a layout for several rows; see fast_linear.py.
        compile: run decoding steps of one row through torch.compile; see fast_compile.py.
    """

    pack_weights: bool = False
    compile: bool = False

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Self:
        """The options that `extra` names; the others have their defaults.

        Raises:
            InputError: an unknown name, a value of a wrong type, or two that exclude one another.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        for name, value in extra.items():
            if name not in known:
                hint = nearest(str(name), known)
                raise InputError(
                    f"The torch backend has no option {name!r}. {hint}{' ' if hint else ''}"
                    f"Known: {', '.join(known)}."
                )
            if type(value) is not bool:
                raise InputError(f"The option {name} is {value!r}; expected True or False.")
        options = cls(**extra)
        if options.pack_weights and options.compile:
            raise InputError(
                "The options pack_weights and compile exclude one another: packed weights are not "
                "compiled. Give compile for one row, pack_weights for several."
            )
        return options
