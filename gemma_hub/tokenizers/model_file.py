"""The SentencePiece model file: its settings, and which of its pieces are not ordinary text.

The sentencepiece package runs a model but does not tell user-defined pieces from others, nor how
the model was trained, so these fields are read here. The file is a protocol buffer
(sentencepiece_model.proto): ModelProto { repeated SentencePiece pieces = 1; TrainerSpec = 2;
NormalizerSpec = 3; ... }, SentencePiece { string piece = 1; float score = 2; Type type = 3; }.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

_VARINT, _64_BIT, _BYTES, _32_BIT = 0, 1, 2, 5
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC, _DENORMALIZER_SPEC = 1, 2, 3, 5
_PIECE_TEXT, _PIECE_TYPE = 1, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35  # of TrainerSpec
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5  # of NormalizerSpec

WITHOUT_PREFIX = bytes([_NORMALIZER_SPEC << 3 | _BYTES, 2, _DUMMY_PREFIX << 3 | _VARINT, 0])
"""Put after a model file, it turns `add_dummy_prefix` off: a message given twice is merged."""


class PieceType(IntEnum):
    """SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """TrainerSpec.ModelType: how texts are cut into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a SentencePiece model says of itself.

    Attributes:
        size: number of pieces.
        marked: {id: (text, type)} of every piece whose type is not NORMAL.
        model_type: how texts are cut.
        byte_fallback: whether unknown characters are spelled by bytes.
        adds_prefix: whether a space is put in front of a text.
        removes_spaces: whether spaces at the ends, and all but one of a run, are dropped.
        keeps_text: whether all characters are left as they are, but for the above.
    """

    size: int
    marked: dict[int, tuple[str, PieceType]]
    model_type: ModelType
    byte_fallback: bool
    adds_prefix: bool
    removes_spaces: bool
    keeps_text: bool


def read_model_file(data: bytes) -> ModelFile:
    """What the content of a tokenizer.model file says.

    Raises:
        ValueError: `data` is not a whole SentencePiece model.
    """
    marked: dict[int, tuple[str, PieceType]] = {}
    specs: dict[int, dict[int, int]] = {}
    token_id = 0
    for field, start, end in _fields(data, 0, len(data)):
        if field != _PIECES:
            specs.setdefault(field, {}).update(_numbers(data, field, start, end))
            continue
        # Nearly all of 256,000 records have no type field, which ends a record where there is one.
        if end - start > 1 and data[end - 2] == _PIECE_TYPE << 3:
            text, kind = _piece(data, start, end)
            if kind != PieceType.NORMAL:
                marked[token_id] = text, kind
        token_id += 1
    if not token_id or not specs.keys() >= {_TRAINER_SPEC, _NORMALIZER_SPEC}:
        raise ValueError("it holds no pieces, or its end is missing")
    trainer, normalizer = specs[_TRAINER_SPEC], specs[_NORMALIZER_SPEC]
    # A length of 0 is an empty rule: the texts stay as they are.
    rules = (normalizer.get(_CHARSMAP), specs.get(_DENORMALIZER_SPEC, {}).get(_CHARSMAP))
    return ModelFile(
        size=token_id,
        marked=marked,
        model_type=ModelType(trainer.get(_MODEL_TYPE, ModelType.UNIGRAM)),
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        adds_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        removes_spaces=bool(normalizer.get(_REMOVE_EXTRA, 1)),
        keeps_text=not any(rules)
        and bool(normalizer.get(_ESCAPE, 1))
        and not trainer.get(_WHITESPACE_AS_SUFFIX, 0),
    )


def _numbers(data: bytes, field: int, start: int, end: int) -> dict[int, int]:
    """{field: number} of a message; for a field that is no number, its size in bytes."""
    if field not in (_TRAINER_SPEC, _NORMALIZER_SPEC, _DENORMALIZER_SPEC):
        return {}
    found = {}
    position = start  # of the field's tag, whose last three bits say what kind of field it is
    for number, a, b in _fields(data, start, end):
        is_number = _varint(data, position)[0] & 7 == _VARINT
        found[number] = _varint(data, a)[0] if is_number else b - a
        position = b
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
