"""Vocabulary: which ids mean what, whatever file they come from."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers.model_file import PieceType

SPACE = "▁"
"""How pieces spell a space: U+2581."""

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""A piece that stands for one byte."""

# A user-defined piece of this shape marks structure ("<start_of_turn>", "<unused7>", "[@BOS@]"),
# except the HTML tags, which are text that Google gave one id each. Runs of newlines, tabs and
# spaces are user-defined too, and are text.
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The pieces of a tokenizer that are not ordinary text.

    Attributes:
        size: number of pieces; their ids run from 0 to size - 1.
        bos: id of the token in front of a text.
        eos: id of the token that ends a text.
        unk: id of what stands for text that no piece spells.
        pad: id of what fills rows up; None where the vocabulary has none.
        special: {spelling: id} of the tokens that mark structure and are no part of a text.
        text_marks: {spelling: id} of user-defined pieces that are text, such as runs of newlines.
            They are found before a text is cut, and never merged with what stands around them.
        bytes: {id: value} of the byte pieces; empty, or all 256.
        drops_first_space: whether a text gets a space in front, which decoding takes away.
    """

    size: int
    bos: int
    eos: int
    unk: int
    pad: int | None
    special: Mapping[str, int]
    text_marks: Mapping[str, int]
    bytes: Mapping[int, int]
    drops_first_space: bool = False


def is_special(text: str, kind: PieceType) -> bool:
    """Whether a piece marks structure and is no part of a text."""
    if kind == PieceType.USER_DEFINED:
        return bool(_MARK.fullmatch(text)) and not _HTML.fullmatch(text)
    return kind in (PieceType.CONTROL, PieceType.UNKNOWN)


def byte_values(pieces: Iterable[tuple[int, str]]) -> dict[int, int]:
    """{id: value} of the byte pieces among `pieces`.

    Raises:
        TokenizerError: there are some, and not one for every byte.
    """
    found = {i: int(m[1], 16) for i, text in pieces if (m := BYTE_PIECE.fullmatch(text))}
    missing = set(range(256)) - set(found.values())
    if found and (missing or len(found) != 256):
        raise TokenizerError(
            f"The vocabulary has {len(found)} byte pieces; expected one for each of the 256 bytes, "
            f"<0x00> to <0xFF>. Missing: {', '.join(f'<0x{b:02X}>' for b in sorted(missing)[:5])}. "
            "Get the file again."
        )
    return found
