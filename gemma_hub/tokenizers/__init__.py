"""Tokenizers: text to ids and back, by sentencepiece and by tokenizers, with one result."""

from typing import TYPE_CHECKING, Any

from gemma_hub.tokenizers.batch import BatchEncoding
from gemma_hub.tokenizers.interface import TokenizerInterface
from gemma_hub.tokenizers.opening import open_tokenizer
from gemma_hub.tokenizers.protocol import SupportsChat, Tokenizer
from gemma_hub.tokenizers.sentencepiece import GemmaTokenizer
from gemma_hub.tokenizers.streaming import IncrementalDecoder

if TYPE_CHECKING:
    from gemma_hub.tokenizers.fast import GemmaTokenizerFast

__all__ = [
    "BatchEncoding",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "IncrementalDecoder",
    "SupportsChat",
    "Tokenizer",
    "TokenizerInterface",
    "open_tokenizer",
]


def __getattr__(name: str) -> Any:
    # The tokenizers package is imported when somebody asks for it.
    if name == "GemmaTokenizerFast":
        from gemma_hub.tokenizers.fast import GemmaTokenizerFast

        return GemmaTokenizerFast
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
