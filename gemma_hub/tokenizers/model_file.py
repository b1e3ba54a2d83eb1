"""The SentencePiece model file: its settings, and which of its pieces are not ordinary text.

The sentencepiece package runs a model but does not tell user-defined pieces from others, nor how
the model was trained, so these fields are read here. The file is a protocol buffer
(sentencepiece_model.proto): ModelProto { repeated SentencePiece pieces = 1; TrainerSpec = 2;
NormalizerSpec = 3; ... }, SentencePiece { string piece = 1; float score = 2; Type type = 3; }.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

_VARINT, _64_BIT, _BYTES, _32_BIT = 0, 1, 2, 5
# Tags: a field's number and, in the last three bits, its kind. A number with another kind is
# another field, which is skipped, here as in the protobuf library.
_PIECE, _TRAINER_SPEC, _NORMALIZER_SPEC, _DENORMALIZER_SPEC = (
    number << 3 | _BYTES for number in (1, 2, 3, 5)
)
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1 << 3 | _BYTES, 2 << 3 | _32_BIT, 3 << 3 | _VARINT
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = (  # of TrainerSpec
    number << 3 | _VARINT for number in (3, 24, 35)
)
_CHARSMAP = 2 << 3 | _BYTES  # of NormalizerSpec
_DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = (number << 3 | _VARINT for number in (3, 4, 5))

# {first bytes of the record of a short text and a score, and nothing else: where the score is}
_SCORE_AT = {bytes([_PIECE, n + 7, _PIECE_TEXT, n]): n + 4 for n in range(1, 121)}
_SCORE = bytes([_PIECE_SCORE])

WITHOUT_PREFIX = bytes([_NORMALIZER_SPEC, 2, _DUMMY_PREFIX, 0])
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
        spells_out: whether all characters of NORMAL pieces are NORMAL pieces themselves.
        model_type: how texts are cut.
        byte_fallback: whether unknown characters are spelled by bytes.
        adds_prefix: whether a space is put in front of a text.
        removes_spaces: whether spaces at the ends, and all but one of a run, are dropped.
        keeps_text: whether all characters are left as they are, but for the above.
    """

    size: int
    marked: dict[int, tuple[str, PieceType]]
    spells_out: bool
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
    ordinary: list[bytes] = []
    specs: dict[int, dict[int, int]] = {}
    position = 0
    while position < len(data):
        # Nearly all of 256,000 records are a short text and a score, and nothing else.
        score = position + _SCORE_AT.get(data[position : position + 4], 0)
        if score > position and data[score : score + 1] == _SCORE:
            ordinary.append(data[position + 4 : score])
            position = score + 5
            continue
        tag, start, position = next(_fields(data, position, len(data)))
        if tag == _PIECE:
            text, kind = _piece(data, start, position)
            if kind == PieceType.NORMAL:
                ordinary.append(text.encode("utf-8"))
            else:
                marked[len(ordinary) + len(marked)] = text, kind
        elif tag in (_TRAINER_SPEC, _NORMALIZER_SPEC, _DENORMALIZER_SPEC):
            specs.setdefault(tag, {}).update(_numbers(data, start, position))
    size = len(ordinary) + len(marked)
    if position > len(data) or not size or not specs.keys() >= {_TRAINER_SPEC, _NORMALIZER_SPEC}:
        raise ValueError("it holds no pieces, or its end is missing")
    trainer, normalizer = specs[_TRAINER_SPEC], specs[_NORMALIZER_SPEC]
    # A length of 0 is an empty rule: the texts stay as they are.
    rules = (normalizer.get(_CHARSMAP), specs.get(_DENORMALIZER_SPEC, {}).get(_CHARSMAP))
    return ModelFile(
        size=size,
        marked=marked,
        spells_out=_spells_out(ordinary),
        model_type=ModelType(trainer.get(_MODEL_TYPE, ModelType.UNIGRAM)),
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        adds_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        removes_spaces=bool(normalizer.get(_REMOVE_EXTRA, 1)),
        keeps_text=not any(rules)
        and bool(normalizer.get(_ESCAPE, 1))
        and not trainer.get(_WHITESPACE_AS_SUFFIX, 0),
    )


def _spells_out(ordinary: Sequence[bytes]) -> bool:
    """See ModelFile. Raises ValueError if a piece is not UTF-8."""
    characters = set("▁".encode().join(ordinary).decode("utf-8"))  # every vocabulary has "▁"
    return characters <= {text.decode("utf-8") for text in ordinary if len(text) <= 4}


def _numbers(data: bytes, start: int, end: int) -> dict[int, int]:
    """{tag: number} of a message; for a field that is no number, its size in bytes."""
    return {
        tag: _varint(data, a)[0] if tag & 7 == _VARINT else b - a
        for tag, a, b in _fields(data, start, end)
    }


def _piece(data: bytes, start: int, end: int) -> tuple[str, PieceType]:
    text, kind = "", PieceType.NORMAL
    for tag, a, b in _fields(data, start, end):
        if tag == _PIECE_TEXT:
            text = data[a:b].decode("utf-8")
        elif tag == _PIECE_TYPE:
            kind = PieceType(_varint(data, a)[0])
    return text, kind


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(tag, start, end) of each field's content in data[position:end]."""
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
        yield tag, start, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A base-128 number and the position after it."""
    if position < len(data) and data[position] < 0x80:
        return data[position], position + 1
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
