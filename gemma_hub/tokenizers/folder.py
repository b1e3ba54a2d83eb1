"""The tokenizer files of a checkpoint folder: found, read, checked, and written."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_hub.config import read_json_object
from gemma_hub.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    GemmaHubError,
    TokenizerError,
)
from gemma_hub.source import resolved
from gemma_hub.tokenizers.settings import (
    TokenizerSettings,
    is_text,
    settings_from_config,
    spelling,
)
from gemma_hub.tokenizers.text import AddedToken

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_MAP_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_REPLACED = (MODEL_FILE, JSON_FILE, CONFIG_FILE, TEMPLATE_FILE, _MAP_FILE, _ADDED_FILE)
"""The files that are a tokenizer; `save_pretrained` leaves none of another one."""

# Python's objects take twenty times the room of their JSON.
_MAX_VOCABULARY_BYTES = 128 << 20
_MAX_SETTINGS_BYTES = 16 << 20
_ID_DIGITS = 10


@dataclass(frozen=True, slots=True)
class Found:
    """The tokenizer files of a folder.

    Attributes:
        path: the vocabulary file to read.
        model: a tokenizer.model beside a tokenizer.json, which must have the same pieces.
        settings: of the folder.
        added: tokens beyond the vocabulary that tokenizer_config.json names.
    """

    path: Path
    model: Path | None
    settings: TokenizerSettings
    added: Mapping[str, AddedToken]


def find(source: str | os.PathLike[str], files: Sequence[str]) -> Found:
    """The tokenizer files of a checkpoint.

    Args:
        source: its folder or name, or one vocabulary file.
        files: names of vocabulary files that will do, the preferred one first.

    Raises:
        CheckpointNotFoundError: there is none.
        TokenizerError: one that belongs to it is damaged, or the folder cannot be read.
    """
    try:
        return _find(source, files)
    except GemmaHubError:
        raise
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{source} cannot be read ({error}).") from error


def _find(source: str | os.PathLike[str], files: Sequence[str]) -> Found:
    path = resolved(source, "tokenizer")
    if path.is_file():
        return Found(path, None, TokenizerSettings(), {})
    there = [name for name in files if (path / name).is_file()]
    if not there:
        other = next((n for n in (MODEL_FILE, JSON_FILE) if (path / n).is_file()), None)
        hint = f"There is a {other}, which GemmaTokenizerFast reads. " if other else ""
        raise CheckpointNotFoundError(
            f"There is no vocabulary at {path / files[-1] if path.is_dir() else path}. {hint}"
            f"Copy the checkpoint's {' or '.join(files)} there."
        )
    model = path / MODEL_FILE
    is_json = there[0] == JSON_FILE
    return Found(
        path / there[0],
        model if is_json and model.is_file() else None,
        _settings(path),
        _added(path, is_json),
    )


def read(path: Path) -> bytes:
    """The content of a vocabulary file.

    Raises:
        CheckpointNotFoundError: there is none.
        TokenizerError: it is empty, far too large, or cannot be read.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"There is no vocabulary at {path}.")
    try:
        size = path.stat().st_size
        if size > _MAX_VOCABULARY_BYTES:
            raise TokenizerError(
                f"It has {size:,} bytes; a vocabulary has 4 to 40 million. It is another file."
            )
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"It cannot be read: {error.strerror}.") from error
    if not content:
        raise TokenizerError("The vocabulary file is empty. Get the file again.")
    return content


def check_same(pieces: Sequence[str], path: Path, model: Path) -> None:
    """Check that a tokenizer.json has the pieces of the tokenizer.model beside it, id by id.

    Raises:
        TokenizerError: naming the first that differs.
    """
    from gemma_hub.tokenizers.sentencepiece import model_pieces

    try:
        others = model_pieces(read(model))
    except (TokenizerError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{model}: {error}") from error
    if "\t" not in others:
        # Transformers 4 spells the byte piece of a tab so in a tokenizer.json.
        pieces = ["<0x09>" if piece == "\t" else piece for piece in pieces]
    if pieces == others:
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(pieces, others, strict=False)) if a != b),
        min(len(pieces), len(others)),
    )
    what = [repr(p[place]) if place < len(p) else "nothing" for p in (pieces, others)]
    raise TokenizerError(
        f"{path} and {model.name} have different vocabularies ({len(pieces)} and {len(others)} "
        f"pieces): id {place} is {what[0]} in the one and {what[1]} in the other. Remove the one "
        "that is not of this checkpoint."
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    _check_size(path)
    return read_json_object(path, TokenizerError)


def _check_size(path: Path) -> None:
    if path.stat().st_size > _MAX_SETTINGS_BYTES:
        raise TokenizerError(f"{path} is far too large for settings. Get the file again.")


def _settings(folder: Path) -> TokenizerSettings:
    config = _json(folder / CONFIG_FILE)
    named = {k: v for k, v in _json(folder / _MAP_FILE).items() if config.get(k) is None}
    if not config.keys() >= {"add_bos_token", "add_eos_token"}:
        config = _around(_json_part(folder, "post_processor")) | config
    template = folder / TEMPLATE_FILE
    if template.is_file():
        config["chat_template"] = _text(template)
    settings = _checked(folder / CONFIG_FILE, config)
    return _checked(folder / _MAP_FILE, config | named) if named else settings


def _checked(path: Path, config: Mapping[str, Any]) -> TokenizerSettings:
    try:
        return settings_from_config(config)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _json_part(folder: Path, name: str) -> Any:
    """A part of a tokenizer.json that stands before its model, which is not read; or None.

    Transformers 5 says some things nowhere else. A damaged file is refused by who reads it whole.
    """
    path = folder / JSON_FILE
    if not path.is_file():
        return None
    # Inside a JSON text the quotes would be escaped.
    front, _, _ = read(path).partition(b'"model"')
    _, _, rest = front.partition(b'"%s"' % name.encode())
    try:
        text = rest.decode("utf-8").lstrip().removeprefix(":").lstrip()
        return json.JSONDecoder().raw_decode(text.rstrip().removesuffix(","))[0]
    except (ValueError, RecursionError):
        return None


def _around(post_processor: Any) -> dict[str, bool]:
    """What the post-processor of a tokenizer.json puts around a text, if it is Gemma's kind."""
    try:
        steps = [next(iter(step)) for step in post_processor["single"]]
        place = steps.index("Sequence")
    except (ValueError, LookupError, TypeError, StopIteration):
        return {}
    return {
        "add_bos_token": "SpecialToken" in steps[:place],
        "add_eos_token": "SpecialToken" in steps[place:],
    }


def _text(path: Path) -> str:
    _check_size(path)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read as UTF-8: {error}.") from error


def _added(folder: Path, is_json: bool) -> dict[str, AddedToken]:
    """The tokens that tokenizer_config.json and added_tokens.json name, by spelling.

    Without such names, those of a tokenizer.json that is not read otherwise.
    """
    path = folder / CONFIG_FILE
    found = {}
    decoder = _json(path).get("added_tokens_decoder") or {}
    if not decoder and not is_json:
        path = folder / JSON_FILE
        decoder = _listed(_json_part(folder, "added_tokens"))
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder is {decoder!r}; expected an object.")
    for key, token in decoder.items():
        name = spelling(token)
        is_whole = isinstance(token, Mapping) and is_text(name) and name
        if not (key.isdecimal() and len(key) < _ID_DIGITS and is_whole):
            raise TokenizerError(
                f"{path}: added_tokens_decoder has {key!r}: {token!r}; expected an id and an "
                'object such as {"content": "<mask>", "special": true}.'
            )
        found[name] = AddedToken(int(key), token.get("special") is True)
    for name, token_id in _json(folder / _ADDED_FILE).items():
        is_id = type(token_id) is int and 0 <= token_id < 10**_ID_DIGITS
        if not (is_id and is_text(name) and name):
            raise TokenizerError(
                f"{folder / _ADDED_FILE}: {name!r} has {token_id!r} for an id; expected a token "
                "and the number that comes after those of the vocabulary."
            )
        found.setdefault(name, AddedToken(token_id, is_special=False))
    return found


def _listed(added_tokens: Any) -> dict[str, Any]:
    """The added_tokens of a tokenizer.json as an added_tokens_decoder."""
    if not isinstance(added_tokens, list):
        return {}
    return {str(token.get("id")): token for token in added_tokens if isinstance(token, dict)}


def write(
    path: str | os.PathLike[str], files: Mapping[str, bytes], overwrite: bool
) -> tuple[str, ...]:
    """Put tokenizer files into a folder; each of them is whole or not there.

    Everything is written to a hidden folder first. A new folder then appears in one step; in one
    that is there already, each file is replaced in one step.

    Returns:
        The paths.

    Raises:
        CheckpointError: there are such files and `overwrite` is False, or it cannot be written.
    """
    try:
        target = Path(path).expanduser().resolve()
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file. Choose another path for the tokenizer.")
        there = [name for name in _REPLACED if (target / name).exists()]
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be written ({error}).") from error
    if there and not overwrite:
        raise CheckpointError(
            f"{target} has {', '.join(there)} already. Choose another path, or pass "
            "overwrite=True to replace them."
        )
    hidden = _on_its_disk(target) / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        hidden.mkdir(parents=True)
        for name, content in files.items():
            with (hidden / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if not target.exists():
            hidden.rename(target)
        else:
            for name in files:
                (hidden / name).replace(target / name)
            for name in set(there) - set(files):
                (target / name).unlink()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return tuple(str(target / name) for name in files)


def _on_its_disk(target: Path) -> Path:
    """The folder beside `target`; `target` itself where that is on another disk or not ours."""
    is_alone = os.path.ismount(target) or not os.access(target.parent, os.W_OK)
    return target if target.is_dir() and is_alone else target.parent


def config_json(
    settings: TokenizerSettings, roles: Mapping[str, str], added: Mapping[int, tuple[str, bool]]
) -> bytes:
    """The content of a tokenizer_config.json, in Transformers' words.

    Args:
        settings: of the tokenizer.
        roles: {"bos_token": spelling} and so on.
        added: {id: (spelling, whether it is special)} of all tokens that are found before the text
            is cut.
    """
    content: dict[str, Any] = {
        "add_bos_token": settings.add_bos_token,
        "add_eos_token": settings.add_eos_token,
        "added_tokens_decoder": {
            str(token_id): {
                "content": name,
                "lstrip": False,
                "normalized": not is_special,
                "rstrip": False,
                "single_word": False,
                "special": is_special,
            }
            for token_id, (name, is_special) in sorted(added.items())
        },
        **roles,
        "clean_up_tokenization_spaces": False,
        "padding_side": settings.padding_side,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "truncation_side": settings.truncation_side,
    }
    if settings.additional_special_tokens:
        content["additional_special_tokens"] = list(settings.additional_special_tokens)
    if settings.model_max_length is not None:
        content["model_max_length"] = settings.model_max_length
    if settings.chat_template is not None:
        content["chat_template"] = settings.chat_template
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
