"""TokenizerState: what a tokenizer is made of, how it is made, and how it is changed."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

from gemma_hub.errors import TokenizerError, nearest
from gemma_hub.tokenizers import folder
from gemma_hub.tokenizers.engine import Engine
from gemma_hub.tokenizers.settings import ROLES, TokenizerSettings, spelling
from gemma_hub.tokenizers.text import AddedToken, TextCodec
from gemma_hub.tokenizers.vocabulary import Vocabulary


class _Setting:
    """An attribute of the tokenizer that is a field of its settings."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tokenizer: "TokenizerState", owner: type | None = None) -> Any:
        return getattr(tokenizer.settings, self._name)

    def __set__(self, tokenizer: "TokenizerState", value: Any) -> None:
        with tokenizer._changing:
            tokenizer._set(tokenizer.codec, tokenizer.settings.changed(**{self._name: value}))


class _Role(_Setting):
    """The spelling of the token that has a role, whether the settings or the vocabulary say so."""

    def __get__(self, tokenizer: "TokenizerState", owner: type | None = None) -> str:
        return tokenizer.codec.piece(getattr(tokenizer, f"{self._name}_id"))


class TokenizerState(ABC):
    """A codec and settings. Only setting an attribute and adding tokens change them, in one step.

    Attributes:
        is_fast: whether this is `GemmaTokenizerFast`.
        files: names of the vocabulary files that the class reads, the preferred one first.
        add_bos_token: put <bos> in front of every text; see `TokenizerSettings`, as for the others.
    """

    is_fast: ClassVar[bool]
    files: ClassVar[tuple[str, ...]]

    add_bos_token = _Setting()
    add_eos_token = _Setting()
    padding_side = _Setting()
    truncation_side = _Setting()
    model_max_length = _Setting()
    chat_template = _Setting()
    additional_special_tokens = _Setting()
    bos_token = _Role()
    eos_token = _Role()
    unk_token = _Role()
    pad_token = _Role()

    def __init__(self, file: bytes | str | Path, **settings: Any) -> None:
        """A tokenizer with nothing but a vocabulary; `from_pretrained` reads a whole folder.

        Args:
            file: a vocabulary file, or its content.
            **settings: fields of `TokenizerSettings`, such as add_bos_token or padding_side.

        Raises:
            CheckpointNotFoundError: there is no such file.
            TokenizerError: it is not a vocabulary for Gemma, or a setting is wrong.
        """
        content = file if isinstance(file, bytes) else folder.read(Path(file).expanduser())
        self._restore(content, TokenizerSettings(), {}, **settings)

    @classmethod
    def from_pretrained(cls, source: str | Path, **settings: Any) -> Self:
        """The tokenizer of a checkpoint, or of a vocabulary file.

        Args:
            source: a checkpoint folder, a tokenizer.model or tokenizer.json file, the name of an
                installed checkpoint, or a repository of the Hugging Face hub, `owner/name` or
                `owner/name@revision`.
            **settings: fields of `TokenizerSettings`, instead of those in tokenizer_config.json.

        Raises:
            CheckpointNotFoundError: there is no such file.
            TokenizerError: a file is damaged, or two of them contradict one another.
        """
        found = folder.find(source, cls.files)
        tokenizer = cls.__new__(cls)
        try:
            content = folder.read(found.path)
            tokenizer._restore(content, found.settings, found.added, **settings)
        except TokenizerError as error:
            raise TokenizerError(f"{found.path}: {error}") from error
        if found.model is not None:
            folder.check_same(tokenizer.codec.engine.pieces(), found.path, found.model)
        return tokenizer

    @classmethod
    @abstractmethod
    def _open(cls, content: bytes) -> tuple[Engine, Vocabulary, Mapping[str, AddedToken]]:
        """The engine, the vocabulary, and tokens beyond it, of a file's content.

        Raises:
            TokenizerError: it cannot be used.
        """

    def _restore(
        self,
        content: bytes,
        settings: TokenizerSettings,
        added: Mapping[str, AddedToken],
        **changes: Any,
    ) -> None:
        engine, vocabulary, own = self._open(content)
        codec = TextCodec(engine, vocabulary).with_added(own).with_added(added)
        # Transformers 5 lists all user-defined pieces, runs of newlines among them, and takes only
        # those for special that are so elsewhere too.
        listed = tuple(
            name
            for name in settings.additional_special_tokens
            if name not in vocabulary.text_marks or name in codec.special
        )
        self._content = content
        self._roles = {role: getattr(vocabulary, role) for role in ROLES}
        self._changing = threading.RLock()  # two threads that add tokens take turns
        self._set(codec, settings.changed(**{"additional_special_tokens": listed, **changes}))

    def _set(self, codec: TextCodec, settings: TokenizerSettings) -> None:
        """Take a codec, and what the settings say of special tokens, in one step."""
        codec = codec.extended(settings.additional_special_tokens, is_special=True)
        roles = dict(self._roles)
        for role in ROLES:
            name = getattr(settings, f"{role}_token")
            if name is None:
                continue
            if role != "pad" and codec.id(name) is None:
                raise TokenizerError(
                    f"{role}_token is {name!r}, which the vocabulary does not have. Use the "
                    "tokenizer_config.json of the same checkpoint, or leave the setting out."
                )
            if name not in codec.special:
                codec = codec.extended([name], is_special=True)
            roles[role] = codec.special[name]
        if any(getattr(codec.vocabulary, role) != token_id for role, token_id in roles.items()):
            codec = codec.with_roles(roles)
        self._state = codec, settings

    def __reduce__(self) -> Any:
        return _restored, (type(self), self._content, self.settings, self.codec.added)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tokens, by {self.codec.engine.library})"

    @property
    def codec(self) -> TextCodec:
        """Text to ids and back without the conveniences around it; immutable."""
        return self._state[0]

    @property
    def settings(self) -> TokenizerSettings:
        """All settings; each is an attribute of the tokenizer too, which can be set."""
        return self._state[1]

    # -- the vocabulary ------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self.codec.size

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the vocabulary; added ones come after them."""
        return self.codec.vocabulary.size

    @property
    def vocab(self) -> dict[str, int]:
        """{spelling: id} of every token."""
        pieces = self.codec.engine.pieces()
        return {piece: i for i, piece in enumerate(pieces)} | self.get_added_vocab()

    def get_vocab(self) -> dict[str, int]:
        """{spelling: id} of every token."""
        return self.vocab

    def get_added_vocab(self) -> dict[str, int]:
        """{spelling: id} of added tokens, and of pieces that were made special."""
        return {name: token.id for name, token in self.codec.added.items()}

    @property
    def bos_token_id(self) -> int:
        return self.codec.vocabulary.bos

    @property
    def eos_token_id(self) -> int:
        return self.codec.vocabulary.eos

    @property
    def unk_token_id(self) -> int:
        return self.codec.vocabulary.unk

    @property
    def pad_token_id(self) -> int:
        """The vocabulary's <pad>; without one <eos>, since models mask padding anyway."""
        pad = self.codec.vocabulary.pad
        return self.eos_token_id if pad is None else pad

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that mark structure and are no part of a text."""
        return self.codec.special_ids

    @property
    def all_special_ids(self) -> list[int]:
        """`special_token_ids`, in order."""
        return sorted(self.codec.special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """The spellings of `all_special_ids`."""
        return [self.codec.piece(token_id) for token_id in self.all_special_ids]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """{"bos_token": spelling} and so on."""
        return {f"{role}_token": getattr(self, f"{role}_token") for role in ROLES}

    def token_to_id(self, piece: str) -> int | None:
        """Id of the token spelled `piece` in the vocabulary ("▁" for a space); None if none is."""
        return self.codec.id(piece)

    def id_to_token(self, token_id: int) -> str:
        """How the vocabulary spells a token. Raises TokenizerError outside the vocabulary."""
        return self.codec.piece(token_id)

    # -- added tokens --------------------------------------------------------------------------

    def add_tokens(self, tokens: str | Iterable[Any], special_tokens: bool = False) -> int:
        """Make texts tokens of their own, whatever stands around them.

        A model has no embedding for a new id unless its vocabulary has room for it.

        Args:
            tokens: a text or several; AddedTokens of Transformers are taken by their content,
                and are special where they say so.
            special_tokens: whether they mark structure, and are left out by
                `decode(..., skip_special_tokens=True)`.

        Returns:
            How many got a new id; a token that the vocabulary has keeps its own.

        Raises:
            TokenizerError: one is empty, no text, or asks for stripping.
        """
        is_one = isinstance(tokens, (str, Mapping)) or not isinstance(tokens, Iterable)
        several: list[Any] = [tokens] if is_one else list(tokens)
        named = [(_plain_name(t), special_tokens or _says(t, "special")) for t in several]
        with self._changing:
            codec = self.codec
            before = codec.size
            for is_special, group in groupby(named, key=lambda pair: pair[1]):
                codec = codec.extended([name for name, _ in group], is_special)
            self._set(codec, self.settings)
            return self.codec.size - before

    def add_special_tokens(self, special_tokens: Mapping[str, Any]) -> int:
        """Add tokens that mark structure.

        Args:
            special_tokens: {"additional_special_tokens": [text, ...]}, or a text for "bos_token",
                "eos_token", "unk_token" or "pad_token".

        Returns:
            How many got a new id.

        Raises:
            TokenizerError: there is no such key, or a token is empty or no text.
        """
        with self._changing:
            changes = self._special_changes(special_tokens)
            before = self.codec.size
            self._set(self.codec, self.settings.changed(**changes))
            return self.codec.size - before

    def _special_changes(self, special_tokens: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that `add_special_tokens` changes."""
        known = ["additional_special_tokens", *(f"{role}_token" for role in ROLES)]
        changes = dict(special_tokens)
        for key, value in changes.items():
            if key not in known:
                hint = nearest(key, known)
                raise TokenizerError(
                    f"There is no special token {key!r}. {hint}{' ' if hint else ''}"
                    f"Known: {', '.join(known)}."
                )
            if key == "additional_special_tokens":
                if not isinstance(value, (list, tuple)):
                    raise TokenizerError(f"{key} is {value!r}; expected a list of texts.")
                names = [_plain_name(token) for token in value]
                changes[key] = tuple(dict.fromkeys([*self.additional_special_tokens, *names]))
            else:
                changes[key] = _plain_name(value)
        return changes


def _says(token: Any, name: str) -> bool:
    """Whether a token, given as a text or as an AddedToken of Transformers, has a property."""
    found = token.get(name) if isinstance(token, Mapping) else getattr(token, name, False)
    return not isinstance(token, str) and found is True


def _plain_name(token: Any) -> str:
    """The text of a token to add; a TokenizerError if more is asked of it than to be that text."""
    asked = [name for name in ("lstrip", "rstrip", "single_word") if _says(token, name)]
    name = getattr(token, "content", spelling(token))
    if asked:
        raise TokenizerError(
            f"The token {name!r} asks for {' and '.join(asked)}, which Gemma's tokens do not have. "
            "Leave it out: a token is found exactly as it is spelled."
        )
    return str(name) if isinstance(name, str) else name


def _restored(
    kind: type[TokenizerState],
    content: bytes,
    settings: TokenizerSettings,
    added: Mapping[str, AddedToken],
) -> TokenizerState:
    tokenizer = kind.__new__(kind)
    tokenizer._restore(content, settings, added)
    return tokenizer
