"""Engine: what cuts ordinary text into pieces. Two libraries do it, and never disagree.

An engine sees no special tokens and adds none; `text.py` deals with them around it. It keeps no
state between calls and may be shared between threads.
"""

from collections.abc import Sequence
from typing import Protocol

Span = tuple[int, int]
"""(start, end) in characters (code points) of a text."""


class Engine(Protocol):
    """Pieces of ordinary text.

    Attributes:
        library: the package that does it, "sentencepiece" or "tokenizers".
    """

    library: str

    def pieces(self) -> list[str]:
        """Every piece, by id."""
        ...

    def piece(self, token_id: int) -> str:
        """The piece of an id that exists."""
        ...

    def id(self, piece: str) -> int | None:
        """The id of a piece; None if there is no such piece."""
        ...

    def encode(self, texts: Sequence[str], at_start: bool) -> list[list[int]]:
        """Ids of each of several texts.

        Args:
            texts: without special tokens.
            at_start: whether nothing stands before them, which makes a difference for vocabularies
                that put a space in front of a text.
        """
        ...

    def encode_with_spans(self, text: str, at_start: bool) -> tuple[list[int], list[Span]]:
        """The ids of one text, and the characters of it that each comes from.

        Byte pieces of one character all have that character's span.
        """
        ...
