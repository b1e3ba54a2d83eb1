"""GemmaTokenizer: Gemma's SentencePiece vocabulary, with the treatment of special tokens around it.

Ids are those of the sentencepiece package. What it leaves open is decided here: text that spells a
special token (in or out), decoding of special tokens, and errors. See docs/reference/tokenizers.md.
"""

import operator
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import sentencepiece

from gemma_hub.errors import CheckpointNotFoundError, TokenizerError
from gemma_hub.tokenizers.model_file import PieceType, marked_pieces

MODEL_FILE = "tokenizer.model"
SPACE = "▁"
"""How pieces spell a space: U+2581."""

# A user-defined piece of this shape marks structure ("<start_of_turn>", "<unused7>", "[@BOS@]"),
# except the HTML tags, which are text that Google gave one id each. Runs of newlines, tabs and
# spaces are user-defined too, and are text.
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)


class GemmaTokenizer:
    """Text to ids and back. Safe to share between threads: nothing changes after construction.

    Make one with `from_pretrained`. Attributes and methods are those of `Tokenizer`.
    """

    def __init__(self, model: bytes) -> None:
        """A tokenizer from the content of a tokenizer.model file.

        Raises:
            TokenizerError: it is not a whole SentencePiece model, or not one for Gemma.
        """
        if not model:
            raise TokenizerError("The vocabulary file is empty. Get the file again.")
        try:
            marked = marked_pieces(model)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (ValueError, RuntimeError) as error:
            raise TokenizerError(
                f"The vocabulary file is not a whole SentencePiece model: {error}. It should be "
                "the tokenizer.model of a Gemma checkpoint (4 MB for Gemma 1). Get the file again."
            ) from error
        self._check()
        self.special_token_ids = frozenset(
            token_id for token_id, (text, kind) in marked.items() if _is_special(text, kind)
        )
        self._bytes = {i: int(text[3:5], 16) for i, (text, kind) in marked.items()
                       if kind == PieceType.BYTE}  # fmt: skip
        self._byte_ids = {value: token_id for token_id, value in self._bytes.items()}
        self._specials = {marked[i][0]: i for i in self.special_token_ids}
        names = "|".join(map(re.escape, sorted(self._specials, key=len, reverse=True)))
        self._special = re.compile(f"({names})")
        # Looks ahead only, so that it finds overlapping names as well.
        self._special_start = re.compile(f"(?={names})" + (f"|{SPACE}" if self._bytes else ""))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """The tokenizer of a checkpoint folder, or of a tokenizer.model file.

        Raises:
            CheckpointNotFoundError: there is no such file.
            TokenizerError: the file is not a SentencePiece vocabulary for Gemma.
        """
        path = Path(source).expanduser()
        path = path / MODEL_FILE if path.is_dir() else path
        if not path.is_file():
            fast = path.with_name("tokenizer.json")
            hint = f"There is a {fast.name}, which this version does not read. " * fast.is_file()
            raise CheckpointNotFoundError(
                f"There is no vocabulary at {path}. {hint}Copy the checkpoint's {MODEL_FILE} there."
            )
        try:
            return cls(path.read_bytes())
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    # -- the vocabulary ------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return int(self._processor.get_piece_size())

    @property
    def bos_token_id(self) -> int:
        return int(self._processor.bos_id())

    @property
    def eos_token_id(self) -> int:
        return int(self._processor.eos_id())

    @property
    def pad_token_id(self) -> int:
        """The vocabulary's <pad>; without one <eos>, since models mask padding anyway."""
        pad = int(self._processor.pad_id())
        return self.eos_token_id if pad < 0 else pad

    @property
    def unk_token_id(self) -> int:
        return int(self._processor.unk_id())

    def token_to_id(self, piece: str) -> int | None:
        token_id = int(self._processor.piece_to_id(piece))
        return token_id if self._processor.id_to_piece(token_id) == piece else None

    def id_to_token(self, token_id: int) -> str:
        return str(self._processor.id_to_piece(self._checked(token_id)))

    # -- text to ids ---------------------------------------------------------------------------

    def encode(
        self, text: str, add_special_tokens: bool = True, allow_special: bool = True
    ) -> list[int]:
        """Ids of `text`; see `Tokenizer.encode`.

        With `allow_special` the ids are those of Transformers. Without it none of
        `special_token_ids` comes out, and decoding gives back exactly `text`, also where it holds
        "▁", which otherwise is one with the space.
        """
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self._parts(text, allow_special):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._processor.encode(part)
        return ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True, allow_special: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text`, and where in it each comes from; see `Tokenizer.encode_with_offsets`.

        Raises:
            TokenizerError: as `encode`; or the vocabulary changes the text, so that its tokens
                have no place in it.
        """
        ids, spans = ([self.bos_token_id], [(0, 0)]) if add_special_tokens else ([], [])
        place, used = 0, 0  # a character of `text`, and how many of its bytes have a token already
        for token_id, piece in self._pieces(text, allow_special):
            is_byte = token_id in self._bytes
            end = place + (1 if is_byte else len(piece))
            surface = text[place:end]
            if not surface or (not is_byte and piece != surface.replace(" ", SPACE)):
                raise _changed(f"The token {piece!r} is not in the text at {place}: {surface!r} is")
            ids.append(token_id)
            spans.append((place, end))
            used = used + 1 if is_byte else 0
            if not is_byte or used == len(surface.encode("utf-8")):
                place, used = end, 0
        if place != len(text):
            raise _changed(f"No token spells the text from {place} on, {text[place:]!r}")
        return ids, spans

    def _pieces(self, text: str, allow_special: bool) -> Iterator[tuple[int, str]]:
        """(id, piece) of each token; the piece of unknown text is that text."""
        for part in self._parts(text, allow_special):
            if isinstance(part, int):
                yield part, self.id_to_token(part)
            elif part:
                pieces = self._processor.encode(part, out_type=str)
                yield from zip(self._processor.encode(part), pieces, strict=True)

    def _parts(self, text: str, allow_special: bool) -> Iterator[str | int]:
        """Ids that are settled, and the texts between them."""
        _check_text(text)
        return self._with_specials(text) if allow_special else self._plain(text)

    def _with_specials(self, text: str) -> Iterator[str | int]:
        """`text` in parts: special tokens as ids, and the text between them."""
        for part in self._special.split(text):
            yield self._specials.get(part, part)

    def _plain(self, text: str) -> Iterator[str | int]:
        """`text` in parts that spell no special token, each cut after its first character."""
        start = 0
        for match in self._special_start.finditer(text):
            cut = match.start()
            if text[cut] == SPACE:
                yield text[start:cut]
                yield from (self._byte_ids[byte] for byte in SPACE.encode("utf-8"))
            else:
                yield text[start : cut + 1]
            start = cut + 1
        yield text[start:]

    # -- ids to text ---------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; see `Tokenizer.decode`.

        Byte tokens that do not make up a character become U+FFFD, one for each byte.
        """
        checked = [self._checked(token_id) for token_id in ids]
        if skip_special_tokens:
            checked = [token_id for token_id in checked if token_id not in self.special_token_ids]
        return _utf8(b"".join(map(self._spelled, checked)))

    def _spelled(self, token_id: int) -> bytes:
        if token_id in self._bytes:
            return bytes([self._bytes[token_id]])
        piece = self._processor.id_to_piece(token_id)
        return bytes(piece.replace(SPACE, " "), "utf-8")

    # -- checks --------------------------------------------------------------------------------

    def _check(self) -> None:
        lacking = [n for n in ("bos", "eos", "unk") if getattr(self._processor, f"{n}_id")() < 0]
        if lacking:
            raise TokenizerError(
                f"The vocabulary has no {' and no '.join(f'<{name}>' for name in lacking)}. Gemma "
                "needs them: train it with bos_id=2, eos_id=1 and unk_id=3."
            )
        if self._processor.normalize("x") != "x":
            raise TokenizerError(
                f"The vocabulary turns 'x' into {self._processor.normalize('x')!r} before it "
                "looks pieces up; Gemma's has add_dummy_prefix=false and keeps text as it is. "
                "This is another model's vocabulary; use the tokenizer.model of a Gemma checkpoint."
            )

    def _checked(self, token_id: int) -> int:
        try:
            value = operator.index(token_id)
        except TypeError:
            raise TokenizerError(
                f"A token id is {token_id!r}; expected an integer. For a batch, decode row by row."
            ) from None
        if not 0 <= value < self.vocab_size:
            raise TokenizerError(
                f"There is no token {value}; this vocabulary has ids 0 to {self.vocab_size - 1}. "
                "Use the tokenizer of the model that made the ids."
            )
        return value


def _is_special(text: str, kind: PieceType) -> bool:
    if kind == PieceType.USER_DEFINED:
        return bool(_MARK.fullmatch(text)) and not _HTML.fullmatch(text)
    return kind in (PieceType.CONTROL, PieceType.UNKNOWN)


def _changed(fault: str) -> TokenizerError:
    return TokenizerError(
        f"{fault}. This vocabulary changes texts, which Gemma's does not. Use encode."
    )


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"The text is a {type(text).__name__}; expected a str.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"Character {error.start} of the text is the lone surrogate "
            f"U+{ord(text[error.start]):04X}, which is no character. Replace such with "
            "text.encode('utf-8', 'replace').decode('utf-8'), or read the file as UTF-8."
        ) from error


def _utf8(data: bytes) -> str:
    """Text of `data`, with U+FFFD for each byte that is part of no character.

    As sentencepiece has it; Python's own errors="replace" merges some of them.
    """
    text = []
    while True:
        try:
            text.append(data.decode("utf-8"))
            return "".join(text)
        except UnicodeDecodeError as error:
            text.append(data[: error.start].decode("utf-8") + "\ufffd")
            data = data[error.start + 1 :]
