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
    "cache_rows": "gather_rows: caches made of the rows of others; extend from a shortened cache",
    "greedy_steps": "greedy_steps: several steps of greedy decoding in one call",
    "export": "export: the parameters back as Weights, so that any backend can save",
    "gradients": "loss_and_gradients: the loss, and its gradient for every parameter",
    "attentions": "every layer's attention probabilities",
    "inputs_embeds": "forward from embeddings instead of ids",
    "sliding_window": "layers that see only the latest tokens",
    "softcap": "tanh caps on attention scores and logits",
    "qk_norm": "RMSNorm on queries and keys",
}
"""Everything that a backend may or may not do, by name."""


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What a model is built for.

    Attributes:
        name: a key of `gemma_hub.config.ARCHITECTURES`: "base", "causal_lm",
            "sequence_classification" or "token_classification". The number of labels is
            `config.num_labels`.
    """

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
        self._check_room(new)
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

    def stepped(self, running: np.ndarray, count: int, arrays: Any) -> Self:
        """The cache after `count` tokens of each running row, one at a time, for `greedy_steps`.

        Args:
            running: (B,) bool; the other rows had padding in their place.
            count: of steps, 0 or more.
            arrays: with these tokens in them.

        Raises:
            CapacityError: the tokens do not fit.
        """
        self._check_room(count)
        valid = self.valid.copy()
        valid[:, self.length : self.length + count] = running[:, None]
        return dataclasses.replace(
            self,
            arrays=arrays,
            valid=valid,
            length=self.length + count,
            next_position=np.where(running, self.next_position + count, self.next_position),
        )

    def _check_room(self, new: int) -> None:
        if self.length + new > self.capacity:
            raise CapacityError(
                f"The cache holds {self.length} of {self.capacity} tokens and {new} more do not "
                "fit. Make a larger one with init_cache(batch_size, max_length)."
            )

    def shortened(self, counts: np.ndarray) -> Self:
        """The cache without the latest tokens of each row, whose positions must be consecutive.

        Only for a model with the "cache_rows" feature: the arrays are the same ones.

        Args:
            counts: (B,) how many real tokens each row forgets.
        """
        # The last `counts` real slots of a row: those with fewer real ones behind them.
        behind = self.valid[:, ::-1].cumsum(axis=1)[:, ::-1]
        valid = self.valid & (behind > counts[:, None])
        used = np.flatnonzero(valid.any(axis=0))
        return dataclasses.replace(
            self,
            valid=valid,
            length=int(used[-1]) + 1 if len(used) else 0,
            next_position=self.next_position - counts,
        )

    @classmethod
    def gathered(
        cls, caches: Sequence[Self], rows: Sequence[tuple[int, int]], max_length: int
    ) -> tuple[Self, np.ndarray]:
        """The book of a cache that is made of rows of others, for `gather_rows`.

        Args:
            caches: where the rows come from.
            rows: for each new row the index of its cache and of its row there.
            max_length: slots of the new cache.

        Returns:
            The cache without arrays: each row's real tokens in their order, all rows ending in the
            same slot. And (B, max_length) int64: which slot each slot comes from, counted over
            the rows of all caches end to end; -1 for one that stays empty.

        Raises:
            CapacityError: a row has more tokens than `max_length`.
        """
        firsts = np.cumsum([0, *(cache.valid.size for cache in caches)])
        held = [np.flatnonzero(caches[place].valid[row]) for place, row in rows]
        length = max(map(len, held))
        if length > max_length:
            raise CapacityError(f"A row has {length} tokens; {max_length} slots do not hold them.")
        slots = np.full((len(rows), max_length), -1, np.int64)
        for index, ((place, row), own) in enumerate(zip(rows, held, strict=True)):
            first = firsts[place] + row * caches[place].capacity
            slots[index, length - len(own) : length] = first + own
        position = np.array([caches[place].next_position[row] for place, row in rows])
        return cls(None, slots >= 0, length, position), slots


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
        """The task's result for whole sequences, without a cache; with labels the loss too."""
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
class SupportsCacheRows(SupportsCache, Protocol):
    """The "cache_rows" feature.

    `extend` takes `valid`, `length` and `next_position` from the cache that it is given, which may
    be one that `Cache.shortened` returned.
    """

    def gather_rows(
        self, caches: Sequence[Cache], rows: Sequence[tuple[int, int]], max_length: int
    ) -> Cache:
        """A new cache made of rows of others, which stay as they are; see `Cache.gathered`."""
        ...


@runtime_checkable
class SupportsGreedySteps(SupportsCache, Protocol):
    """The "greedy_steps" feature."""

    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> tuple[np.ndarray, Cache]:
        """Feed a token of each running row, then the one that it chooses, and so on.

        A step is `extend` with one token a row, where each running row then chooses the largest of
        its logits, of equal ones that with the lowest id. The call ends with the first step at
        which a row chooses a stop id.

        A step is not taken if a running row can choose nothing, because its logits hold NaN or
        +inf, or nothing but -inf. The call ends before it, and the returned cache is that before
        it, so that `extend` with the same tokens shows the logits.

        Args:
            token_ids: (B,) int64 ids of the vocabulary, the tokens to feed first.
            running: (B,) bool. Rows that do not run are fed masked padding.
            cache: consumed, as by `extend`; the positions of the new tokens are the model's.
            num_steps: 1 or more, the most steps to take.
            stops: ids of the vocabulary.

        Returns:
            (B, n) int64 ids that each step chose, -1 in rows that do not run, and the cache. The
            last of them have not been fed. n is at most `num_steps`, and 0 only if the first step
            is not taken; a backend may have a limit of its own.

        Raises:
            CapacityError: `num_steps` tokens do not fit into the cache.
        """
        ...


@runtime_checkable
class SupportsExport(Protocol):
    """The "export" feature."""

    def export(self) -> Weights:
        """The parameters under their canonical names, in the dtype they have in memory."""
        ...


@runtime_checkable
class SupportsGradients(Protocol):
    """The "gradients" feature."""

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, dict[str, Any]]:
        """The loss of `inputs.labels`, and {canonical name: gradient} for every parameter.

        Nothing is dropped and nothing changes: the same inputs give the same result. The gradients
        are the framework's own arrays, in the type and the shape of their parameters.
        """
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
