"""TokenizerInterface: what GemmaTokenizer and GemmaTokenizerFast do, which is the same.

The names are those of Transformers' tokenizers.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from gemma_hub.errors import InputError, TokenizerError
from gemma_hub.tokenizers import folder
from gemma_hub.tokenizers.batch import (
    FILLING,
    BatchEncoding,
    Limits,
    Padding,
    Part,
    Row,
    Truncation,
    as_arrays,
    padded,
    truncated,
)
from gemma_hub.tokenizers.chatting import Chatting
from gemma_hub.tokenizers.engine import Span
from gemma_hub.tokenizers.settings import Side
from gemma_hub.tokenizers.text import AllowSpecial

Texts = str | Sequence[str] | Sequence[tuple[str, str]]


class TokenizerInterface(Chatting):
    """Text to ids and back.

    Calls change nothing, so a tokenizer may be shared between threads; setting an attribute or
    adding tokens is one step, before or after which another thread's call sees it.
    """

    model_input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    # -- text to ids ---------------------------------------------------------------------------

    def __call__(
        self,
        text: Texts,
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        allow_special: bool = True,
        padding: Padding = False,
        truncation: Truncation = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """Ids of one text, or of several, and what else is asked for.

        Args:
            text: a text, several, or several pairs.
            text_pair: second text of a pair; several where `text` is several. A pair is
                <bos> A <bos> B, with an <eos> after each where `add_eos_token` is set.
            add_special_tokens: put <bos> in front, and <eos> after, as the settings say.
            allow_special: whether text that spells a special token becomes that token. False keeps
                all of it plain text: use it for what users type.
            padding: True or "longest" to the longest row; "max_length" to `max_length`.
            truncation: True or "longest_first" cuts the longer text of a pair first;
                "only_first" and "only_second" cut that one. The tokens around are kept.
            max_length: tokens at most, those around the text included; None for the tokenizer's
                `model_max_length`.
            pad_to_multiple_of: pad to a multiple of it.
            padding_side: instead of the tokenizer's own.
            return_tensors: "np", "pt" (torch) or "jax" for arrays of shape (B, T), also for one
                text; integers are int64, and int32 in JAX. None for lists.
            return_attention_mask: 1 at tokens and 0 at padding.
            return_token_type_ids: 0 for the first text and 1 for the second.
            return_special_tokens_mask: 1 at padding and at tokens that were put around a text.
            return_offsets_mapping: (start, end) of each token in its own text, in characters;
                (0, 0) for padding and the tokens around.
            return_length: number of tokens of each row, before padding.

        Raises:
            TokenizerError: a text is not a str, or holds a lone surrogate.
            InputError: an argument is wrong, or rows of unequal length are to be an array.
        """
        now = self._as_it_is()
        limits = Limits.resolved(
            now.settings, padding, truncation, max_length, pad_to_multiple_of, padding_side
        )
        firsts, seconds = _texts(text, text_pair)
        rows = now._rows(
            firsts, seconds, add_special_tokens, allow_special, return_offsets_mapping, limits
        )
        columns: dict[str, list[Any]] = {"input_ids": [row.ids for row in rows]}
        if return_token_type_ids:
            columns["token_type_ids"] = [row.types for row in rows]
        if return_attention_mask:
            columns["attention_mask"] = [[1] * len(row.ids) for row in rows]
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = [row.added for row in rows]
        if return_offsets_mapping:
            columns["offset_mapping"] = [row.spans for row in rows]
        lengths = [len(row.ids) for row in rows]
        padded(columns, now.pad_token_id, limits)
        if return_length:
            columns["length"] = lengths
        if return_tensors is not None:
            return BatchEncoding(as_arrays(columns, return_tensors))
        if isinstance(text, str):
            return BatchEncoding({name: values[0] for name, values in columns.items()})
        return BatchEncoding(columns)

    def _as_it_is(self) -> Self:
        """This tokenizer for one call, in which what another thread changes is not seen."""
        now = type(self).__new__(type(self))
        now._state = self._state
        return now

    def _rows(
        self,
        firsts: Sequence[str],
        seconds: Sequence[str] | None,
        add_special_tokens: bool,
        allow_special: bool,
        with_spans: bool,
        limits: Limits,
    ) -> list[Row]:
        bos = [self.bos_token_id] * (add_special_tokens and self.add_bos_token)
        eos = [self.eos_token_id] * (add_special_tokens and self.add_eos_token)
        columns = [firsts] if seconds is None else [firsts, seconds]
        parts = [self._parts(texts, allow_special, with_spans) for texts in columns]
        around = (len(bos) + len(eos)) * len(columns)
        return [
            Row(truncated(several, around, limits), bos, eos)
            for several in zip(*parts, strict=True)
        ]

    def _parts(
        self, texts: Sequence[str], allow_special: AllowSpecial, with_spans: bool
    ) -> list[Part]:
        if with_spans:
            return [Part(*self.codec.encode_with_spans(text, allow_special)) for text in texts]
        return [Part(ids) for ids in self.codec.encode(texts, allow_special)]

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        allow_special: bool = True,
        **options: Any,
    ) -> Any:
        """The `input_ids` of one text, or of a pair.

        With `allow_special` the ids are those of Transformers. Without it none of
        `special_token_ids` comes out, and decoding gives back exactly `text`, also where it holds
        "▁", which otherwise is one with the space.

        Args:
            text: any Unicode text.
            text_pair: second text of a pair.
            add_special_tokens: put <bos> in front, and <eos> after, as the settings say.
            allow_special: whether text that spells a special token becomes that token.
            **options: padding, truncation, max_length ..., return_tensors, as for a call.

        Returns:
            A list of ints; with `return_tensors` an array of shape (1, T).

        Raises:
            TokenizerError: `text` is not a str, or holds a lone surrogate.
        """
        if text_pair is None and not options:
            now = self._as_it_is()
            bos = [now.bos_token_id] * (add_special_tokens and now.add_bos_token)
            eos = [now.eos_token_id] * (add_special_tokens and now.add_eos_token)
            return [*bos, *now.codec.encode([text], allow_special)[0], *eos]
        if not isinstance(text, str):
            raise TokenizerError(f"The text is a {type(text).__name__}; expected a str.")
        encoding = self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            allow_special=allow_special,
            **options,
        )
        return encoding["input_ids"]

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True, allow_special: bool = True
    ) -> tuple[list[int], list[Span]]:
        """The ids that `encode` gives, and the span (start, end) of `text` that each comes from.

        Spans count characters (code points), so that `text[start:end]` is the token's text. The
        tokens of one character's bytes all have that character's span, and <bos> has (0, 0).
        """
        encoding = self(
            [text],
            add_special_tokens=add_special_tokens,
            allow_special=allow_special,
            return_offsets_mapping=True,
        )
        return encoding["input_ids"][0], encoding["offset_mapping"][0]

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        *,
        add_special_tokens: bool = False,
        allow_special: bool = True,
    ) -> list[str]:
        """The pieces of a text as the vocabulary spells them, "▁" for a space."""
        ids = self.encode(
            text, pair, add_special_tokens=add_special_tokens, allow_special=allow_special
        )
        return [self.codec.piece(token_id) for token_id in ids]

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: Padding = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Fill the rows of encodings up; the arguments are those of a call.

        Args:
            encoded_inputs: one encoding of several rows, or several of one row each, as a data
                loader collects them. Every entry must have a value for each token.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask,
                return_tensors: as for a call.

        Raises:
            InputError: there are no input_ids, or an entry does not have their length.
        """
        columns = _columns(encoded_inputs)
        if return_attention_mask and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        limits = Limits.resolved(
            self.settings, padding, False, max_length, pad_to_multiple_of, padding_side
        )
        padded(columns, self.pad_token_id, limits)
        is_array = return_tensors is not None
        return BatchEncoding(as_arrays(columns, str(return_tensors)) if is_array else columns)

    # -- ids to text ---------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of ids; special tokens as they are spelled, or left out.

        Byte tokens that do not make up a character become U+FFFD, one for each byte.

        Args:
            token_ids: a row of integers, as a list or an array of any framework; or one.
            skip_special_tokens: leave out all of `special_token_ids`.

        Raises:
            TokenizerError: an id is not an integer, or outside the vocabulary.
        """
        return self.codec.decode(_flat(token_ids), skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Any], skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or of each of several; `unk_token_id` for what is none."""
        if isinstance(tokens, str):
            token_id = self.codec.id(tokens)
            return self.unk_token_id if token_id is None else token_id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """How the vocabulary spells an id, or each of several."""
        if not isinstance(ids, Iterable):
            return self.codec.piece(ids)
        kept = [i for i in _flat(ids) if not (skip_special_tokens and i in self.codec.special_ids)]
        return [self.codec.piece(token_id) for token_id in kept]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of pieces as `tokenize` gives them."""
        return self.codec.join(tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, in UTF-8; a byte piece is that byte."""
        return self.codec.token_bytes(token_id)

    @property
    def drops_first_space(self) -> bool:
        """Whether texts get a space in front, which decoding takes away (not in Gemma)."""
        return self.codec.vocabulary.drops_first_space

    # -- the tokens around a text --------------------------------------------------------------

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens a call puts around a text, or around the two of a pair."""
        return int(self.add_bos_token + self.add_eos_token) * (1 + pair)

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """The ids of a text, or of a pair, with the tokens around."""
        return self._built(token_ids_0, token_ids_1).ids

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """0 for each token of the first text and those around it, 1 for those of the second."""
        return self._built(token_ids_0, token_ids_1).types

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each token around the texts, or for each special token of ids that have them."""
        if already_has_special_tokens:
            return [int(token_id in self.codec.special_ids) for token_id in token_ids_0]
        return self._built(token_ids_0, token_ids_1).added

    def _built(self, first: Sequence[int], second: Sequence[int] | None) -> Row:
        bos = [self.bos_token_id] * bool(self.add_bos_token)
        eos = [self.eos_token_id] * bool(self.add_eos_token)
        both = [first] if second is None else [first, second]
        return Row([Part(list(ids)) for ids in both], bos, eos)

    # -- files ---------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> tuple[str, ...]:
        """Write the tokenizer into a folder, new or not, for this project and Transformers.

        It writes tokenizer.model where this tokenizer came from one, tokenizer.json where the
        vocabulary is of Gemma's kind, and tokenizer_config.json.

        Args:
            path: the folder; what else it holds is left alone.
            overwrite: replace tokenizer files that are there.

        Returns:
            The paths of the files.

        Raises:
            CheckpointError: there are such files, or they cannot be written.
        """
        # Imported here, because most programs save no tokenizer and do without the package.
        from gemma_hub.tokenizers.conversion import json_content
        from gemma_hub.tokenizers.json_file import is_json, written

        codec = self.codec
        marks = {i: (name, False) for name, i in codec.vocabulary.text_marks.items()}
        marks |= {token.id: (name, token.is_special) for name, token in codec.added.items()}
        marks |= {i: (name, True) for name, i in codec.special.items()}
        files = {}
        if not is_json(self._content):
            files[folder.MODEL_FILE] = self._content
        fast = json_content(self._content)
        if fast is not None:
            around = [(self.bos_token, self.bos_token_id)] * bool(self.add_bos_token)
            ends = [(self.eos_token, self.eos_token_id)] * bool(self.add_eos_token)
            files[folder.JSON_FILE] = written(fast, marks, around, ends)
        files[folder.CONFIG_FILE] = folder.config_json(
            self.settings, self.special_tokens_map, marks
        )
        return folder.write(path, files, overwrite)


def _flat(token_ids: Any) -> list[Any]:
    """A row of ids as a list; one id is a row too."""
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()  # an array of any framework
    if isinstance(token_ids, str) or not isinstance(token_ids, Iterable):
        try:
            one: Any = token_ids
            return [operator.index(one)]
        except TypeError:
            raise TokenizerError(
                f"The ids are {token_ids!r}; expected a row of integers, as in [2, 5, 9]."
            ) from None
    return list(token_ids)


def _texts(text: Any, pair: Any) -> tuple[list[str], list[str] | None]:
    """First texts and second texts, or None where there are no pairs."""
    if isinstance(text, str):
        if pair is not None and not isinstance(pair, str):
            raise InputError(f"text_pair is {type(pair).__name__}; expected one text, as text is.")
        return [text], None if pair is None else [pair]
    if isinstance(text, bytes) or not isinstance(text, Sequence):
        raise TokenizerError(f"The text is a {type(text).__name__}; expected a str, or a list.")
    texts = list(text)
    if pair is None:
        if not texts or not all(isinstance(t, (tuple, list)) and len(t) == 2 for t in texts):
            return texts, None
        return [first for first, _ in texts], [second for _, second in texts]
    if isinstance(pair, (str, bytes)) or not isinstance(pair, Sequence):
        raise InputError(f"text_pair is {type(pair).__name__}; expected a list, as text is.")
    if len(pair) != len(texts):
        given = f"{len(pair)} texts"
        raise InputError(f"text_pair is {given} and text is {len(texts)}; expected as many.")
    return texts, list(pair)


def _columns(encoded: Any) -> dict[str, list[Any]]:
    if isinstance(encoded, Mapping):
        given = dict(encoded)
    else:
        there = {", ".join(e) if isinstance(e, Mapping) else type(e).__name__ for e in encoded}
        if len(there) > 1 or not all(isinstance(e, Mapping) for e in encoded):
            raise InputError(
                f"The encodings have {' and '.join(sorted(there))}; expected dicts with the same "
                "entries, as a call gives them."
            )
        names = list(encoded[0]) if encoded else ["input_ids"]
        given = {name: [item[name] for item in encoded] for name in names}
    if "input_ids" not in given:
        raise InputError(f"The encodings have {', '.join(given)}; expected input_ids.")
    unknown = [name for name in given if name not in FILLING]
    if unknown:
        raise InputError(
            f"There is no rule to pad {' and '.join(unknown)}. Take it out, and pad it yourself; "
            f"what can be padded: {', '.join(FILLING)}."
        )
    columns = {name: [_listed(name, row) for row in rows] for name, rows in given.items()}
    lengths = [len(row) for row in columns["input_ids"]]
    for name, rows in columns.items():
        own = [len(row) for row in rows]
        if own != lengths:
            raise InputError(
                f"{name} has rows of {own} and input_ids of {lengths}; expected a value for each "
                "token. Take it out, and pad it yourself."
            )
    return columns


def _listed(name: str, row: Any) -> list[Any]:
    listed = row.tolist() if hasattr(row, "tolist") else row
    if isinstance(listed, (str, int, float)) or not isinstance(listed, Iterable):
        raise InputError(
            f"{name} has {row!r} for a row; expected a list with a value for each token. One "
            "encoding of one text is a list of one: pad([encoding])."
        )
    return list(listed)
