"""The same Gemma, in any framework, with a proof."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_hub.config import GemmaConfig
    from gemma_hub.gemma import Gemma
    from gemma_hub.parity import parity
    from gemma_hub.tokenizers import GemmaTokenizer, GemmaTokenizerFast

    __version__: str

__all__ = [
    "Gemma",
    "GemmaConfig",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "__version__",
    "parity",
]

# PEP 562: a name is imported when it is first used, so that `import gemma_hub` costs nothing.
_HOMES = {
    "Gemma": "gemma_hub.gemma",
    "GemmaConfig": "gemma_hub.config",
    "GemmaTokenizer": "gemma_hub.tokenizers",
    "GemmaTokenizerFast": "gemma_hub.tokenizers",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name == "parity":
        # The package itself: calling it runs the comparison (see its __init__).
        value = import_module("gemma_hub.parity")
    elif name == "__version__":
        value = import_module("importlib.metadata").version("gemma-hub")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
