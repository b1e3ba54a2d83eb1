"""TokenizerSettings: what tokenizer_config.json says, apart from the vocabulary."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gemma_hub.errors import TokenizerError, nearest

Side = Literal["left", "right"]

ROLES = ("bos", "eos", "unk", "pad")
"""The tokens that a tokenizer itself needs; a setting for each is called "bos_token" and so on."""

# Writers put a huge number where they know no limit (Transformers: int(1e30)).
_NO_LIMIT = 10**12

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Settings under the names that tokenizer_config.json has for them.

    Attributes:
        add_bos_token: put <bos> in front of every text.
        add_eos_token: put <eos> after every text.
        padding_side: where rows are filled up. "left", so that a batch can be continued: the last
            position is the last token of each row.
        truncation_side: which end of a text is cut off.
        model_max_length: tokens at most where `truncation` or `padding` needs a limit and the call
            gives none.
        chat_template: Jinja text; None for Gemma's own.
        bos_token: spelling of a token that takes this role, instead of the vocabulary's own; and
            `eos_token`, `unk_token` and `pad_token` alike.
        additional_special_tokens: more tokens that mark structure.
    """

    add_bos_token: bool = True
    add_eos_token: bool = False
    padding_side: Side = "left"
    truncation_side: Side = "right"
    model_max_length: int | None = None
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    additional_special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("add_bos_token", "add_eos_token"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        for name in ("padding_side", "truncation_side"):
            self._check(name, getattr(self, name) in get_args(Side), "'left' or 'right'")
        limit: Any = self.model_max_length
        is_limit = limit is None or (type(limit) is int and limit > 0)
        self._check("model_max_length", is_limit, "a number of tokens from 1 up, or None")
        if limit is not None and limit >= _NO_LIMIT:
            object.__setattr__(self, "model_max_length", None)
        for name in ("chat_template", *(f"{role}_token" for role in ROLES)):
            value = getattr(self, name)
            self._check(name, value is None or is_text(value), "a text, or None")
        extra: Any = self.additional_special_tokens
        several = isinstance(extra, (list, tuple)) and all(is_text(n) and n for n in extra)
        self._check("additional_special_tokens", several, "a list of texts")
        object.__setattr__(self, "additional_special_tokens", tuple(extra))

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise TokenizerError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    def changed(self, **changes: Any) -> "TokenizerSettings":
        """The settings with some of them replaced.

        Raises:
            TokenizerError: there is no such setting, or a value is wrong.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                hint = nearest(name, known)
                raise TokenizerError(
                    f"There is no tokenizer setting {name!r}. {hint}{' ' if hint else ''}"
                    f"Known: {', '.join(known)}."
                )
        return dataclasses.replace(self, **changes)


def settings_from_config(config: Mapping[str, Any]) -> TokenizerSettings:
    """The settings in the content of a tokenizer_config.json; its other keys are ignored.

    They name Python classes, or repeat the vocabulary, or have no effect for Gemma.

    Raises:
        TokenizerError: a value is wrong.
    """
    found = {
        field.name: config[field.name]
        for field in dataclasses.fields(TokenizerSettings)
        if config.get(field.name) is not None
    }
    for role in ROLES:
        if f"{role}_token" in found:
            token = found[f"{role}_token"]
            found[f"{role}_token"] = token if spelling(token) is None else spelling(token)
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if not isinstance(more, list):
        more = [] if isinstance(more, dict) else [more]  # a dict holds other models' named tokens
    found["additional_special_tokens"] = tuple(spelling(token) for token in more)
    found["chat_template"] = _default_template(config.get("chat_template"))
    limit = found.get("model_max_length")
    if isinstance(limit, float) and limit.is_integer():  # 1e+30, as some writers spell it
        found["model_max_length"] = int(limit)
    return TokenizerSettings(**found)


def spelling(token: Any) -> Any:
    """The text of a token that is given as a text, or as an AddedToken of Transformers."""
    return token.get("content") if isinstance(token, Mapping) else token


def is_text(value: Any) -> bool:
    """Whether it is a str that UTF-8 can spell: a JSON file may hold half a surrogate pair."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _default_template(template: Any) -> Any:
    """The template called "default" where there are several."""
    if not isinstance(template, list):
        return template
    named = [(t.get("name"), t.get("template")) for t in template if isinstance(t, Mapping)]
    found = next((text for name, text in named if name == "default"), None)
    if found is None:
        raise TokenizerError(
            f"There are the chat templates {[name for name, _ in named]}, and none called "
            "'default'. Give the one you want: chat_template='...'."
        )
    return found
