"""LoadedModel: what every task has in common: a checkpoint on a backend, to run, train and save."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gemma_hub.backend import Model, SupportsExport, SupportsGradients
from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError, TokenizerError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights, number_of_parameters
from gemma_hub.plugins.registry import LoadedBackend
from gemma_hub.probe import (
    PROBE_FILE,
    Probe,
    Verification,
    probe_of_model,
    reference_probe,
    verify,
)
from gemma_hub.tokenizers import Tokenizer

_SMALL = 50_000_000  # parameters: the reference makes a probe of so many in a few seconds
BATCH_SIZE = 8
"""Texts that run at once unless the call says otherwise."""


class LoadedModel:
    """A model that is built, with its tokenizer. `gemma_hub.Gemma.load` makes one.

    Attributes:
        task: what it was built for, a key of `gemma_hub.config.ARCHITECTURES`.
        model: the framework's own module (torch.nn.Module, flax.nnx.Module).
        contract: the backend's `gemma_hub.backend.Model` around it.
        config: the model's hyper-parameters.
        tokenizer: None where the checkpoint has none; then it reads no texts.
        backend: name, distribution and version of what runs it.
        dtype: compute and storage type, a key of `gemma_hub.parameters.DTYPES`.
        verification: what came of `Gemma.load(..., verify=True)`; None without that.
    """

    task: ClassVar[str]

    def __init__(
        self,
        contract: Model,
        config: GemmaConfig,
        *,
        backend: LoadedBackend,
        dtype: str,
        tokenizer: Tokenizer | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        """A task over a model that is built already.

        Args:
            contract: what the backend's `build` returned.
            config: the model's.
            backend: what built it.
            dtype: what it was built in.
            tokenizer: of the same checkpoint, if it has one.
            files: {name: file} of what `save` puts beside the weights, such as tokenizer.model.
        """
        self.contract = contract
        self.model = contract.native
        self.config = config
        self.backend = backend
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.verification: Verification | None = None
        self._files = dict(files or {})

    @property
    def device(self) -> str:
        """Where the model is, in the framework's words."""
        return self.contract.device

    def __repr__(self) -> str:
        count = number_of_parameters(self.config, self.task)
        return (
            f"{type(self).__name__}(backend={self.backend.name!r}, dtype={self.dtype!r}, "
            f"device={self.device!r}, parameters={count:_})"
        )

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
    ) -> ModelOutputs:
        """The task's result for whole sequences, and the loss where labels are given.

        Arguments and errors are those of `ModelInputs.prepare`.

        Returns:
            The backend's own arrays; `.to_numpy()` gives the same record in NumPy.

        Raises:
            UnsupportedFeature: the backend lacks what was asked for.
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
        )

    def _forward(self, **arguments: Any) -> ModelOutputs:
        for argument, feature, advice in (
            ("inputs_embeds", "inputs_embeds", "Give input_ids."),
            ("output_attentions", "attentions", "Leave output_attentions out."),
        ):
            wanted = arguments.get(argument)
            is_wanted = wanted is not None and wanted is not False
            if is_wanted and feature not in self.backend.spec.features:
                raise UnsupportedFeature(feature, self.backend.name, advice)
        inputs = ModelInputs.prepare(self.config, task=self.task, **arguments)
        outputs = self.contract.forward(inputs)
        if inputs.labels is not None and outputs.loss is None:
            raise UnsupportedFeature(
                f"loss:{self.task}", self.backend.name, "Leave the labels out, or change backends."
            )
        return outputs

    def loss_and_gradients(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        labels: Any,
        num_items_in_batch: int | None = None,
    ) -> tuple[float, dict[str, Any]]:
        """The loss of one batch, and its gradient by every parameter. Nothing is dropped.

        Arguments and errors are those of `ModelInputs.prepare`.

        Returns:
            The loss, and {canonical parameter name: gradient} in the backend's own arrays.

        Raises:
            UnsupportedFeature: the backend has no gradients.
        """
        if not isinstance(self.contract, SupportsGradients):
            raise UnsupportedFeature("gradients", self.backend.name, "Train on another backend.")
        if labels is None:
            raise InputError("labels is None; a loss needs labels.")
        inputs = ModelInputs.prepare(
            self.config,
            input_ids,
            attention_mask,
            position_ids,
            task=self.task,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
        )
        return self.contract.loss_and_gradients(inputs)

    def save(self, path: str | Path, *, overwrite: bool = False, probe: bool = True) -> None:
        """Write a checkpoint folder in the Hugging Face layout, tokenizer files included.

        Args:
            path: the folder to make.
            overwrite: replace a checkpoint that is there already.
            probe: write gemma_hub_probe.json, by which the checkpoint can be verified wherever it
                is loaded. The float64 reference makes it for a small model where it is installed,
                this model itself otherwise. A model whose results are not finite gets none.

        Raises:
            UnsupportedFeature: the backend cannot give its parameters back.
            CheckpointError: there is something at `path`, or it cannot be written.
        """
        if not isinstance(self.contract, SupportsExport):
            raise UnsupportedFeature(
                "export", self.backend.name, "Load the checkpoint with another backend to save it."
            )
        weights = self.contract.export()
        made = self._probe(weights) if probe else None
        save_checkpoint(
            path,
            self.config,
            weights,
            task=self.task,
            files=self._files,
            overwrite=overwrite,
            records={PROBE_FILE: made.to_dict()} if made else None,
        )

    def _probe(self, weights: Weights) -> Probe | None:
        made = None
        if number_of_parameters(self.config, self.task) <= _SMALL:
            made = reference_probe(self.config, self.task, weights, self.dtype)
        return made or probe_of_model(
            self.contract, self.config, self.task, self.backend, self.dtype
        )

    def verify(self, probe: Probe) -> Verification:
        """Whether this model computes what `probe` says, in units of rounding noise.

        Raises:
            InputError: the probe is of another task.
        """
        return verify(self.contract, self.config, self.task, self.dtype, probe)

    # -- texts ---------------------------------------------------------------------------------

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                "This checkpoint has no tokenizer, so it cannot read a text. Give "
                "input_ids=[[...], ...], or put its tokenizer.model into the folder."
            )
        return self.tokenizer

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, <bos> in front."""
        tokenizer = self._needed_tokenizer()
        rows = [tokenizer.encode(text) for text in checked_texts(texts)]
        limit = self.config.max_position_embeddings
        for row, ids in enumerate(rows):
            if len(ids) > limit:
                raise CapacityError(
                    f"Text {row} has {len(ids)} tokens and this model has {limit} positions "
                    "(max_position_embeddings). Shorten it."
                )
        return rows

    def _batches(
        self, rows: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[tuple[list[int], np.ndarray, ModelOutputs]]:
        """Run rows of ids, those of like length together.

        Yields:
            The places of some rows in `rows`, their (B, T) bool mask, padded on the right, and
            the outputs in NumPy. A row's result depends on the others by rounding only.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected an integer from 1 up.")
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            length = max(len(rows[place]) for place in places)
            ids = np.full((len(places), length), self.config.pad_token_id or 0, np.int64)
            mask = np.zeros(ids.shape, np.bool_)
            for i, place in enumerate(places):
                ids[i, : len(rows[place])] = rows[place]
                mask[i, : len(rows[place])] = True
            outputs = self._forward(input_ids=ids, attention_mask=mask)
            yield places, mask, outputs.to_numpy()


def checked_texts(texts: Sequence[str]) -> list[str]:
    """`texts` as a list, once it is several texts.

    Raises:
        InputError: it is one text, or not all of it are texts.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        kind = type(texts).__name__
        raise InputError(f"The texts are {kind}; expected a list of texts, as in ['one', 'two'].")
    checked = list(texts)
    for place, text in enumerate(checked):
        if not isinstance(text, str):
            raise InputError(f"Text {place} is {type(text).__name__}; expected a text.")
    return checked
