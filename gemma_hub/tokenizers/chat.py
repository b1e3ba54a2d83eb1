"""The text of a prompt from the messages of a conversation, so that no user can forge a turn.

A template puts users' texts between special tokens by joining strings, after which nobody can tell
"<end_of_turn>" that the template wrote from one that a user typed. So before the template runs, a
character that no text has, a marker, is put into the users' strings wherever a special token could
begin; after it has run, the markers tell the places, and are taken out.
"""

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemma_hub.errors import InputError, TokenizerError, nearest
from gemma_hub.tokenizers.chat_template import plain_data, render

GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {%- if message['content'] is string %}
        {%- set content = message['content'] %}
    {%- else %}
        {%- set content = message['content'] | map(attribute='text') | join %}
    {%- endif %}
    {{- '<start_of_turn>' + role + '\\n' + content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
"""Gemma's own, which also takes the content of a message as a list of texts."""

_PUBLISHED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
"""As checkpoints of Gemma 1, 1.1 and CodeGemma have it."""

SPACE = "▁"
"""How a vocabulary spells a space, U+2581: a special spelling too, since it reads as one."""

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that Unicode leaves to programs for their own use."""

System = Literal["refuse", "merge"]


@dataclass(frozen=True, slots=True)
class ChatText:
    """A prompt.

    Attributes:
        text: with its <bos>; to be encoded without adding one.
        plain: places in `text` at which a special token's spelling, or "▁", begins that came from a
            user. They must be encoded as plain text.
    """

    text: str
    plain: frozenset[int]


def chat_text(
    messages: Any,
    template: str | None,
    special_names: Collection[str],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    system: System = "refuse",
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    allow_special: bool = False,
) -> ChatText:
    """The prompt for a conversation.

    What is in `messages`, `tools` and `documents` counts as users' text, keys included: none of it
    makes a special token. `template` and `variables` are the caller's own.

    Args:
        messages: see `checked_messages`; for Gemma's template also `checked_turns`.
        template: Jinja text; None for Gemma's.
        special_names: how the special tokens are spelled.
        bos_token: put in front where the template does not print it.
        eos_token: for templates that print it.
        add_generation_prompt: end with the beginning of the model's turn.
        continue_final_message: end inside the last message, without what the template puts after.
        system: what becomes of a system message: "merge" puts it before the first message of the
            user. "refuse" concerns Gemma's template alone; others may have a place for it.
        tools: functions that the model may call, as JSON schemas.
        documents: texts that the model may use.
        variables: more names for the template.
        allow_special: what users spell makes special tokens, as in Transformers.

    Raises:
        InputError: the messages are no conversation, or an argument does not fit.
        TokenizerError: the template fails, refuses, asks for too much, prints <bos> twice, or does
            not print the message to continue.
    """
    if add_generation_prompt and continue_final_message:
        raise InputError(
            "add_generation_prompt and continue_final_message are both True: the prompt cannot end "
            "with a new turn and inside the last one. Leave one of them out."
        )
    turns = checked_messages(messages)
    if template is None or template in (_PUBLISHED, GEMMA_TEMPLATE):
        template = GEMMA_TEMPLATE
        turns = checked_turns(turns, system)
        if tools or documents:
            raise InputError(
                f"{'tools' if tools else 'documents'} are given, and Gemma's template has no place "
                "for them. Write them into a message, or give a template that uses them."
            )
    elif system == "merge":
        turns = _merged(turns)
    own = {"add_generation_prompt": add_generation_prompt, "bos_token": bos_token,
           "eos_token": eos_token, **_without_clash(variables or {})}  # fmt: skip
    given = {"messages": turns, "tools": tools, "documents": documents}
    users: dict[str, Any] = {name: plain_data(value, name) for name, value in given.items()}
    marker, end = _unused([template, *_strings(users), *_strings(plain_data(own, "variables"))])
    names = frozenset(special_names)
    marked = users if allow_special else _marked(users, _beginning(names), marker)
    final = ""
    for messages in (marked["messages"], users["messages"])[: 1 if allow_special else 2]:
        final = _opened(messages, end) if continue_final_message else ""
    text = render(template, {**marked, **own})
    if not allow_special and _unmarked(text, marker)[0] != render(template, {**users, **own}):
        raise TokenizerError(
            "The chat template takes the messages apart by their characters, so that what users "
            "wrote cannot be told from its own tokens. Use another template; or allow_special=True "
            "where every message is to be trusted."
        )
    if continue_final_message:
        text = _cut(text, final.replace(marker, ""), marker, end)
    text, places = _unmarked(text, marker)
    return _with_one_bos(_chat_text(text, places, names), bos_token)


def _without_clash(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    taken = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
    if clash := taken & set(variables):
        raise InputError(
            f"variables has {sorted(clash)[0]!r}, which the template gets from elsewhere. Use the "
            "argument, or the tokenizer's setting, of that name."
        )
    return variables


# -- what a conversation is ----------------------------------------------------------------------


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages of a conversation, whatever its roles; "model" becomes "assistant".

    Args:
        messages: at least one mapping with a role and with content: a text, or a list of
            {"type": "text", "text": ...}. One with tool_calls needs no content. Other keys stay.

    Raises:
        InputError: it is not that.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InputError(
            f"The conversation is a {type(messages).__name__}; expected a list of messages such as "
            "{'role': 'user', 'content': 'Hello'}."
        )
    if not messages:
        raise InputError("The conversation is empty; expected at least one message.")
    return [_checked_message(i, message) for i, message in enumerate(messages)]


def _checked_message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(
            f"Message {i} is a {type(message).__name__}; expected a mapping with a role and with "
            "content: {'role': 'user', 'content': 'Hello'}."
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise InputError(
            f"The role of message {i} is {role!r}; expected a text such as 'user'. Its keys are "
            f"{', '.join(map(repr, message))}."
        )
    if isinstance(content, (list, tuple)):
        content = [_checked_part(i, part) for part in content]
    elif not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        raise InputError(
            f"The content of message {i} is a {type(content).__name__}; expected a text, or a list "
            "of {'type': 'text', 'text': ...}."
        )
    checked = {**message, "role": "assistant" if role == "model" else role}
    return {**checked, "content": content} if "content" in message else checked


def _checked_part(i: int, part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(
            f"Message {i} has a part of type {kind!r}; expected {{'type': 'text', 'text': ...}}. "
            "Gemma of the first generation reads text alone: leave images and sounds out."
        )
    return {"type": "text", "text": part["text"]}


def checked_turns(
    messages: list[dict[str, Any]], system: System = "refuse"
) -> list[dict[str, Any]]:
    """Messages from `checked_messages` as Gemma takes them: user and assistant in turn.

    Args:
        messages: not changed.
        system: what becomes of a system message, which must be the first.

    Raises:
        InputError: roles are others or do not alternate, or there are calls of tools.
    """
    known = ("system", "user", "assistant")
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in known:
            raise InputError(
                f"The role of message {i} is {role!r}; Gemma knows 'user' and 'assistant'. "
                f"{nearest(role, known)}".rstrip()
            )
        if message.get("tool_calls"):
            raise InputError(
                f"Message {i} has tool_calls, and Gemma's template has no place for them. Write "
                "them into its content, or give a template that uses them."
            )
        if role == "system" and i > 0:
            raise InputError(
                f"Message {i} is a system message; one can only be the first. Move it there."
            )
        if role == "system" and system == "refuse":
            raise InputError(
                "Message 0 is a system message, and Gemma has no system role. Use system='merge' "
                "to put its text before the first message of the user."
            )
    turns = _merged(messages) if system == "merge" else messages
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise InputError(
                f"Turn {i} of the conversation is the {message['role']}'s; expected the "
                f"{expected}'s, since user and assistant take turns and the user begins. Merge "
                "messages that follow one another, or leave some out."
            )
    return turns


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, a first one of the system put before the text of the second."""
    if messages[0]["role"] != "system":
        return messages
    if len(messages) == 1 or messages[1]["role"] != "user":
        raise InputError(
            "There is no message of the user after the system message to merge it into. Add one, "
            "or make the system message one of the user's."
        )
    both = [_content(message).strip() for message in messages[:2]]
    return [{**messages[1], "content": "\n\n".join(both)}, *messages[2:]]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


# -- whose text it is ----------------------------------------------------------------------------


def _strings(value: Any) -> Iterator[str]:
    """All texts in `value`, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value:
            yield from _strings(part)
        if isinstance(value, dict):
            yield from _strings(list(value.values()))


def _unused(texts: list[str]) -> tuple[str, str]:
    """Two noncharacters that are in none of the texts, nor written out as JSON does."""
    found = [
        mark
        for mark in _NONCHARACTERS
        if not any(mark in text or json.dumps(mark)[1:-1] in text for text in texts)
    ]
    if len(found) < 2:
        raise InputError(
            "The conversation uses all of the characters U+FDD0 to U+FDEF, which stand for nothing "
            "in Unicode and are needed here. Take them out."
        )
    return found[0], found[1]


@functools.lru_cache(maxsize=8)
def _beginning(names: frozenset[str]) -> re.Pattern[str]:
    """A character where a special token may begin.

    That its second character follows is enough, since a template may cut the text after it; or that
    none follows: the next string may, "<start_of " and "_turn>" where a template strips them.
    """
    heads = "|".join(sorted({re.escape(name[:2]) for name in names if name}))
    firsts = "".join(sorted({re.escape(name[0]) for name in names if name}))
    ends = rf"|[{firsts}]\s*\Z" if firsts else ""
    # A template may change the case: "<BOS>" | lower.
    return re.compile(rf"(?={SPACE}{'|' * bool(heads)}{heads}{ends}).", re.DOTALL | re.IGNORECASE)


def _marked(value: Any, beginning: re.Pattern[str], marker: str) -> Any:
    """`value` with the marker after each such character, in keys too."""
    if isinstance(value, str):
        return beginning.sub(rf"\g<0>{marker}", value)
    if isinstance(value, (list, tuple)):
        return [_marked(part, beginning, marker) for part in value]
    if isinstance(value, dict):
        return {
            _marked(key, beginning, marker): _marked(part, beginning, marker)
            for key, part in value.items()
        }
    return value


def _unmarked(text: str, marker: str) -> tuple[str, list[int]]:
    """The text without markers, and the place before each."""
    parts = text.replace(json.dumps(marker)[1:-1], marker).split(marker)
    places, length = [], 0
    for part in parts[:-1]:
        length += len(part)
        places.append(length - 1)
    return "".join(parts), places


def _chat_text(text: str, places: list[int], names: frozenset[str]) -> ChatText:
    """The text with those of the places where a special spelling begins."""
    special = {*names, SPACE}
    lengths = sorted({len(name) for name in special})
    plain = {
        place
        for place in places
        if place >= 0 and any(text[place : place + length] in special for length in lengths)
    }
    return ChatText(text, frozenset(plain))


def _with_one_bos(chat: ChatText, bos_token: str) -> ChatText:
    text, plain = chat.text, chat.plain
    if not bos_token:
        return chat
    if not text.startswith(bos_token) or 0 in plain:
        return ChatText(bos_token + text, frozenset(place + len(bos_token) for place in plain))
    if text.startswith(bos_token, len(bos_token)) and len(bos_token) not in plain:
        raise TokenizerError(
            f"The prompt begins with {bos_token} twice, and the model was trained with one. Take "
            "one out of the chat template."
        )
    return chat


# -- the message to continue ---------------------------------------------------------------------


def _opened(messages: list[dict[str, Any]], end: str) -> str:
    """Mark the end of the last message's content, and return the last text of that."""
    content = messages[-1].get("content")
    holder, key = messages[-1], "content"
    if isinstance(content, (list, tuple)) and content:
        holder, key = content[-1], "text"
    text = holder.get(key)
    if not isinstance(text, str):
        raise InputError(
            "continue_final_message is True, and the last message has no text to continue. Give it "
            "one, or use add_generation_prompt."
        )
    # The space tells whether the template strips it, and then the text before goes without, too.
    holder[key] = f"{text}{end} "
    return text


def _cut(rendered: str, final: str, marker: str, end: str) -> str:
    """The rendered text up to the end of its last message."""
    before, found, after = rendered.rpartition(end)
    if not found or final.strip() not in before.replace(marker, ""):
        raise TokenizerError(
            "The chat template does not print the last message as it is, so it cannot be continued "
            "there. Use add_generation_prompt, or another template."
        )
    return before if after.startswith(" ") else before.rstrip()
