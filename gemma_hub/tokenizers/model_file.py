"""The SentencePiece model file: which of its pieces are not ordinary text.

The sentencepiece package runs a model but does not tell user-defined pieces from others, so the
one field that says it is read here. The file is a protocol buffer (sentencepiece_model.proto):
ModelProto { repeated SentencePiece pieces = 1; TrainerSpec = 2; NormalizerSpec = 3; ... },
SentencePiece { string piece = 1; float score = 2; Type type = 3; }.
"""

from collections.abc import Iterator
from enum import IntEnum

_VARINT, _64_BIT, _BYTES, _32_BIT = 0, 1, 2, 5
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_PIECE_TEXT, _PIECE_TYPE = 1, 3


class PieceType(IntEnum):
    """SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def marked_pieces(data: bytes) -> dict[int, tuple[str, PieceType]]:
    """{id: (text, type)} of every piece whose type is not NORMAL.

    Raises:
        ValueError: `data` is not a whole SentencePiece model.
    """
    found: dict[int, tuple[str, PieceType]] = {}
    present = set()
    token_id = 0
    for field, start, end in _fields(data, 0, len(data)):
        present.add(field)
        if field != _PIECES:
            continue
        # Nearly all of 256,000 records have no type field, which ends a record where there is one.
        if data[end - 2] == _PIECE_TYPE << 3:
            text, kind = _piece(data, start, end)
            if kind != PieceType.NORMAL:
                found[token_id] = text, kind
        token_id += 1
    missing = {_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC} - present
    if missing:
        raise ValueError("it holds no pieces, or its end is missing")
    return found


def _piece(data: bytes, start: int, end: int) -> tuple[str, PieceType]:
    text, kind = "", PieceType.NORMAL
    for field, a, b in _fields(data, start, end):
        if field == _PIECE_TEXT:
            text = data[a:b].decode("utf-8")
        elif field == _PIECE_TYPE:
            kind = PieceType(_varint(data, a)[0])
    return text, kind


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each field's content in data[position:end]."""
    while position < end:
        tag, start = _varint(data, position)
        kind = tag & 7
        if kind == _BYTES:
            size, start = _varint(data, start)
            position = start + size
        elif kind == _VARINT:
            position = _varint(data, start)[1]
        elif kind in (_32_BIT, _64_BIT):
            position = start + (4 if kind == _32_BIT else 8)
        else:
            raise ValueError(f"byte {position} starts no field of a SentencePiece model")
        if position > end:
            raise ValueError(f"it ends inside the field at byte {start}")
        yield tag >> 3, start, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A base-128 number and the position after it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError(f"it ends inside a number at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
