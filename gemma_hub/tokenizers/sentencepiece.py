"""GemmaTokenizer: Gemma's SentencePiece vocabulary, run by the sentencepiece package."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import sentencepiece

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers.engine import Engine, Span
from gemma_hub.tokenizers.interface import TokenizerInterface
from gemma_hub.tokenizers.model_file import (
    WITHOUT_PREFIX,
    ModelFile,
    PieceType,
    read_model_file,
)
from gemma_hub.tokenizers.text import AddedToken
from gemma_hub.tokenizers.vocabulary import Vocabulary, byte_values, is_special


class GemmaTokenizer(TokenizerInterface):
    """Text to ids and back, by sentencepiece, from a tokenizer.model file.

    Make one with `from_pretrained`. Its methods are those of `TokenizerInterface`; the results are
    those of `GemmaTokenizerFast`, id by id.
    """

    is_fast: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ("tokenizer.model",)

    @classmethod
    def _open(cls, content: bytes) -> tuple[Engine, Vocabulary, Mapping[str, AddedToken]]:
        engine, vocabulary, _ = open_model(content)
        return engine, vocabulary, {}


class SentencePieceEngine:
    """A SentencePiece model of any type."""

    library = "sentencepiece"

    def __init__(self, model: bytes, file: ModelFile) -> None:
        """Load a model.

        Args:
            model: content of a tokenizer.model file.
            file: what `read_model_file` says of it.

        Raises:
            RuntimeError: sentencepiece does not take it.
        """
        self._starting = self._following = sentencepiece.SentencePieceProcessor(model_proto=model)
        if file.adds_prefix:
            self._following = sentencepiece.SentencePieceProcessor(
                model_proto=model + WITHOUT_PREFIX
            )
        self._keeps_text = file.keeps_text and not file.adds_prefix and not file.removes_spaces
        self._bytes = frozenset(i for i, (_, kind) in file.marked.items() if kind == PieceType.BYTE)

    def pieces(self) -> list[str]:
        return list(self._starting.id_to_piece(list(range(self._starting.get_piece_size()))))

    def scores(self) -> list[float]:
        """The score of every piece, by id; a higher one is merged first."""
        return list(self._starting.get_score(list(range(self._starting.get_piece_size()))))

    def piece(self, token_id: int) -> str:
        return str(self._starting.id_to_piece(token_id))

    def id(self, piece: str) -> int | None:
        token_id = int(self._starting.piece_to_id(piece))
        return token_id if self.piece(token_id) == piece else None

    def encode(self, texts: Sequence[str], at_start: bool) -> list[list[int]]:
        processor = self._starting if at_start else self._following
        return [processor.encode(text) for text in texts]

    def encode_with_spans(self, text: str, at_start: bool) -> tuple[list[int], list[Span]]:
        processor = self._starting if at_start else self._following
        found = processor.encode(text, return_type="offset_mapping")
        ids, spans = found["ids"], list(found["offsets"])
        if self._keeps_text:
            # sentencepiece misplaces pieces where a text has runs of "▁" itself.
            return ids, self._spans(text, ids, found["pieces"])
        # Of a character's byte pieces only the last has a width.
        for i in range(len(ids) - 2, -1, -1):
            if ids[i] in self._bytes and spans[i][0] == spans[i][1]:
                spans[i] = spans[i + 1]
        return ids, spans

    def _spans(self, text: str, ids: Sequence[int], pieces: Sequence[str]) -> list[Span]:
        """Where pieces that spell `text` without a gap are in it."""
        spans = []
        place, used = 0, 0  # a character, and how many of its bytes have a token already
        for token_id, piece in zip(ids, pieces, strict=True):
            if token_id not in self._bytes:
                spans.append((place, place + len(piece)))
                place += len(piece)
                continue
            spans.append((place, place + 1))
            used += 1
            if used == len(text[place].encode("utf-8")):
                place, used = place + 1, 0
        return spans


def model_pieces(content: bytes) -> list[str]:
    """Every piece of a tokenizer.model file, by id.

    Raises:
        TokenizerError: it is not a SentencePiece model.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise _not_a_model(error) from error
    return list(processor.id_to_piece(list(range(processor.get_piece_size()))))


def open_model(content: bytes) -> tuple[SentencePieceEngine, Vocabulary, ModelFile]:
    """The engine and the vocabulary of a tokenizer.model file, and what it says of itself.

    Raises:
        TokenizerError: it is not a whole SentencePiece model, or lacks what Gemma needs.
    """
    try:
        file = read_model_file(content)
        engine = SentencePieceEngine(content, file)
        count = len(engine.pieces())  # an error if one is not UTF-8
        if count != file.size:
            raise ValueError(f"it holds {file.size} pieces, of which {count} can be read")
    except (ValueError, RuntimeError) as error:
        raise _not_a_model(error) from error
    return engine, _vocabulary(engine, file), file


def _not_a_model(error: Exception) -> TokenizerError:
    return TokenizerError(
        f"The vocabulary file is not a whole SentencePiece model: {error}. It should be the "
        "tokenizer.model of a Gemma checkpoint (4 MB for Gemma 1). Get the file again."
    )


def _vocabulary(engine: SentencePieceEngine, file: ModelFile) -> Vocabulary:
    processor = engine._starting
    lacking = [name for name in ("bos", "eos", "unk") if getattr(processor, f"{name}_id")() < 0]
    if lacking:
        raise TokenizerError(
            f"The vocabulary has no {' and no '.join(f'<{name}>' for name in lacking)}. Gemma "
            "needs them: train it with bos_id=2, eos_id=1 and unk_id=3."
        )
    # sentencepiece looks for them after spaces became "▁": it never finds one with a space in it.
    user_defined = {
        text: i
        for i, (text, kind) in file.marked.items()
        if kind == PieceType.USER_DEFINED and " " not in text
    }
    special = {text: i for i, (text, kind) in file.marked.items() if is_special(text, kind)}
    marked_bytes = ((i, t) for i, (t, kind) in file.marked.items() if kind == PieceType.BYTE)
    pad = int(processor.pad_id())
    return Vocabulary(
        size=file.size,
        bos=int(processor.bos_id()),
        eos=int(processor.eos_id()),
        unk=int(processor.unk_id()),
        pad=None if pad < 0 else pad,
        special=special,
        text_marks={text: i for text, i in user_defined.items() if text not in special},
        bytes=byte_values(marked_bytes),
        drops_first_space=file.adds_prefix or file.removes_spaces,
    )
