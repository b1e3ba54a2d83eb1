"""GemmaTokenizerFast: Gemma's vocabulary, run by the tokenizers package."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import tokenizers

from gemma_hub.tokenizers.conversion import converted, converts_exactly
from gemma_hub.tokenizers.engine import Engine, Span
from gemma_hub.tokenizers.interface import TokenizerInterface
from gemma_hub.tokenizers.json_file import is_json, open_json
from gemma_hub.tokenizers.sentencepiece import open_model
from gemma_hub.tokenizers.text import AddedToken
from gemma_hub.tokenizers.vocabulary import Vocabulary


class GemmaTokenizerFast(TokenizerInterface):
    """Text to ids and back, by tokenizers, from a tokenizer.json or a tokenizer.model file.

    Make one with `from_pretrained`. Its methods are those of `TokenizerInterface`; the results are
    those of `GemmaTokenizer`, id by id. A tokenizer.model that is not of Gemma's kind (unigram, or
    one that changes texts), which tokenizers cannot run exactly, is run by sentencepiece here too.
    """

    is_fast: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = ("tokenizer.json", "tokenizer.model")

    @classmethod
    def _open(cls, content: bytes) -> tuple[Engine, Vocabulary, Mapping[str, AddedToken]]:
        if is_json(content):
            tokenizer, vocabulary, added = open_json(content)
            return TokenizersEngine(tokenizer), vocabulary, added
        engine, vocabulary, file = open_model(content)
        if not converts_exactly(file, engine.scores()):
            return engine, vocabulary, {}
        return TokenizersEngine(converted(content, file, engine, vocabulary)), vocabulary, {}


class TokenizersEngine:
    """A BPE tokenizer of the tokenizers package."""

    library = "tokenizers"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._size = tokenizer.get_vocab_size(with_added_tokens=False)

    def pieces(self) -> list[str]:
        return list(map(self.piece, range(self._size)))

    def piece(self, token_id: int) -> str:
        return str(self.tokenizer.id_to_token(token_id))

    def id(self, piece: str) -> int | None:
        token_id = self.tokenizer.token_to_id(piece)
        return None if token_id is None else int(token_id)

    def encode(self, texts: Sequence[str], at_start: bool) -> list[list[int]]:
        if len(texts) == 1:
            return [self.tokenizer.encode(texts[0], add_special_tokens=False).ids]
        several: Iterable[tokenizers.Encoding] = self.tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in several]

    def encode_with_spans(self, text: str, at_start: bool) -> tuple[list[int], list[Span]]:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets
