"""A tokenizer.json file: read, checked to be of Gemma's kind, and written."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers.model_file import PieceType
from gemma_hub.tokenizers.text import AddedToken
from gemma_hub.tokenizers.vocabulary import SPACE, Vocabulary, byte_values, is_special

_MODEL = b'"model"'  # inside a JSON text the quotes would be escaped
_BEFORE_THE_MODEL = {"added_tokens", "normalizer", "pre_tokenizer"}
_BOM = b"\xef\xbb\xbf"
_NAMES = {"bos": ("<bos>", "<s>"), "eos": ("<eos>", "</s>"), "pad": ("<pad>",)}


def is_json(content: bytes) -> bool:
    """Whether a vocabulary file is a tokenizer.json; a tokenizer.model begins otherwise."""
    start = content[:64].removeprefix(_BOM)
    return start.lstrip()[:1] == b"{" or start[:1] == b"["


def open_json(
    content: bytes,
) -> tuple[tokenizers.Tokenizer, Vocabulary, dict[str, AddedToken]]:
    """The tokenizer, the vocabulary and the tokens beyond it, of a tokenizer.json.

    Raises:
        TokenizerError: it is no whole tokenizer.json, or not one of Gemma's kind.
    """
    head = _head(content)
    added = _added_tokens(head)
    _check_kind(head)
    tokenizer = _loaded(content.removeprefix(_BOM))
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    _check_model(tokenizer, size)
    _check_ids(tokenizer, added)
    beyond = {name: token for name, token in added.items() if token.id >= size}
    vocabulary = _vocabulary(tokenizer, size, added)
    # What the file says of padding, truncation and <bos> is the settings' business.
    return with_marks(tokenizer.model, vocabulary), vocabulary, beyond


def _loaded(content: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        # The package raises Exception itself for a bad file, and panics for a very bad one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"It is not a whole tokenizer.json ({error}). Get the file again."
        ) from error
    # A file may give a key twice; what counts is what the package took.
    parts = ("normalizer", "pre_tokenizer", "decoder")
    taken = {name: getattr(tokenizer, name) for name in parts}
    _check_kind({name: part and json.loads(part.__getstate__()) for name, part in taken.items()})
    return tokenizer


def with_marks(model: tokenizers.models.BPE, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """A tokenizer that knows the marks that are text, and no other added token.

    A `TextCodec` finds the others. These are found after spaces became "▁" (normalized), as in
    sentencepiece. Google's own file looks for runs of spaces in the text as it was typed, where
    they are spelled otherwise, so that a run longer than the longest piece is cut in another way.
    """
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    marks = sorted(vocabulary.text_marks, key=vocabulary.text_marks.__getitem__)
    made.add_tokens([tokenizers.AddedToken(mark, normalized=True) for mark in marks])
    return made


def _head(content: bytes) -> dict[str, Any]:
    """All of a tokenizer.json but its model, whose 256,000 pieces are left to the package.

    The package writes the model last. Where somebody else did not, everything is read.
    """
    start = content.find(_MODEL)
    try:
        if start > 0:
            head: Any = json.loads(content[:start].rstrip().removesuffix(b",") + b"}")
        else:
            head = json.loads(content)
    except (ValueError, RecursionError):
        head = _whole(content)
    if isinstance(head, dict) and ("model" in head or not head.keys() >= _BEFORE_THE_MODEL):
        head = _whole(content)
    if not isinstance(head, dict):
        raise TokenizerError(f"It holds a {type(head).__name__}; expected a JSON object.")
    return head


def _whole(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"It is not a whole tokenizer.json ({error}). Get the file again."
        ) from error


def _added_tokens(head: Mapping[str, Any]) -> dict[str, AddedToken]:
    found: dict[str, AddedToken] = {}
    tokens = head.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise TokenizerError("Its added_tokens are no list. Get the file again.")
    for token in tokens:
        whole = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not whole or type(token.get("id")) is not int or token["id"] < 0:
            raise TokenizerError(f"An added token is {token!r}; expected an id and a content.")
        asked = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
        if asked:
            raise TokenizerError(
                f"The token {token['content']!r} asks for {' and '.join(asked)}, which Gemma's "
                "tokens do not have. This is another model's tokenizer."
            )
        made = AddedToken(token["id"], token.get("special") is True)
        if found.setdefault(token["content"], made) != made:
            raise TokenizerError(
                f"The added token {token['content']!r} is there twice, with different ids or "
                "kinds. Keep one of them."
            )
    return found


def _with_head(content: bytes, head: Mapping[str, Any]) -> bytes:
    """The file with `head` in the place of what `_head` gave."""
    front = json.dumps(head, ensure_ascii=False).encode("utf-8")
    return front if "model" in head else front[:-1] + b"," + content[content.find(_MODEL) :]


def written(
    content: bytes,
    added: Mapping[int, tuple[str, bool]],
    bos: Sequence[tuple[str, int]],
    eos: Sequence[tuple[str, int]],
) -> bytes:
    """A tokenizer.json for Transformers.

    Args:
        content: a tokenizer.json.
        added: {id: (spelling, whether it is special)} of all tokens that are found before the text
            is cut.
        bos: spelling and id of what stands in front of a text, if anything does.
        eos: of what stands after it.
    """
    head = _head(content)
    head["added_tokens"] = [
        {
            "id": token_id,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": not is_special,
            "special": is_special,
        }
        for token_id, (name, is_special) in sorted(added.items())
    ]

    def around(text: str, kind: int) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": name, "type_id": kind}} for name, _ in tokens]
            for tokens in (bos, eos)
        )
        return [*before, {"Sequence": {"id": text, "type_id": kind}}, *after]

    head["post_processor"] = {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [token_id], "tokens": [name]}
            for name, token_id in (*bos, *eos)
        },
    }
    return _with_head(content, head)


def _check_kind(head: Mapping[str, Any]) -> None:
    """Check that texts are not changed but for spaces, which become "▁"."""
    normalizer = head.get("normalizer")
    steps = _steps(normalizer, "normalizers")
    replaced = [s for s in steps if s.get("type") == "Replace" and s.get("content") == SPACE]
    patterns = [step.get("pattern") for step in replaced]
    if len(steps) != 1 or patterns != [{"String": " "}]:
        kinds = " and ".join(str(step.get("type")) for step in steps) or "nothing"
        raise TokenizerError(
            f"It normalises texts by {kinds}; Gemma's puts '▁' for each space and changes nothing "
            "else. This is another model's tokenizer; if it has a tokenizer.model, use that."
        )
    for step in _steps(head.get("pre_tokenizer"), "pretokenizers"):
        # Gemma's file splits at spaces, of which there are none left.
        is_split = step.get("type") == "Split" and step.get("pattern") == {"String": " "}
        if not is_split or step.get("invert"):
            raise TokenizerError(
                f"It splits texts by {step.get('type')} before it cuts them; Gemma's does not. "
                "This is another model's tokenizer; if it has a tokenizer.model, use that."
            )
    for step in _steps(head.get("decoder"), "decoders"):
        is_replace = step.get("pattern") == {"String": SPACE} and step.get("content") == " "
        if step.get("type") not in ("ByteFallback", "Fuse") and not (
            step.get("type") == "Replace" and is_replace
        ):
            raise TokenizerError(
                f"It decodes by {step.get('type')}; Gemma's puts a space for each '▁', and bytes "
                "together. This is another model's tokenizer; if it has a tokenizer.model, use "
                "that."
            )


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if not isinstance(part, dict):
        raise TokenizerError(f"A part of it is {part!r}; expected an object. Get the file again.")
    several = part.get(name) if part.get("type") == "Sequence" else [part]
    if not isinstance(several, list) or not all(isinstance(step, dict) for step in several):
        raise TokenizerError(f"Its {name} are {several!r}; expected objects. Get the file again.")
    return several


def _check_model(tokenizer: tokenizers.Tokenizer, size: int) -> None:
    model = tokenizer.model
    if not isinstance(model, tokenizers.models.BPE):
        raise TokenizerError(
            f"Its model is {type(model).__name__}; Gemma's is BPE. This is another model's "
            "tokenizer; if it has a tokenizer.model, use that."
        )
    wrong = [
        what for what, is_wrong in (
            ("dropout", model.dropout is not None),
            ("continuing_subword_prefix", model.continuing_subword_prefix),
            ("end_of_word_suffix", model.end_of_word_suffix),
            ("ignore_merges", model.ignore_merges),
            ("unk_token=None", model.unk_token is None),
            ("no byte pieces", model.byte_fallback and model.token_to_id("<0x00>") is None),
            ("fuse_unk=False", not model.fuse_unk and not model.byte_fallback),
        ) if is_wrong
    ]  # fmt: skip
    if wrong:
        raise TokenizerError(
            f"Its BPE model has {' and '.join(wrong)}, which Gemma's does not. This is another "
            "model's tokenizer."
        )
    missing = next((i for i in range(size) if tokenizer.id_to_token(i) is None), None)
    if missing is not None:
        raise TokenizerError(
            f"Its {size} pieces do not have the ids 0 to {size - 1}: there is no id {missing}, so "
            "an id is out of range or given twice. Get the file again."
        )


def _check_ids(tokenizer: tokenizers.Tokenizer, added: Mapping[str, AddedToken]) -> None:
    for name, token in added.items():
        token_id = tokenizer.token_to_id(name)
        if token_id != token.id:
            raise TokenizerError(
                f"The added token {name!r} has the id {token.id}; the vocabulary, or the number of "
                f"tokens before it, gives it {token_id}. Get the file again."
            )


def _vocabulary(
    tokenizer: tokenizers.Tokenizer, size: int, added: Mapping[str, AddedToken]
) -> Vocabulary:
    # "<s>" is a piece of Gemma's too, for HTML: it begins texts only where it is special.
    roles = {
        role: _first_id(tokenizer, names[:1] + tuple(n for n in names[1:] if _is_marked(added, n)))
        for role, names in _NAMES.items()
    }
    roles["unk"] = tokenizer.token_to_id(tokenizer.model.unk_token or "<unk>")
    ids = {role: token_id for role, token_id in roles.items() if token_id is not None}
    lacking = [f"<{role}>" for role in ("bos", "eos", "unk") if role not in ids]
    if lacking:
        raise TokenizerError(
            f"The vocabulary has no {' and no '.join(lacking)}, which Gemma needs. This is another "
            "model's tokenizer."
        )
    inside = {name: token for name, token in added.items() if token.id < size}
    marks = {
        name: token.id
        for name, token in inside.items()
        if token.is_special or is_special(name, PieceType.USER_DEFINED)
    }
    named = {str(tokenizer.id_to_token(i)): i for i in ids.values()}
    special = named | marks
    bytes_there = ((tokenizer.token_to_id(f"<0x{b:02X}>"), f"<0x{b:02X}>") for b in range(256))
    has_bytes = bool(tokenizer.model.byte_fallback)
    return Vocabulary(
        size=size,
        bos=ids["bos"],
        eos=ids["eos"],
        unk=ids["unk"],
        pad=ids.get("pad"),
        special=special,
        text_marks={name: t.id for name, t in inside.items() if name not in special},
        bytes=byte_values((i, p) for i, p in bytes_there if i is not None) if has_bytes else {},
    )


def _is_marked(added: Mapping[str, AddedToken], name: str) -> bool:
    return name in added and added[name].is_special


def _first_id(tokenizer: tokenizers.Tokenizer, names: tuple[str, ...]) -> int | None:
    found = (tokenizer.token_to_id(name) for name in names)
    return next((token_id for token_id in found if token_id is not None), None)
