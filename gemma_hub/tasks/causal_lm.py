"""CausalLM: a checkpoint on a backend, to generate text with and to look into."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError, TokenizerError
from gemma_hub.generation.beams import beam_search
from gemma_hub.generation.choosing import Ends, NewToken
from gemma_hub.generation.drafting import check_draft
from gemma_hub.generation.loop import GeneratedIds, generate_ids, stream_ids
from gemma_hub.generation.many import Progress, counted, generate_many_ids
from gemma_hub.generation.prefix import ChatMemory, Prefix
from gemma_hub.generation.sampling import log_probabilities
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.generation.stopping import StoppedText
from gemma_hub.outputs import Generation, ModelOutputs, Score, TextPiece
from gemma_hub.tasks.loaded_model import BATCH_SIZE, LoadedModel
from gemma_hub.tasks.prompts import check_prefix, each_prompt_ids, prompt_ids
from gemma_hub.tokenizers import IncrementalDecoder, SupportsChat, Tokenizer

END_OF_TURN = "<end_of_turn>"


class CausalLM(LoadedModel):
    """A Gemma that continues texts. `gemma_hub.Gemma.load` makes one.

    Attributes are those of `LoadedModel`, and:

    Attributes:
        eos_token_ids: ids that end a generation unless the call says otherwise.
    """

    task = "causal_lm"

    def __init__(
        self,
        contract: Model,
        config: GemmaConfig,
        *,
        eos_token_ids: Iterable[int] | None = None,
        **loaded: Any,
    ) -> None:
        """A task over a model that is built already.

        Args:
            contract: what the backend's `build` returned.
            config: the model's.
            eos_token_ids: the checkpoint's; those of `config` if None. The id of <end_of_turn> is
                added where the tokenizer has it as a special token.
            **loaded: the other arguments of `LoadedModel`.
        """
        super().__init__(contract, config, **loaded)
        own = config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
        self.eos_token_ids = tuple(dict.fromkeys(own + _end_of_turn(self.tokenizer)))

    # -- generation ----------------------------------------------------------------------------

    @overload
    def generate(
        self, prompt: str, *, prefix: Prefix | None = None, **settings: Any
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, prefix: Prefix | None = None, **settings: Any
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        *,
        input_ids: Any,
        attention_mask: Any = None,
        prefix: Prefix | None = None,
        **settings: Any,
    ) -> list[Generation]: ...
    @overload
    def generate(self, *, prefix: Prefix, **settings: Any) -> Generation: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        prefix: Prefix | None = None,
        **settings: Any,
    ) -> Generation | list[Generation]:
        """Continue a text, several texts, or rows of ids.

        Args:
            prompt: a text, or several; <bos> is put before each.
            input_ids: instead of `prompt`: rows of ids, of unequal length if need be, fed as they
                are.
            attention_mask: as `input_ids`, 0 at padding, which is left out wherever it stands.
            prefix: what the prompts follow, from `self.prefix`; they then get no <bos>. Without a
                prompt it is continued itself.
            **settings: fields of `gemma_hub.generation.settings.GenerationSettings`, such as
                max_new_tokens, temperature, top_k, top_p, seed, stop, logprobs, draft.

        Returns:
            One `Generation` for one text or a prefix alone, else a list with one for each row. With
            num_return_sequences above 1 a list, in which those of a prompt are together.

        Raises:
            InputError: a setting or an id is wrong, or the prefix is another model's.
            CapacityError: a prompt and its new tokens need more positions than the model has.
            TokenizerError: a text is given, here or in a setting, and the checkpoint has no
                tokenizer.
        """
        checked = self._settings(settings)
        prompts = prompt_ids(self._needed_tokenizer, prompt, input_ids, attention_mask, prefix)
        each = checked.num_return_sequences
        texts = self._stopped_texts(checked, len(prompts) * each)
        results = self._results(prompts, checked, texts, prefix)
        generations = [
            self._generation(prompts[row // each], result, checked, texts[row] if texts else None)
            for row, result in enumerate(results)
        ]
        is_one = isinstance(prompt, str) or (prompt is None and input_ids is None)
        return generations[0] if is_one and each == 1 else generations

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        batch_size: int = BATCH_SIZE,
        prefix: Prefix | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Iterator[Generation]:
        """Continue prompts one after another, as many as there are; for one list use `generate`.

        The tokens are those of `generate` with all prompts in a list and the same seed. Where a row
        ends, the next prompt takes its place. Prompts are read as rows begin, and at most four
        batches of rows have begun and are not handed out yet.

        Args:
            prompts: texts or rows of ids, as for `generate`; may be endless.
            batch_size: rows that run at once.
            prefix: as for `generate`.
            progress: told how many results are handed out, and of how many: None where the prompts
                have no length.
            **settings: as for `generate`, without beams and drafts.

        Returns:
            An iterator of results in the order of the prompts, num_return_sequences for each. It
            may be left or closed at any point.

        Raises:
            The errors of `generate`. One of a prompt names its index and comes in its place, after
            the results of all prompts before it.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            kind = type(prompts).__name__
            raise InputError(f"The prompts are {kind}; expected several texts or rows of ids.")
        checked = self._settings(settings)
        check_prefix(prefix)
        texts: dict[int, StoppedText] = {}

        def ends(row: int, token_id: int) -> bool:
            if row not in texts:
                texts[row] = StoppedText(self._decoder(), checked.stop_texts)
            texts[row].push(token_id)
            return texts[row].is_stopped

        rows = generate_many_ids(
            self.contract,
            self.config,
            each_prompt_ids(self._needed_tokenizer, prompts, prefix),
            checked,
            batch_size=batch_size,
            ends=ends if checked.stop_texts else None,
            prefix=prefix,
        )
        results = (
            self._generation(row.prompt.tolist(), row.result, checked, texts.pop(row.row, None))
            for row in rows
        )
        if progress is None:
            return results
        length = _length(prompts)
        total = None if length is None else length * checked.num_return_sequences
        return counted(results, progress, total)

    def prefix(
        self, text: str | None = None, *, input_ids: Any = None, known: Prefix | None = None
    ) -> Prefix:
        """Read a beginning once, for `generate`, `generate_many` and `stream` to go on from.

        Args:
            text: the beginning; <bos> is put before it.
            input_ids: instead of `text`: a row of ids, as in input_ids=[2, 5, 9].
            known: an earlier prefix. What this one has in common with its beginning is not read
                again, such as the turns before the latest one of a conversation.

        Raises:
            InputError: it is not one of these, or has no token, or `known` is another model's.
            CapacityError: it is longer than the model's positions.
            TokenizerError: a text is given and the checkpoint has no tokenizer.
        """
        if text is not None and not isinstance(text, str):
            raise InputError(f"A prefix is one text; got {type(text).__name__}.")
        check_prefix(known)
        rows = None if input_ids is None else [input_ids]
        (ids,) = prompt_ids(self._needed_tokenizer, text, rows, None, None)
        return Prefix(self.contract, self.config, ids, known)

    def stream(
        self, prompt: str | None = None, *, prefix: Prefix | None = None, **settings: Any
    ) -> Iterator[TextPiece]:
        """Continue a text piece by piece.

        The pieces' texts join to the text that `generate` gives for the same settings. The last
        piece has no token: it carries what was held back, and the reason why it is the last. The
        iterator may be left or closed at any point.

        Args:
            prompt: a text; <bos> is put before it.
            prefix: as for `generate`.
            **settings: as for `generate`.

        Raises:
            The errors of `generate`, in the call and not at the first piece.
        """
        if not isinstance(prompt, str if prefix is None else (str, type(None))):
            raise InputError(f"stream continues one text; got {type(prompt).__name__}.")
        checked = self._settings(settings)
        prompts = prompt_ids(self._needed_tokenizer, prompt, None, None, prefix)
        return self._streamed(prompts, checked, prefix)

    def _streamed(
        self,
        prompts: list[list[int]],
        settings: GenerationSettings,
        prefix: Prefix | None = None,
    ) -> Iterator[TextPiece]:
        if settings.num_return_sequences > 1:
            raise InputError(
                f"num_return_sequences is {settings.num_return_sequences}; a stream has one text."
            )
        text = StoppedText(self._decoder(), settings.stop_texts)
        pieces: list[str] = []

        def ends(_: int, token_id: int) -> bool:
            pieces.append(text.push(token_id))
            return text.is_stopped

        tokens = stream_ids(self.contract, self.config, prompts, settings, ends, prefix)
        return _pieces(tokens, pieces, text)

    def _results(
        self,
        prompts: list[list[int]],
        settings: GenerationSettings,
        texts: list[StoppedText],
        prefix: Prefix | None,
    ) -> list[GeneratedIds]:
        """The new tokens of each row, with which `texts` have grown where there are stop texts."""
        if settings.num_beams == 1:
            ends = _ends(texts) if texts else None
            return generate_ids(self.contract, self.config, prompts, settings, ends, prefix)
        empty = texts[0].copy() if texts else None
        results = beam_search(self.contract, self.config, prompts, settings, empty, prefix)
        for text, result in zip(texts, results if texts else (), strict=True):
            for token_id in result.token_ids:
                text.push(token_id)
        return results

    def _decoder(self) -> IncrementalDecoder:
        return IncrementalDecoder(self._needed_tokenizer(), skip_special_tokens=True)

    def _stopped_texts(self, settings: GenerationSettings, rows: int) -> list[StoppedText]:
        """One for each row where there are stop texts; none otherwise."""
        if not settings.stop_texts:
            return []
        return [StoppedText(self._decoder(), settings.stop_texts) for _ in range(rows)]

    # -- conversations -------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        system: Literal["refuse", "merge"] = "refuse",
        memory: ChatMemory | None = None,
        **settings: Any,
    ) -> Generation:
        """The model's answer to a conversation.

        The checkpoint's chat template makes the prompt, or Gemma's where it has none. What the
        messages spell is plain text, so that nobody ends a turn by typing "<end_of_turn>".

        Args:
            messages: [{"role": "user", "content": text}, {"role": "assistant", ...}, ...], a
                message of the user last.
            system: "refuse" a system message, which Gemma does not know, or "merge" it into the
                first turn of the user.
            memory: given at every turn of a conversation, it keeps the earlier ones from being
                read again.
            **settings: as for `generate`. <end_of_turn> ends the answer.

        Raises:
            InputError: the messages are no conversation, or a setting is wrong.
            TokenizerError: the checkpoint has no tokenizer, or its template is broken.
            CapacityError: the conversation and its answer need more positions than the model has.
        """
        prompt = self._conversation(messages, system)
        if settings.get("num_return_sequences", 1) != 1:
            raise InputError("num_return_sequences is no setting of a chat: it has one answer.")
        prefix = self._read(prompt, memory)
        alone = {"input_ids": [prompt]} if prefix is None else {"input_ids": [[]], "prefix": prefix}
        generation: Generation = self.generate(**alone, **settings)[0]
        return generation

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        system: Literal["refuse", "merge"] = "refuse",
        memory: ChatMemory | None = None,
        **settings: Any,
    ) -> Iterator[TextPiece]:
        """The answer that `chat` gives, piece by piece as in `stream`."""
        prompt = self._conversation(messages, system)
        checked = self._settings(settings)
        return self._streamed([prompt], checked, self._read(prompt, memory))

    def _read(self, prompt: list[int], memory: ChatMemory | None) -> Prefix | None:
        if memory is None:
            return None
        memory.prefix = Prefix(self.contract, self.config, prompt, memory.prefix)
        return memory.prefix

    def _conversation(self, messages: Any, system: Any) -> list[int]:
        tokenizer = self._needed_tokenizer()
        if not isinstance(tokenizer, SupportsChat):
            raise TokenizerError(
                f"{type(tokenizer).__name__} has no apply_chat_template, which chat needs. Use "
                "GemmaTokenizer or GemmaTokenizerFast."
            )
        ids: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, system=system, return_dict=False
        )
        return ids

    # -- probabilities -------------------------------------------------------------------------

    def score(self, texts: Sequence[str], *, batch_size: int = BATCH_SIZE) -> list[Score]:
        """The log-probability of each token of each text, given those before it.

        Args:
            texts: several texts; <bos> is put before each, so that the first token has one too.
            batch_size: texts that run at once.

        Raises:
            InputError: an argument is wrong.
            CapacityError: a text is longer than the model's positions.
            TokenizerError: the checkpoint has no tokenizer.
        """
        rows = self._encoded(texts)
        scores: dict[int, Score] = {}
        for places, _, outputs in self._batches(rows, batch_size):
            for place, logits in zip(places, outputs.logits, strict=True):
                following = np.asarray(rows[place][1:], np.int64)
                # Row by row, because float64 copies of a whole batch would be large.
                logprobs = log_probabilities(logits[: len(following)], following)
                scores[place] = Score(
                    token_ids=tuple(following.tolist()),
                    logprobs=tuple(logprobs.tolist()),
                    total=float(logprobs.sum()),
                )
        return [scores[place] for place in range(len(rows))]

    # -- the model itself ----------------------------------------------------------------------

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        *,
        labels: Any = None,
        num_items_in_batch: int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int = 0,
    ) -> ModelOutputs:
        """Logits of whole sequences, and the loss where labels are given; see `LoadedModel`.

        `logits_to_keep` gives those of the last positions only.
        """
        return self._forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            logits_to_keep=logits_to_keep,
        )

    # -- arguments and results -----------------------------------------------------------------

    def _settings(self, settings: dict[str, Any]) -> GenerationSettings:
        checked = GenerationSettings.from_dict(settings)
        if checked.eos_token_id is None:
            checked = dataclasses.replace(checked, eos_token_id=self.eos_token_ids)
        if checked.bad_words:
            checked = dataclasses.replace(checked, bad_words=self._bad_word_ids(checked.bad_words))
        if checked.draft is not None:
            check_draft(checked.draft, self.config, self.tokenizer)
        return checked

    def _bad_word_ids(self, words: Iterable[str | Iterable[int]]) -> list[Iterable[int]]:
        """The ids of each bad word; a text is forbidden with and without a space before it."""
        found: list[Iterable[int]] = []
        for word in words:
            if not isinstance(word, str):
                found.append(word)
                continue
            tokenizer = self._needed_tokenizer()
            forms = dict.fromkeys((word, f" {word}"))
            found += [tokenizer.encode(form, add_special_tokens=False) for form in forms]
        return found

    def _generation(
        self,
        prompt: list[int],
        result: GeneratedIds,
        settings: GenerationSettings,
        stopped: StoppedText | None,
    ) -> Generation:
        text = ""
        if stopped is not None:
            stopped.finish()
            text = stopped.text
        elif self.tokenizer is not None:
            text = self.tokenizer.decode(list(result.token_ids), skip_special_tokens=True)
        return Generation(
            text=text,
            token_ids=result.token_ids,
            prompt_token_ids=tuple(prompt),
            finish_reason=result.finish_reason,
            logprobs=result.logprobs,
            seed=settings.seed if settings.temperature > 0 else None,
            score=result.score,
            drafts=result.drafts,
        )


def _length(prompts: Iterable[Any]) -> int | None:
    """How many there are; None where that is unknown."""
    try:
        return len(prompts)  # type: ignore[arg-type]
    except TypeError:  # also of what wraps an iterator, and so has a length only by name
        return None


def _ends(texts: list[StoppedText]) -> Ends:
    """Ends a row where its text stops."""

    def ends(row: int, token_id: int) -> bool:
        texts[row].push(token_id)
        return texts[row].is_stopped

    return ends


def _pieces(
    tokens: Iterator[NewToken], pieces: list[str], text: StoppedText
) -> Iterator[TextPiece]:
    """One piece for each token, whose text the loop has put into `pieces`, and the last one."""
    reason = None
    for token in tokens:
        reason = token.finish_reason
        yield TextPiece(text=pieces.pop(), token_id=token.token_id)
    yield TextPiece(text=text.finish(), token_id=None, finish_reason=reason)


def _end_of_turn(tokenizer: Tokenizer | None) -> tuple[int, ...]:
    token_id = None if tokenizer is None else tokenizer.token_to_id(END_OF_TURN)
    is_special = tokenizer is not None and token_id in tokenizer.special_token_ids
    return (token_id,) if token_id is not None and is_special else ()
