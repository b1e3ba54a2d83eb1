"""Tokenizers: text to ids and back, from SentencePiece."""

from gemma_hub.tokenizers.protocol import Tokenizer
from gemma_hub.tokenizers.sentencepiece import GemmaTokenizer
from gemma_hub.tokenizers.streaming import IncrementalDecoder

__all__ = ["GemmaTokenizer", "IncrementalDecoder", "Tokenizer"]
