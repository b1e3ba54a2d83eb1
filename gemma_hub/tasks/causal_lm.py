"""CausalLM: a checkpoint on a backend, to generate text with and to look into."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from gemma_hub.backend import Model, SupportsExport
from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError, TokenizerError, UnsupportedFeature
from gemma_hub.generation.loop import GeneratedIds, NewToken, generate_ids, stream_ids
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import Generation, ModelOutputs, TextPiece
from gemma_hub.plugins.registry import LoadedBackend
from gemma_hub.tokenizers import IncrementalDecoder, Tokenizer

END_OF_TURN = "<end_of_turn>"


class CausalLM:
    """A Gemma that continues texts. `gemma_hub.Gemma.load` makes one.

    Attributes:
        model: the framework's own module (torch.nn.Module, flax.nnx.Module).
        contract: the backend's `gemma_hub.backend.Model` around it, for work with a cache.
        config: the model's hyper-parameters.
        tokenizer: None where the checkpoint has none; then prompts are ids and texts are empty.
        backend: name, distribution and version of what runs it.
        dtype: compute and storage type, a key of `gemma_hub.parameters.DTYPES`.
        eos_token_ids: ids that end a generation unless the call says otherwise.
    """

    def __init__(
        self,
        contract: Model,
        config: GemmaConfig,
        *,
        backend: LoadedBackend,
        dtype: str,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Iterable[int] | None = None,
        files: Iterable[Path] = (),
    ) -> None:
        """A task over a model that is built already.

        Args:
            contract: what the backend's `build` returned.
            config: the model's.
            backend: what built it.
            dtype: what it was built in.
            tokenizer: of the same checkpoint, if it has one.
            eos_token_ids: the checkpoint's; those of `config` if None. The id of <end_of_turn> is
                added where the tokenizer has it as a special token.
            files: files that `save` puts beside the weights, such as tokenizer.model.
        """
        self.contract = contract
        self.model = contract.native
        self.config = config
        self.backend = backend
        self.dtype = dtype
        self.tokenizer = tokenizer
        own = config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
        self.eos_token_ids = tuple(dict.fromkeys(own + _end_of_turn(tokenizer)))
        self._files = tuple(files)

    @property
    def device(self) -> str:
        """Where the model is, in the framework's words."""
        return self.contract.device

    def __repr__(self) -> str:
        return (
            f"CausalLM(backend={self.backend.name!r}, dtype={self.dtype!r}, "
            f"device={self.device!r}, parameters={self.config.num_parameters:_})"
        )

    # -- generation ----------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str, **settings: Any) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[str], **settings: Any) -> list[Generation]: ...
    @overload
    def generate(
        self, *, input_ids: Any, attention_mask: Any = None, **settings: Any
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        **settings: Any,
    ) -> Generation | list[Generation]:
        """Continue a text, several texts, or rows of ids.

        Args:
            prompt: a text, or several; <bos> is put before each.
            input_ids: instead of `prompt`: rows of ids, of unequal length if need be, fed as they
                are.
            attention_mask: as `input_ids`, 0 at padding, which is left out wherever it stands.
            **settings: fields of `gemma_hub.generation.settings.GenerationSettings`, such as
                max_new_tokens, temperature, top_k, top_p, seed, eos_token_id, logprobs.

        Returns:
            One `Generation` for one text, else a list with one for each row.

        Raises:
            InputError: a setting or an id is wrong.
            CapacityError: a prompt and its new tokens need more positions than the model has.
            TokenizerError: a text is given and the checkpoint has no tokenizer.
        """
        checked = self._settings(settings)
        prompts = self._prompts(prompt, input_ids, attention_mask)
        results = generate_ids(self.contract, self.config, prompts, checked)
        seed = checked.seed if checked.temperature > 0 else None
        generations = [
            self._generation(ids, result, seed)
            for ids, result in zip(prompts, results, strict=True)
        ]
        return generations[0] if isinstance(prompt, str) else generations

    def stream(self, prompt: str, **settings: Any) -> Iterator[TextPiece]:
        """Continue a text piece by piece.

        The pieces' texts join to the text that `generate` gives for the same settings. The last
        piece has no token: it carries what was held back, and the reason why it is the last. The
        iterator may be left or closed at any point.

        Args:
            prompt: a text; <bos> is put before it.
            **settings: as for `generate`.

        Raises:
            The errors of `generate`, in the call and not at the first piece.
        """
        if not isinstance(prompt, str):
            raise InputError(f"stream continues one text; got {type(prompt).__name__}.")
        checked = self._settings(settings)
        prompts = self._prompts(prompt, None, None)
        tokens = stream_ids(self.contract, self.config, prompts, checked)
        decoder = IncrementalDecoder(self._needed_tokenizer(), skip_special_tokens=True)
        return _pieces(tokens, decoder)

    # -- the model itself ----------------------------------------------------------------------

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        *,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
    ) -> ModelOutputs:
        """Logits of whole sequences; arguments and errors of `ModelInputs.prepare`.

        Returns:
            The backend's own arrays; `.to_numpy()` gives the same record in NumPy.
        """
        if inputs_embeds is not None and "inputs_embeds" not in self.backend.spec.features:
            raise UnsupportedFeature("inputs_embeds", self.backend.name, "Give input_ids.")
        inputs = ModelInputs.prepare(
            self.config,
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
        )
        return self.contract.forward(inputs)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a checkpoint folder in the Hugging Face layout, tokenizer files included.

        Args:
            path: the folder to make.
            overwrite: replace a checkpoint that is there already.

        Raises:
            UnsupportedFeature: the backend cannot give its parameters back.
            CheckpointError: there is something at `path`, or it cannot be written.
        """
        if not isinstance(self.contract, SupportsExport):
            raise UnsupportedFeature(
                "export", self.backend.name, "Load the checkpoint with another backend to save it."
            )
        weights = self.contract.export()
        save_checkpoint(path, self.config, weights, files=self._files, overwrite=overwrite)

    # -- arguments and results -----------------------------------------------------------------

    def _settings(self, settings: dict[str, Any]) -> GenerationSettings:
        checked = GenerationSettings.from_dict(settings)
        if checked.eos_token_id is None:
            checked = dataclasses.replace(checked, eos_token_id=self.eos_token_ids)
        return checked

    def _prompts(
        self, prompt: str | Sequence[str] | None, input_ids: Any, attention_mask: Any
    ) -> list[list[int]]:
        if (prompt is None) == (input_ids is None):
            given = "neither" if prompt is None else "both"
            raise InputError(f"Got {given} of a prompt and input_ids; give exactly one.")
        if prompt is None:
            return _rows(input_ids, attention_mask)
        if attention_mask is not None:
            raise InputError("attention_mask goes with input_ids; a text has no padding.")
        if not isinstance(prompt, Iterable):
            raise InputError(f"The prompt is {type(prompt).__name__}; expected a text or several.")
        tokenizer = self._needed_tokenizer()
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(
                    f"Prompt {row} is {type(text).__name__}; expected a text. Ids go into "
                    "input_ids=[[...], ...]."
                )
        return [tokenizer.encode(text) for text in texts]

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                "This checkpoint has no tokenizer, so it cannot read a text. Give "
                "input_ids=[[...], ...], or put its tokenizer.model into the folder."
            )
        return self.tokenizer

    def _generation(self, prompt: list[int], result: GeneratedIds, seed: int | None) -> Generation:
        text = ""
        if self.tokenizer is not None:
            text = self.tokenizer.decode(list(result.token_ids), skip_special_tokens=True)
        return Generation(
            text=text,
            token_ids=result.token_ids,
            prompt_token_ids=tuple(prompt),
            finish_reason=result.finish_reason,
            logprobs=result.logprobs,
            seed=seed,
        )


def _pieces(tokens: Iterator[NewToken], decoder: IncrementalDecoder) -> Iterator[TextPiece]:
    reason = None
    for token in tokens:
        reason = token.finish_reason
        yield TextPiece(text=decoder.push(token.token_id), token_id=token.token_id)
    yield TextPiece(text=decoder.finish(), token_id=None, finish_reason=reason)


def _rows(input_ids: Any, attention_mask: Any) -> list[list[int]]:
    """The real tokens of each row, as plain integers."""
    rows = [_row("input_ids", i, row) for i, row in enumerate(_iterated("input_ids", input_ids))]
    if attention_mask is None:
        return [row.tolist() for row in rows]
    masks = [
        _row("attention_mask", i, row)
        for i, row in enumerate(_iterated("attention_mask", attention_mask))
    ]
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise InputError(
            f"attention_mask has rows of {[len(mask) for mask in masks]} tokens and input_ids of "
            f"{[len(row) for row in rows]}; expected the same."
        )
    for i, mask in enumerate(masks):
        if not np.isin(mask, (0, 1)).all():
            raise InputError(f"attention_mask[{i}] holds values other than 0 and 1.")
    return [row[mask.astype(np.bool_)].tolist() for row, mask in zip(rows, masks, strict=True)]


def _iterated(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise InputError(f"{name} is {type(value).__name__}; expected rows of integers.")
    return list(value)


def _row(name: str, index: int, value: Any) -> np.ndarray:
    try:
        row = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}[{index}] cannot become an array ({error}).") from error
    whole = row.size == 0 or np.issubdtype(row.dtype, np.integer)
    if row.ndim != 1 or not (whole or (name == "attention_mask" and row.dtype == np.bool_)):
        raise InputError(
            f"{name}[{index}] is {row.dtype} of shape {row.shape}; expected a row of integers, as "
            f"in {name}=[[2, 5, 9], [2, 7]]."
        )
    return row


def _end_of_turn(tokenizer: Tokenizer | None) -> tuple[int, ...]:
    token_id = None if tokenizer is None else tokenizer.token_to_id(END_OF_TURN)
    is_special = tokenizer is not None and token_id in tokenizer.special_token_ids
    return (token_id,) if token_id is not None and is_special else ()
