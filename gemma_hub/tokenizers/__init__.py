"""Tokenizers: text to ids and back, from SentencePiece."""
