"""The PyTorch backend of gemma_hub, and its model classes.

The classes are imported when they are first used: the plug-in's entry point is a module of this
package and must stay light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_hub_torch.model import (
        GemmaForCausalLM,
        GemmaForSequenceClassification,
        GemmaForTokenClassification,
        GemmaModel,
    )

__all__ = [
    "GemmaForCausalLM",
    "GemmaForSequenceClassification",
    "GemmaForTokenClassification",
    "GemmaModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gemma_hub_torch import model

    return getattr(model, name)
