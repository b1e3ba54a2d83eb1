"""A vocabulary as a SentencePiece model file, and as the key-values of a GGUF.

A GGUF of a Gemma holds the pieces, scores and types of its tokenizer.model and the few settings
that llama.cpp follows, all of which a SentencePiece model can be made of again. The fields of that
file, a protocol buffer, are those of sentencepiece_model.proto.

llama.cpp looks for user-defined pieces in a text as it stands, and prints them as they are. So a
GGUF has their spaces as spaces, and those of all other pieces as U+2581, like the model file.
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.checkpoints.formats.gguf_file import Value

_KEY = "tokenizer.ggml."
_VARINT, _64_BIT, _BYTES, _32_BIT = 0, 1, 2, 5
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_TYPES = range(1, 7)
_BPE = 2
# Numbers of fields: of the model, of a piece, of TrainerSpec and of NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_IDS = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47), "padding": (43, 48)}
_PIECES_OF_IDS = {"unknown": b"<unk>", "bos": b"<bos>", "eos": b"<eos>", "padding": b"<pad>"}
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 1, 2, 3, 4, 5

_SPACE = "\u2581".encode()
_ADDED_SCORE = -1000.0  # what llama.cpp's converter gives to pieces of tokenizer_config.json
# Gemma's user-defined pieces: marks, tags, and runs of newlines, tabs and spaces.
_MARK = re.compile(rb"<[^<>\s]+>|\[[^\[\]\s]+\]|\n+|\t+|(?:%b){2,}" % _SPACE)


@dataclass(frozen=True, slots=True)
class PieceTable:
    """What a GGUF says of a vocabulary.

    Attributes:
        texts: of the pieces, in UTF-8, as a GGUF has them.
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
            text, score, kind = _piece(content, f"its piece {len(texts)}")
            texts.append(text)
            scores.append(score)
            types.append(kind)
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


def _piece(content: bytes, what: str) -> tuple[bytes, float, int]:
    """The text of a piece as a GGUF has it, its score and its type."""
    fields = dict(_fields(content))
    text, score = fields.get(_TEXT, b""), fields.get(_SCORE, b"\0\0\0\0")
    kind = fields.get(_TYPE, _NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError(f"{what} is not one")
    if kind not in _TYPES:
        raise ValueError(f"{what} is of no known type")
    if kind == _USER_DEFINED:
        if b" " in text:
            raise ValueError(f"{what} has a plain space")
        text = text.replace(_SPACE, b" ")
    return text, struct.unpack("<f", score)[0], int(kind)


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
    ids = _special_ids(metadata, table)
    types = _model_types(table, ids)
    scores = np.asarray(table.scores, "<f4").tobytes()
    parts: list[bytes] = []
    for i, (text, kind) in enumerate(zip(table.texts, types, strict=True)):
        if kind == _USER_DEFINED:
            text = text.replace(b" ", _SPACE)
        piece = _bytes(_TEXT, text) + _SCORE_TAG + scores[4 * i : 4 * i + 4]
        if kind != _NORMAL:
            piece += _integer(_TYPE, kind)
        parts.append(_bytes(_PIECES, piece))
    parts.append(_bytes(_TRAINER, _trainer(table.texts, types, ids)))
    normalizer = _bytes(_NAME, b"identity") + _bytes(_CHARSMAP, b"")
    normalizer += _integer(_DUMMY_PREFIX, table.adds_prefix)
    normalizer += _integer(_REMOVE_EXTRA, table.removes_spaces) + _integer(_ESCAPE, 1)
    parts.append(_bytes(_NORMALIZER, normalizer))
    return b"".join(parts)


def _table(metadata: Mapping[str, Value]) -> PieceTable | None:
    texts, scores, types = (
        metadata.get(_KEY + name) for name in ("tokens", "scores", "token_type")
    )
    kind = metadata.get(_KEY + "model")
    if not isinstance(kind, str) or kind != "llama" or not isinstance(texts, list) or not texts:
        return None
    if not isinstance(scores, np.ndarray) or not isinstance(types, np.ndarray):
        return None
    fits = len(scores) == len(types) == len(texts)
    if not fits or scores.dtype != np.float32 or types.dtype.kind not in "iu":
        return None
    if not np.isfinite(scores).all() or not np.isin(types, _TYPES).all():
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


def _special_ids(metadata: Mapping[str, Value], table: PieceTable) -> dict[str, int]:
    """{"bos": its id, ...} by the keys of a GGUF, or by the names of Gemma's pieces."""
    ids: dict[str, int] = {}
    for name, text in _PIECES_OF_IDS.items():
        given = metadata.get(f"{_KEY}{name}_token_id")
        if name == "unknown" and unknown_id(table) is not None:
            given = unknown_id(table)
        elif given is None and text in table.texts:
            given = table.texts.index(text)
        if type(given) is int and 0 <= given < len(table.texts):
            ids[name] = given
    return ids


def _model_types(table: PieceTable, ids: Mapping[str, int]) -> list[int]:
    """The types that the pieces have in Gemma's tokenizer.model.

    llama.cpp's converter writes user-defined pieces as normal ones, except those that the model's
    tokenizer_config.json lists: these get a score of their own, and those that look special the
    type of control pieces, "<unk>" included. A control piece cannot be spelled by a text, and a
    normal one is made by merges, so that a model file with these types would read
    "<start_of_turn>" as a few letters.
    """
    types, scores = np.array(table.types), np.asarray(table.scores)
    for i in np.flatnonzero((types == _CONTROL) & (scores == _ADDED_SCORE)).tolist():
        if i not in ids.values():
            types[i] = _USER_DEFINED
    for i in np.flatnonzero((types == _NORMAL) & (scores == 0)).tolist():
        if _MARK.fullmatch(table.texts[i]):
            types[i] = _USER_DEFINED
    if "unknown" in ids and _UNKNOWN not in types:
        types[ids["unknown"]] = _UNKNOWN
    found: list[int] = types.tolist()
    return found


def _trainer(texts: Sequence[bytes], types: Sequence[int], ids: Mapping[str, int]) -> bytes:
    """The TrainerSpec: what sentencepiece needs of it to encode."""
    spec = _integer(_MODEL_TYPE, _BPE)
    if _BYTE in types:
        spec += _integer(_BYTE_FALLBACK, 1)
    for name, (id_field, text_field) in _IDS.items():
        wanted = _UNKNOWN if name == "unknown" else _CONTROL
        # sentencepiece finds such a piece by its text, and takes it only if its type is right.
        if name in ids and types[ids[name]] == wanted:
            spec += _integer(id_field, ids[name]) + _bytes(text_field, texts[ids[name]])
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
