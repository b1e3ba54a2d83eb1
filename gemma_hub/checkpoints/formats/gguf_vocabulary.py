"""A vocabulary as a SentencePiece model file, and as the key-values of a GGUF.

A GGUF of a Gemma holds the pieces, scores and types of its tokenizer.model and the few settings
that llama.cpp follows, all of which a SentencePiece model can be made of again. The fields of that
file, a protocol buffer, are those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.checkpoints.formats.gguf_file import Value

_KEY = "tokenizer.ggml."
_VARINT, _64_BIT, _BYTES, _32_BIT = 0, 1, 2, 5
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
_TYPES = range(1, 7)
_BPE = 2
# Numbers of fields: of the model, of a piece, of TrainerSpec and of NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_IDS = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47), "padding": (43, 48)}
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 1, 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class PieceTable:
    """What a GGUF says of a vocabulary.

    Attributes:
        texts: of the pieces, in UTF-8.
        scores: a higher one is merged first.
        types: as in SentencePiece.Type.
        adds_prefix: whether a space is put in front of a text.
        removes_spaces: whether spaces at the ends, and all but one of a run, are dropped.
    """

    texts: Sequence[bytes]
    scores: Sequence[float] | np.ndarray
    types: Sequence[int] | np.ndarray
    adds_prefix: bool
    removes_spaces: bool


# -- from a model file to a GGUF -------------------------------------------------------------------


def read_pieces(model: bytes) -> PieceTable:
    """The vocabulary in the content of a tokenizer.model file.

    Raises:
        ValueError: it is no SentencePiece model, or one that llama.cpp would not follow.
    """
    texts: list[bytes] = []
    scores: list[float] = []
    types: list[int] = []
    specs: dict[int, dict[int, bytes | int]] = {}
    for field, content in _fields(model):
        if field == _PIECES and isinstance(content, bytes):
            piece = dict(_fields(content))
            text, score = piece.get(_TEXT, b""), piece.get(_SCORE, b"\0\0\0\0")
            kind = piece.get(_TYPE, _NORMAL)
            if not (isinstance(text, bytes) and isinstance(score, bytes) and kind in _TYPES):
                raise ValueError(f"its piece {len(texts)} is not one")
            texts.append(text)
            scores.append(struct.unpack("<f", score)[0])
            types.append(int(kind))
        elif field in (_TRAINER, _NORMALIZER, _DENORMALIZER) and isinstance(content, bytes):
            specs.setdefault(field, {}).update(_fields(content))
    if not texts or not specs.keys() >= {_TRAINER, _NORMALIZER}:
        raise ValueError("it holds no pieces, or its end is missing")
    trainer, normalizer = specs[_TRAINER], specs[_NORMALIZER]
    if trainer.get(_MODEL_TYPE, 1) != _BPE:
        raise ValueError("its pieces are not put together by merges (BPE)")
    denormalizer = specs.get(_DENORMALIZER, {})
    if normalizer.get(_CHARSMAP) or denormalizer.get(_CHARSMAP):
        raise ValueError("it changes characters, which a GGUF cannot say")
    if not normalizer.get(_ESCAPE, 1) or trainer.get(_WHITESPACE_AS_SUFFIX):
        raise ValueError("it treats spaces in a way that a GGUF cannot say")
    return PieceTable(
        texts=texts,
        scores=scores,
        types=types,
        adds_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        removes_spaces=bool(normalizer.get(_REMOVE_EXTRA, 1)),
    )


def padded(table: PieceTable, size: int) -> PieceTable:
    """The table with an unused piece for every row of the embedding, as llama.cpp needs them."""
    rest = range(len(table.texts), size)
    return PieceTable(
        texts=[*table.texts, *(_padding(i) for i in rest)],
        scores=[*table.scores, *(-1000.0 for _ in rest)],
        types=[*table.types, *(_UNUSED for _ in rest)],
        adds_prefix=table.adds_prefix,
        removes_spaces=table.removes_spaces,
    )


def unknown_id(table: PieceTable) -> int | None:
    """The id of the piece for what no other piece spells."""
    return next((i for i, kind in enumerate(table.types) if kind == _UNKNOWN), None)


def _padding(i: int) -> bytes:
    return b"[PAD%d]" % i


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, content) of each field of a message: an integer, or bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind, size = tag & 7, {_64_BIT: 8, _32_BIT: 4}.get(tag & 7, 0)
        if kind == _VARINT:
            number, position = _varint(data, position)
            yield tag >> 3, number
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif not size:
            raise ValueError(f"byte {position} starts no field of a SentencePiece model")
        if position + size > len(data):
            raise ValueError(f"it ends inside the field at byte {position}")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A base-128 number and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"it ends inside a number at byte {position}")


# -- from a GGUF to a model file -------------------------------------------------------------------


def vocabulary_model(metadata: Mapping[str, Value]) -> bytes | None:
    """The content of a tokenizer.model that encodes as the vocabulary of a GGUF does.

    Returns:
        None where the GGUF has no vocabulary, or one of another kind than Gemma's.
    """
    table = _table(metadata)
    if table is None:
        return None
    scores = np.asarray(table.scores, "<f4").tobytes()
    types = np.asarray(table.types).tolist()
    parts: list[bytes] = []
    for i, (text, kind) in enumerate(zip(table.texts, types, strict=True)):
        piece = _bytes(_TEXT, text) + _SCORE_TAG + scores[4 * i : 4 * i + 4]
        if kind != _NORMAL:
            piece += _integer(_TYPE, kind)
        parts.append(_bytes(_PIECES, piece))
    parts.append(_bytes(_TRAINER, _trainer(metadata, table)))
    normalizer = _bytes(_NAME, b"identity") + _bytes(_CHARSMAP, b"")
    normalizer += _integer(_DUMMY_PREFIX, table.adds_prefix)
    normalizer += _integer(_REMOVE_EXTRA, table.removes_spaces) + _integer(_ESCAPE, 1)
    parts.append(_bytes(_NORMALIZER, normalizer))
    return b"".join(parts)


def _table(metadata: Mapping[str, Value]) -> PieceTable | None:
    texts, scores, types = (
        metadata.get(_KEY + name) for name in ("tokens", "scores", "token_type")
    )
    if metadata.get(_KEY + "model") != "llama" or not isinstance(texts, list) or not texts:
        return None
    if not isinstance(scores, np.ndarray) or not isinstance(types, np.ndarray):
        return None
    fits = len(scores) == len(types) == len(texts) and types.dtype.kind in "iu"
    if not fits or not ((types >= _TYPES[0]) & (types <= _TYPES[-1])).all():
        return None
    size = len(texts)
    while size and types[size - 1] == _UNUSED and texts[size - 1] == _padding(size - 1):
        size -= 1
    return PieceTable(
        texts=texts[:size],
        scores=scores[:size],
        types=types[:size],
        adds_prefix=metadata.get(_KEY + "add_space_prefix", True) is True,
        removes_spaces=metadata.get(_KEY + "remove_extra_whitespaces", False) is True,
    )


def _trainer(metadata: Mapping[str, Value], table: PieceTable) -> bytes:
    """The TrainerSpec: what sentencepiece needs of it to encode."""
    spec = _integer(_MODEL_TYPE, _BPE)
    if _BYTE in table.types:
        spec += _integer(_BYTE_FALLBACK, 1)
    for name, (id_field, text_field) in _IDS.items():
        given = metadata.get(f"{_KEY}{name}_token_id")
        if name == "unknown" and given is None:
            given = unknown_id(table)
        wanted = _UNKNOWN if name == "unknown" else _CONTROL
        # sentencepiece finds such a piece by its text, and takes it only if its type is right.
        known = type(given) is int and 0 <= given < len(table.texts)
        if known and table.types[given] == wanted:  # type: ignore[index]
            spec += _integer(id_field, given) + _bytes(text_field, table.texts[given])  # type: ignore[arg-type,index]
        elif name != "unknown":
            spec += _integer(id_field, 2**64 - 1)  # -1: there is none
    return spec


def _number(value: int) -> bytes:
    if value < 128:
        return _SHORT[value]
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


_SHORT = [bytes([n]) for n in range(128)]
_SCORE_TAG = bytes([_SCORE << 3 | _32_BIT])


def _integer(field: int, value: int) -> bytes:
    return _number(field << 3 | _VARINT) + _number(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _number(field << 3 | _BYTES) + _number(len(content)) + content
