"""The contract of a backend: what a framework must offer to run Gemma.

A backend that has only `build` and `forward` is already useful; everything else is a feature that
its `BackendSpec` names. See docs/reference/backend-contract.md.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError, InputError
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import Weights

FEATURES: dict[str, str] = {
    "cache": "init_cache and extend: prefill, chunked prefill and decode",
    "export": "export: the parameters back as Weights, so that any backend can save",
    "inputs_embeds": "forward from embeddings instead of ids",
    "sliding_window": "layers that see only the latest tokens",
    "softcap": "tanh caps on attention scores and logits",
    "qk_norm": "RMSNorm on queries and keys",
}
"""Everything that a backend may or may not do, by name."""


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What a model is built for. `name` is one of the registered tasks ("causal_lm")."""

    name: str = "causal_lm"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build a model.

    Attributes:
        dtype: compute and storage type, a key of `gemma_hub.parameters.DTYPES`; resolved already.
        device: "auto", or one of the backend's `devices()`.
        extra: options of one backend only, by its own names.
    """

    dtype: str
    device: str = "auto"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of the tokens seen so far, with the book-keeping that all backends share.

    Token t of a call goes to slot `length + t` in every row, padding included; `valid` says which
    slots hold real tokens. A query sees the valid slots up to its own.

    Attributes:
        arrays: the backend's own storage. `extend` may overwrite it: the cache that was passed in
            must not be used again.
        valid: (B, capacity) bool.
        length: number of slots used.
        next_position: (B,) int64, position of each row's next real token.
    """

    arrays: Any
    valid: np.ndarray
    length: int
    next_position: np.ndarray

    @classmethod
    def empty(cls, arrays: Any, batch_size: int, max_length: int) -> Self:
        """A cache of `max_length` slots that holds nothing yet."""
        if (
            type(batch_size) is not int
            or type(max_length) is not int
            or min(batch_size, max_length) < 1
        ):
            raise InputError(
                f"A cache of batch_size={batch_size!r} and max_length={max_length!r} was asked "
                "for; both must be integers from 1 up."
            )
        valid = np.zeros((batch_size, max_length), np.bool_)
        return cls(arrays, valid, 0, np.zeros(batch_size, np.int64))

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return int(self.valid.shape[1])

    def admit(self, inputs: ModelInputs) -> np.ndarray:
        """(B, capacity) bool: the valid slots once `inputs` are stored.

        Call it first thing in `extend`.

        Raises:
            InputError: the batch size differs from the cache's.
            CapacityError: the tokens do not fit.
        """
        batch, new = inputs.shape
        if batch != len(self.valid):
            raise InputError(f"The inputs have {batch} rows and the cache {len(self.valid)}.")
        if self.length + new > self.capacity:
            raise CapacityError(
                f"The cache holds {self.length} of {self.capacity} tokens and {new} more do not "
                "fit. Make a larger one with init_cache(batch_size, max_length)."
            )
        valid = self.valid.copy()
        valid[:, self.length : self.length + new] = inputs.attention_mask
        return valid

    def advanced(self, inputs: ModelInputs, arrays: Any) -> Self:
        """The cache after `inputs` were stored in `arrays`."""
        latest = np.where(inputs.attention_mask, inputs.position_ids, -1).max(axis=1)
        return dataclasses.replace(
            self,
            arrays=arrays,
            valid=self.admit(inputs),
            length=self.length + inputs.shape[1],
            next_position=np.where(latest >= 0, latest + 1, self.next_position),
        )


@runtime_checkable
class Model(Protocol):
    """One checkpoint, built on one device. Arrays in and out of it are the framework's own.

    Attributes:
        native: the framework's module (torch.nn.Module, flax.nnx.Module), for the user.
        device: where it is, in the framework's words.
    """

    native: Any
    device: str

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        """Logits of whole sequences, without a cache."""
        ...

    def to_numpy(self, array: Any) -> np.ndarray:
        """One of this model's arrays in NumPy; bfloat16 and float16 become float32."""
        ...


@runtime_checkable
class SupportsCache(Protocol):
    """The "cache" feature."""

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache."""
        ...

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        """Outputs for tokens that follow those in the cache, and the cache with them in it."""
        ...


@runtime_checkable
class SupportsExport(Protocol):
    """The "export" feature."""

    def export(self) -> Weights:
        """The parameters under their canonical names, in the dtype they have in memory."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A framework that can run Gemma."""

    def devices(self) -> Sequence[str]:
        """Devices that `build` accepts, the default first."""
        ...

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> Model:
        """A model that holds `weights`; never a second copy of them."""
        ...
