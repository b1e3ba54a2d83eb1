"""Prompts in a file, one on each line: texts, or JSON objects."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_hub.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from gemma_hub.tasks.causal_lm import CausalLM

Prompt = str | list[int]
"""A text, or token ids."""

_EXPECTED = 'expected an object such as {"prompt": "Once upon"} or {"input_ids": [2, 5, 9]}'


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file that has a prompt on each line. An error of a line names it.

    Attributes:
        path: None for standard input.
        is_jsonl: whether each line is a JSON object, and not the text itself.
    """

    path: Path | None
    is_jsonl: bool

    @property
    def name(self) -> str:
        """What messages call it."""
        return "standard input" if self.path is None else str(self.path)

    @property
    def is_stream(self) -> bool:
        """Whether its lines come in their own time, and once only."""
        return self.path is None or self.path.is_fifo() or self.path.is_char_device()

    def read(self) -> Iterator[Prompt]:
        """The prompts, read as they are needed.

        Raises:
            InputError: the file cannot be read, or a line has no prompt.
        """
        for index, line in enumerate(self._lines()):
            where = self._line_name(index)
            try:
                # Editors of Windows begin a file with a mark, which is no part of its text.
                text = line.decode("utf-8-sig" if index == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{where} is not UTF-8: {error.reason} at its byte {error.start}. Save the "
                    "file as UTF-8."
                ) from error
            text = text.removesuffix("\n").removesuffix("\r")
            if not text:
                raise InputError(f"{where} is empty; expected a prompt. Remove the line.")
            yield _prompt_of_object(text, where) if self.is_jsonl else text

    def checked(
        self, prompts: Iterable[Prompt], lm: "CausalLM", max_new_tokens: int
    ) -> Iterator[Prompt]:
        """What `read` gave, each once it is known that `lm` can continue it.

        Raises:
            InputError: a line has an id that is not in the vocabulary.
            CapacityError: a prompt and its new tokens need more positions than the model has.
            TokenizerError: a text cannot be encoded.
        """
        from gemma_hub.generation.prompt_checks import checked_prompt

        for index, prompt in enumerate(prompts):
            where = self._line_name(index)
            ids = _encoded(prompt, lm, where) if isinstance(prompt, str) else prompt
            checked_prompt(where, ids, lm.config, max_new_tokens)
            yield prompt

    def _lines(self) -> Iterator[bytes]:
        try:
            if self.path is None:
                yield from sys.stdin.buffer
                return
            with self.path.open("rb") as file:
                yield from file
        except OSError as error:
            raise InputError(f"{self.name} cannot be read: {error.strerror}.") from error

    def _line_name(self, index: int) -> str:
        return f"Line {index + 1} of {self.name}"


def _prompt_of_object(text: str, where: str) -> Prompt:
    """The prompt in a line of JSON; keys that are null count as missing, others are not looked at.

    Raises:
        InputError: it has none; the message begins with `where`.
    """
    value = _object(text, where)
    given = [key for key in ("prompt", "input_ids") if value.get(key) is not None]
    if len(given) != 1:
        count = "both" if given else "neither"
        raise InputError(f'{where} has {count} of "prompt" and "input_ids"; give exactly one.')
    prompt = value[given[0]]
    if given == ["prompt"]:
        if not isinstance(prompt, str):
            raise InputError(f'{where} has a "prompt" that is no text; {_EXPECTED}.')
        if not prompt:
            raise InputError(f'{where} has an empty "prompt"; give a text, or "input_ids".')
        return prompt
    if not isinstance(prompt, list) or any(type(each) is not int for each in prompt):
        raise InputError(f'{where} has "input_ids" that are no list of integers; {_EXPECTED}.')
    if not prompt:
        raise InputError(f'{where} has no "input_ids"; give at least one, such as that of <bos>.')
    return prompt


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # The text of the error itself has a line number too, that within this line.
        reason = f"{error.msg} at its character {error.pos}"
        raise InputError(f"{where} is no JSON: {reason}; {_EXPECTED}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON that can be read: {error}; {_EXPECTED}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is no JSON object; {_EXPECTED}.")
    return value


def _encoded(text: str, lm: "CausalLM", where: str) -> list[int]:
    if lm.tokenizer is None:
        raise TokenizerError(
            f"{where} is a text, and this checkpoint has no tokenizer. Give JSON lines with "
            '"input_ids", or put its tokenizer.model into the folder.'
        )
    try:
        return lm.tokenizer.encode(text)
    except TokenizerError as error:
        raise TokenizerError(f"{where} cannot be encoded. {error}") from error
