"""Tokenizer: what the rest of gemma_hub asks of a tokenizer."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. An implementation keeps no state between calls.

    Attributes:
        vocab_size: number of ids; they run from 0 to vocab_size - 1.
        bos_token_id: put in front of every text.
        eos_token_id: ends a text.
        pad_token_id: fills rows up; models mask it.
        unk_token_id: stands for text that the vocabulary cannot spell.
        special_token_ids: tokens that mark structure and are no part of a text.
        drops_first_space: whether texts get a space in front, which decoding takes away; not so in
            Gemma.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...
    @property
    def unk_token_id(self) -> int: ...
    @property
    def special_token_ids(self) -> frozenset[int]: ...
    @property
    def drops_first_space(self) -> bool: ...

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True
    ) -> list[int]:
        """Ids of `text`.

        Args:
            text: any Unicode text.
            add_special_tokens: put <bos> in front, and whatever else the tokenizer is set to.
            allow_special: whether text that spells a special token, such as "<end_of_turn>",
                becomes that token. False keeps all of it plain text: use it for what users type.

        Raises:
            TokenizerError: `text` is not a str, or holds a lone surrogate.
        """
        ...

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True, allow_special: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids that `encode` gives, and the span (start, end) of `text` that each comes from.

        Spans count characters (code points), so that `text[start:end]` is the token's text. The
        tokens of one character's bytes all have that character's span, and <bos> has (0, 0).
        """
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; special tokens as they are spelled, or left out.

        Raises:
            TokenizerError: an id is not an integer, or outside the vocabulary.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, in UTF-8. A byte piece is that byte, part of a character."""
        ...

    def token_to_id(self, piece: str) -> int | None:
        """Id of the token spelled `piece` in the vocabulary ("▁" for a space); None if none is."""
        ...

    def id_to_token(self, token_id: int) -> str:
        """How the vocabulary spells a token. Raises TokenizerError outside the vocabulary."""
        ...


@runtime_checkable
class SupportsChat(Protocol):
    """A tokenizer that makes prompts of conversations."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """See `gemma_hub.tokenizers.TokenizerInterface.apply_chat_template`."""
        ...
