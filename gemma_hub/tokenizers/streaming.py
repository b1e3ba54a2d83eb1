"""IncrementalDecoder: the text of a stream of ids, as soon as it is certain."""

import codecs
import re

from gemma_hub.tokenizers.protocol import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


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
        self._held: list[int] = []  # byte tokens that begin a character

    def push(self, token_id: int) -> str:
        """The text that is certain once `token_id` has come; often empty or a whole word.

        Raises:
            TokenizerError: there is no such token.
        """
        if self._skip and token_id in self._tokenizer.special_token_ids:
            return ""
        ids = [*self._held, token_id]
        done = len(ids) - _unfinished(b"".join(map(self._byte, ids)))
        self._held = ids[done:]
        return self._tokenizer.decode(ids[:done])

    def finish(self) -> str:
        """The rest of the text; the decoder is then at the start of the next one."""
        rest, self._held = self._held, []
        return self._tokenizer.decode(rest)

    def _byte(self, token_id: int) -> bytes:
        """The byte that a byte token stands for; a letter for any other token."""
        match = _BYTE_PIECE.fullmatch(self._tokenizer.id_to_token(token_id))
        return bytes.fromhex(match[1]) if match else b"x"


def _unfinished(data: bytes) -> int:
    """Number of last bytes of `data` that begin a character and do not end it."""
    for count in range(min(3, len(data)), 0, -1):
        try:
            _, used = codecs.utf_8_decode(data[-count:], "strict", False)
        except UnicodeDecodeError:
            continue
        if used == 0:
            return count
    return 0
