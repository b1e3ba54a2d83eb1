"""IncrementalDecoder: the text of a stream of ids, as soon as it is certain."""

import re

from gemma_hub.tokenizers.protocol import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class IncrementalDecoder:
    """Decodes one id at a time. The pieces add up to the tokenizer's `decode` of all the ids.

    Text is held back only while byte tokens make up a character that is not complete, so no piece
    ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        """A decoder at the start of a text.

        Args:
            tokenizer: decodes; shared, never changed.
            skip_special_tokens: leave special tokens out, as `decode` does.
        """
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._held: list[int] = []  # ids of byte tokens
        self._bytes = b""  # and their bytes

    def push(self, token_id: int) -> str:
        """The text that is certain once `token_id` has come; often empty or a whole word.

        Raises:
            TokenizerError: there is no such token.
        """
        if self._skip and token_id in self._tokenizer.special_token_ids:
            return ""
        match = _BYTE_PIECE.fullmatch(self._tokenizer.id_to_token(token_id))
        self._held.append(token_id)
        self._bytes += bytes.fromhex(match[1]) if match else b"."
        kept = _unfinished(self._bytes)
        done = self._held[: len(self._held) - kept]
        self._held = self._held[len(done) :]
        self._bytes = self._bytes[len(done) :]
        return self._tokenizer.decode(done)

    def finish(self) -> str:
        """The rest of the text, and a decoder at the start of the next one."""
        rest = self._tokenizer.decode(self._held)
        self._held, self._bytes = [], b""
        return rest


def _unfinished(data: bytes) -> int:
    """Number of last bytes of `data` that begin a character and do not end it."""
    for count in range(min(3, len(data)), 0, -1):
        try:
            data[-count:].decode("utf-8")
        except UnicodeDecodeError as error:
            # "unexpected end": what is there is right and more must follow.
            if error.start == 0 and error.end == count and error.reason == "unexpected end of data":
                return count
    return 0
