"""Chatting: conversations, and code to fill in, as the ids of a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gemma_hub.errors import InputError
from gemma_hub.tokenizers.batch import BatchEncoding, Limits, Padding, as_arrays, padded
from gemma_hub.tokenizers.chat import ChatText, chat_text
from gemma_hub.tokenizers.fill_in_the_middle import FillInTheMiddle
from gemma_hub.tokenizers.settings import Side
from gemma_hub.tokenizers.state import TokenizerState


class Chatting(TokenizerState):
    """What a tokenizer does with prompts that have a structure."""

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        system: Literal["refuse", "merge"] = "refuse",
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        allow_special: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        padding: Padding = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_tensors: str | None = None,
    ) -> Any:
        """A conversation as the model was trained to read it, with exactly one <bos>.

        What users wrote is encoded as plain text, so that nobody can end a turn or begin one by
        typing "<end_of_turn>".

        Args:
            conversation: messages [{"role": "user", "content": text}, ...], whose roles are
                "user" and "assistant" (or "model") in turn; or a list of conversations.
            chat_template: Jinja text; None for the checkpoint's, or Gemma's where it has none.
            add_generation_prompt: end with the beginning of the model's turn.
            continue_final_message: leave the last message open, for the model to go on with it.
            system: Gemma has no system role. "refuse" a system message, or "merge" it into the
                first turn of the user.
            tools, documents: for templates that use them.
            variables: more names for the template.
            allow_special: take special tokens that a message spells for what they are, as
                Transformers does. Never for texts of users.
            tokenize: False for the rendered text. Encode it with add_special_tokens=False; what
                users spelled can then no longer be told from the template's own tokens.
            return_dict: an encoding with an attention mask; False for the ids alone.
            padding, max_length, pad_to_multiple_of, padding_side, return_tensors: as for a call.

        Raises:
            InputError: the messages are not a conversation that Gemma knows.
            TokenizerError: the template is broken, refuses the conversation, or goes too far.
        """
        one = not (conversation and isinstance(conversation[0], (list, tuple)))
        rendered = [
            chat_text(
                messages,
                self.chat_template if chat_template is None else chat_template,
                self.codec.special,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                system=system,
                tools=tools,
                documents=documents,
                variables=variables or {},
                allow_special=allow_special,
            )
            for messages in ([conversation] if one else conversation)
        ]
        if not tokenize:
            return rendered[0].text if one else [chat.text for chat in rendered]
        rows = [self._chat_ids(chat, allow_special) for chat in rendered]
        limits = Limits.resolved(
            self.settings, padding, False, max_length, pad_to_multiple_of, padding_side
        )
        columns: dict[str, list[Any]] = {
            "input_ids": rows,
            "attention_mask": [[1] * len(row) for row in rows],
        }
        padded(columns, self.pad_token_id, limits)
        values: Mapping[str, Any] = columns
        if return_tensors is not None:
            values = as_arrays(columns, return_tensors)
        elif one:
            values = {name: column[0] for name, column in columns.items()}
        return BatchEncoding(values) if return_dict else values["input_ids"]

    def _chat_ids(self, chat: ChatText, allow_special: bool) -> list[int]:
        return self.codec.encode([chat.text], True if allow_special else chat.plain)[0]

    # -- code ----------------------------------------------------------------------------------

    def fim_prompt(self, prefix: str, suffix: str) -> list[int]:
        """Ids of the prompt that makes CodeGemma write what stands between two pieces of code.

        Args:
            prefix: the code before; plain text whatever it spells.
            suffix: the code after.

        Returns:
            <bos> <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|>, ids as this
            vocabulary has them.

        Raises:
            TokenizerError: this is not a vocabulary of CodeGemma.
        """
        for name, code in (("prefix", prefix), ("suffix", suffix)):
            if not isinstance(code, str):
                raise InputError(f"{name} is a {type(code).__name__}; expected a str.")
        prompt = FillInTheMiddle.of(self.codec).prompt(self.codec, prefix, suffix)
        return [self.bos_token_id, *prompt]

    @property
    def fim_stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end the code between: for `generate(..., eos_token_id=...)`.

        Raises:
            TokenizerError: this is not a vocabulary of CodeGemma.
        """
        return (self.eos_token_id, *FillInTheMiddle.of(self.codec).stops)
