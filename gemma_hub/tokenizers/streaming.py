"""IncrementalDecoder: the text of a stream of ids, as soon as it is certain."""

import codecs
import copy
from typing import Self

from gemma_hub.tokenizers.protocol import Tokenizer
from gemma_hub.tokenizers.text import REPLACE_EACH_BYTE


class IncrementalDecoder:
    """Decodes one id at a time. The pieces add up to the tokenizer's `decode` of all the ids.

    Text is held back only while byte tokens make up a character that is not complete, so no piece
    ends inside a character. One decoder is for one text, in one thread.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        """A decoder at the start of a text.

        Args:
            tokenizer: decodes; shared, never changed.
            skip_special_tokens: leave special tokens out, as `decode` does.
        """
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._drops_space = False  # until the first token that is text, in some vocabularies
        self._begin()

    def push(self, token_id: int) -> str:
        """The text that is certain once `token_id` has come; often empty or a whole word.

        Raises:
            TokenizerError: there is no such token.
        """
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._tokenizer.special_token_ids:
            if self._skip:
                return ""
        elif self._drops_space:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._decoder.decode(data)

    def copy(self) -> Self:
        """A decoder at the same place of the same text."""
        made = copy.copy(self)
        made._decoder = copy.copy(self._decoder)
        return made

    def finish(self) -> str:
        """The rest of the text; the decoder is then at the start of the next one."""
        rest = self._decoder.decode(b"", final=True)
        self._begin()
        return rest

    def _begin(self) -> None:
        # Python's own decoder holds back the bytes that begin a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")(REPLACE_EACH_BYTE)
        self._drops_space = self._tokenizer.drops_first_space
