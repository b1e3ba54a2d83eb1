"""TextCodec: text to ids and back, with special and added tokens, around an engine.

What an engine leaves open is decided here, once for both: text that spells a special token (in or
out), decoding, spans across the seams, and errors. See docs/reference/tokenizers.md.
"""

import codecs
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers.engine import Engine, Span
from gemma_hub.tokenizers.vocabulary import SPACE, Vocabulary

AllowSpecial = bool | Collection[int]
"""Whether text that spells a special token becomes it; or the places at which it does not."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that was added to a vocabulary, or a piece of it that was made special.

    Attributes:
        id: of the token.
        is_special: whether it marks structure; otherwise it is text that always is one token.
    """

    id: int
    is_special: bool


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A part of a text: ids that are settled, or None for what the engine has to cut."""

    start: int
    end: int
    ids: tuple[int, ...] | None = None
    at_start: bool = False


class TextCodec:
    """Immutable, and safe to share between threads."""

    def __init__(
        self, engine: Engine, vocabulary: Vocabulary, added: Mapping[str, AddedToken] | None = None
    ) -> None:
        """A codec.

        Args:
            engine: cuts ordinary text.
            vocabulary: of the same file.
            added: {spelling: token} of tokens beyond the vocabulary's own.
        """
        self.engine = engine
        self.vocabulary = vocabulary
        self.added = dict(added or {})
        self.special = {**vocabulary.special}
        self.special |= {name: token.id for name, token in self.added.items() if token.is_special}
        self.special_ids = frozenset(self.special.values())
        self.size = max([vocabulary.size, *(token.id + 1 for token in self.added.values())])
        self._spelled = {token.id: name for name, token in self.added.items()}
        self._byte_ids = {value: token_id for token_id, value in vocabulary.bytes.items()}
        names = sorted({*self.special, *self.added}, key=len, reverse=True)
        if self._byte_ids:
            names.append(SPACE)
        self._name = re.compile("|".join(map(re.escape, names)))
        self._bytes_of = _BytesOf(self)

    def extended(self, names: Iterable[str], is_special: bool) -> Self:
        """The codec with more tokens; those that the vocabulary has keep their ids.

        Raises:
            TokenizerError: a name is not a str, is empty, or holds a lone surrogate.
        """
        added = dict(self.added)
        size = self.size
        for name in names:
            check_text(name)
            if not name:
                raise TokenizerError("An added token is empty; expected at least one character.")
            token_id = self.id(name) if name not in added else added[name].id
            if token_id is None:
                token_id, size = size, size + 1
            added[name] = AddedToken(token_id, is_special)
        return type(self)(self.engine, self.vocabulary, added)

    def with_added(self, tokens: Mapping[str, AddedToken]) -> Self:
        """The codec with tokens that a file names, ids included.

        Raises:
            TokenizerError: an id is another token's, or two tokens have one.
        """
        added = dict(self.added)
        for name, token in tokens.items():
            if token.id < self.vocabulary.size and self.engine.piece(token.id) != name:
                raise TokenizerError(
                    f"The added token {name!r} has the id {token.id}, which the vocabulary gives "
                    f"to {self.engine.piece(token.id)!r}. The files are of different checkpoints."
                )
            known = self.vocabulary.special if token.is_special else self.vocabulary.text_marks
            if name not in known and name not in self.vocabulary.special:
                added[name] = token
        limit = self.vocabulary.size + len(added)
        far = {name: token.id for name, token in added.items() if token.id >= limit}
        if far:
            raise TokenizerError(
                f"The added tokens {far} have ids out of range; those after the vocabulary's "
                f"{self.vocabulary.size} go on without a gap, to {limit - 1} at most."
            )
        ids = [token.id for token in added.values()]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            names = [name for name, token in added.items() if token.id == twice]
            raise TokenizerError(f"Two added tokens have the id {twice}: {' and '.join(names)}.")
        return type(self)(self.engine, self.vocabulary, added)

    def with_roles(self, roles: Mapping[str, int]) -> Self:
        """The codec with other ids for "bos", "eos", "unk" or "pad"."""
        changes: dict[str, Any] = dict(roles)
        return type(self)(self.engine, replace(self.vocabulary, **changes), self.added)

    # -- the vocabulary ------------------------------------------------------------------------

    def id(self, piece: str) -> int | None:
        """Id of the token spelled `piece` ("▁" for a space); None if there is none.

        Raises:
            TokenizerError: it is not a str, or holds a lone surrogate.
        """
        check_text(piece)
        token = self.added.get(piece)
        return self.engine.id(piece) if token is None else token.id

    def piece(self, token_id: int) -> str:
        """How the vocabulary spells a token.

        Raises:
            TokenizerError: there is no such token.
        """
        checked = self.checked(token_id)
        spelled = self._spelled.get(checked)
        if spelled is None and checked >= self.vocabulary.size:
            raise self._no_such(checked)
        return self.engine.piece(checked) if spelled is None else spelled

    def checked(self, token_id: int) -> int:
        """`token_id` as a plain int.

        Raises:
            TokenizerError: it is no integer, or outside the vocabulary.
        """
        try:
            value = operator.index(token_id)
        except TypeError:
            raise TokenizerError(
                f"A token id is {token_id!r}; expected an integer. For several rows of ids use "
                "batch_decode."
            ) from None
        if not 0 <= value < self.size:
            raise self._no_such(value)
        return value

    def _no_such(self, value: int) -> TokenizerError:
        return TokenizerError(
            f"There is no token {value}; this vocabulary has ids 0 to {self.size - 1}. "
            "Use the tokenizer of the model that made the ids."
        )

    # -- text to ids ---------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], allow_special: AllowSpecial) -> list[list[int]]:
        """Ids of each text, without any in front or at the end.

        Raises:
            TokenizerError: one is not a str, or holds a lone surrogate.
        """
        for text in texts:
            check_text(text)
        if not any(map(self._name.search, texts)):
            return self.engine.encode(texts, at_start=True)
        rows = [list(self._stretches(text, allow_special)) for text in texts]
        # One call of the engine for all texts, since a library may run them in parallel.
        waiting: dict[bool, list[str]] = {True: [], False: []}
        for text, row in zip(texts, rows, strict=True):
            for part in row:
                if part.ids is None:
                    waiting[part.at_start].append(text[part.start : part.end])
        cut = {
            at_start: iter(self.engine.encode(parts, at_start))
            for at_start, parts in waiting.items()
        }
        encoded = []
        for row in rows:
            ids: list[int] = []
            for part in row:
                ids += next(cut[part.at_start]) if part.ids is None else part.ids
            encoded.append(ids)
        return encoded

    def encode_with_spans(
        self, text: str, allow_special: AllowSpecial
    ) -> tuple[list[int], list[Span]]:
        """The ids that `encode` gives for one text, and the characters that each comes from."""
        check_text(text)
        ids: list[int] = []
        spans: list[Span] = []
        for part in self._stretches(text, allow_special):
            if part.ids is not None:
                ids += part.ids
                spans += [(part.start, part.end)] * len(part.ids)
                continue
            cut, places = self.engine.encode_with_spans(text[part.start : part.end], part.at_start)
            ids += cut
            spans += [(start + part.start, end + part.start) for start, end in places]
        return ids, spans

    def _stretches(self, text: str, allow_special: AllowSpecial) -> Iterator[_Stretch]:
        """`text`, which was checked, in parts that follow one another, none of them empty."""
        is_plain = _plain_places(allow_special)
        start = position = 0
        at_start = True  # no text yet: special tokens are none
        while match := self._name.search(text, position):
            cut, position = match.span()
            name = match[0]
            if name == SPACE and not is_plain(cut):
                continue  # it is one with the space, as sentencepiece has it
            ids = self._settled(name, is_plain(cut))
            if ids is None:
                # Cut after its first character the name is no token, and an overlapping one is
                # found from the next character on.
                position = cut + 1
                yield _Stretch(start, position, at_start=at_start)
                at_start = False
            else:
                if cut > start:
                    yield _Stretch(start, cut, at_start=at_start)
                    at_start = False
                yield _Stretch(cut, position, ids)
                at_start = at_start and ids[0] in self.special_ids
            start = position
        if start < len(text):
            yield _Stretch(start, len(text), at_start=at_start)

    def _settled(self, name: str, is_plain: bool) -> tuple[int, ...] | None:
        """The ids of a name that was found in a text; None where it is to stay plain."""
        if name in self.added and name not in self.special:
            return (self.added[name].id,)
        if not is_plain:
            return (self.special[name],)
        if len(name) > 1:
            return None
        # An engine may know one character, however special, as a piece.
        if not self._byte_ids:
            return (self.vocabulary.unk,)
        return tuple(self._byte_ids[byte] for byte in name.encode("utf-8"))

    # -- ids to text ---------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special: bool) -> str:
        """Text of `ids`. Byte tokens that make up no character become U+FFFD, one for each byte.

        Raises:
            TokenizerError: an id is no integer, or outside the vocabulary.
        """
        checked = list(map(self.checked, ids))
        if skip_special:
            checked = [token_id for token_id in checked if token_id not in self.special_ids]
        parts = list(map(self._bytes_of.__getitem__, checked))
        if self.vocabulary.drops_first_space:
            for i, token_id in enumerate(checked):
                if token_id not in self.special_ids:
                    parts[i] = parts[i].removeprefix(b" ")
                    break
        return b"".join(parts).decode("utf-8", REPLACE_EACH_BYTE)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, in UTF-8; a byte piece is that byte."""
        return self._bytes_of[self.checked(token_id)]

    def join(self, pieces: Iterable[str]) -> str:
        """Text of pieces as `piece` spells them; what is no piece stands for itself."""
        ids = ((piece, self.id(piece)) for piece in pieces)
        data = b"".join(
            piece.encode("utf-8") if token_id is None else self._bytes_of[token_id]
            for piece, token_id in ids
        )
        return data.decode("utf-8", REPLACE_EACH_BYTE)


class _BytesOf(dict[int, bytes]):
    """{id: what it stands for}, filled as it is used: all of 256,000 would take a while."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def __missing__(self, token_id: int) -> bytes:
        codec, piece = self._codec, self._codec.piece(token_id)
        if token_id in codec.vocabulary.bytes:
            value = bytes([codec.vocabulary.bytes[token_id]])
        elif piece in codec.added:
            value = piece.encode("utf-8")
        else:
            value = piece.replace(SPACE, " ").encode("utf-8")
        self[token_id] = value
        return value


def _plain_places(allow_special: AllowSpecial) -> Callable[[int], bool]:
    if isinstance(allow_special, bool):
        return lambda place: not allow_special
    return allow_special.__contains__


def check_text(text: str) -> None:
    """Raise a TokenizerError unless `text` is a str without lone surrogates."""
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


REPLACE_EACH_BYTE = "gemma_hub.replace_each_byte"
"""An error handler: U+FFFD for each byte that is part of no character, as sentencepiece has it.

Python's own "replace" merges some of them.
"""


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd", error.start + 1


codecs.register_error(REPLACE_EACH_BYTE, _replace_each_byte)
