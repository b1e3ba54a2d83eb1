"""What a case is: a named check of one behaviour, and what it is given to run on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Never

import numpy as np

from gemma_hub.backend import Backend, BuildOptions, Cache, Model, SupportsCache, TaskSpec
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parity.error_model import Judgement, judge, noise_band
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.rows import Batch


class CaseFailed(AssertionError):
    """A backend does not do what the case asks for; the message says what it did."""


@dataclass(frozen=True, slots=True)
class CaseSpec:
    """One case.

    Attributes:
        id: permanent; "L2.cache.chunks_of_3". The first part is its level: L1 contract,
            L2 meaning in float32, L3 narrower types, L4 generation.
        doc: one line, for the reference page.
        run: returns if the backend is right, raises `CaseFailed` if not.
        needs: features of `gemma_hub.backend.FEATURES` without which it does not apply.
        dtype: compute type that it runs in.
    """

    id: str
    doc: str
    run: Callable[["CaseContext"], None]
    needs: frozenset[str] = frozenset()
    dtype: str = "float32"

    @property
    def level(self) -> int:
        """1 to 4."""
        return int(self.id[1])


@dataclass
class Subject:
    """The backend under test, with the models that the cases share.

    Attributes:
        name: the backend's name.
        backend: the object with `build`.
        features: what it claims.
        dtypes: compute types that it claims.
        extra: `BuildOptions.extra` for every model.
    """

    name: str
    backend: Backend
    features: frozenset[str]
    dtypes: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    _models: dict[tuple[str, str], Model] = field(default_factory=dict)

    def options(self, dtype: str) -> BuildOptions:
        """What every model is built with."""
        return BuildOptions(dtype=dtype, extra=self.extra)

    def model(self, checkpoint: DesignedCheckpoint, dtype: str) -> Model:
        """The model of a checkpoint, built once."""
        key = (checkpoint.name, dtype)
        if key not in self._models:
            self._models[key] = self.backend.build(
                checkpoint.config, TaskSpec(), checkpoint.weights(dtype), self.options(dtype)
            )
        return self._models[key]


@dataclass
class CaseContext:
    """What a case runs on, and what it found.

    Attributes:
        subject: the backend.
        oracle: what is right.
        dtype: compute type of this case.
        judgements: every comparison that was made, in order.
    """

    subject: Subject
    oracle: Oracle
    dtype: str = "float32"
    judgements: list[Judgement] = field(default_factory=list)

    def model(self, checkpoint: DesignedCheckpoint) -> Model:
        """The subject's model of `checkpoint` in the case's compute type."""
        return self.subject.model(checkpoint, self.dtype)

    def cached_model(self, checkpoint: DesignedCheckpoint) -> SupportsCache:
        """The same, as a model with a cache."""
        model = self.model(checkpoint)
        if not isinstance(model, SupportsCache):
            self.fail("the backend claims 'cache' and its model has no init_cache and extend")
        return model

    def forward(self, checkpoint: DesignedCheckpoint, batch: Batch, **wanted: Any) -> ModelOutputs:
        """The subject's outputs for `batch`, in NumPy. `wanted` goes to `ModelInputs.prepare`."""
        inputs = prepare(checkpoint, batch, **wanted)
        return self.model(checkpoint).forward(inputs).to_numpy()

    def extend(
        self,
        checkpoint: DesignedCheckpoint,
        batch: Batch,
        chunks: list[int],
        capacity: int,
    ) -> np.ndarray:
        """(B, T, V) logits of `batch` fed through a fresh cache, `chunks` slots at a time."""
        model = self.cached_model(checkpoint)
        cache = model.init_cache(len(batch.rows), capacity)
        parts, start = [], 0
        for size in chunks:
            outputs, cache = model.extend(step(checkpoint, batch, start, size, cache), cache)
            parts.append(outputs.to_numpy().logits)
            start += size
        return np.concatenate(parts, axis=1)

    def judge_logits(
        self, logits: np.ndarray, checkpoint: DesignedCheckpoint, batch: Batch
    ) -> None:
        """Fail unless the (B, T, V) logits of every real token are right up to rounding."""
        expected_shape = (*batch.mask.shape, checkpoint.config.vocab_size)
        self.require(
            logits.shape == expected_shape,
            f"the logits have shape {logits.shape}; expected {expected_shape}",
        )
        truth = self.oracle.truth(checkpoint, batch.rows, self.dtype)
        self.compare("logits", logits[batch.mask], truth.logits, truth.witness_logits)

    def compare(
        self,
        what: str,
        found: np.ndarray,
        reference: np.ndarray,
        witnesses: tuple[np.ndarray, ...],
    ) -> None:
        """Fail unless `found` (n, ...) is within the noise band of `reference`."""
        judgement = judge(found, reference, noise_band(reference, witnesses))
        self.judgements.append(judgement)
        self.require(judgement.passed, f"{what}: {judgement.reason}")

    def require(self, condition: bool, message: str) -> None:
        """Fail with `message` unless `condition`."""
        if not condition:
            self.fail(message)

    def fail(self, message: str) -> Never:
        """The case failed."""
        raise CaseFailed(message)


def prepare(checkpoint: DesignedCheckpoint, batch: Batch, **wanted: Any) -> ModelInputs:
    """`batch` as a backend receives it."""
    return ModelInputs.prepare(
        checkpoint.config, batch.input_ids, batch.mask, batch.position_ids, **wanted
    )


def step(
    checkpoint: DesignedCheckpoint,
    batch: Batch,
    start: int,
    size: int,
    cache: Cache,
    **wanted: Any,
) -> ModelInputs:
    """Slots `start` to `start + size` of `batch` as a backend receives them after `cache`."""
    part = slice(start, start + size)
    positions = batch.position_ids
    return ModelInputs.prepare(
        checkpoint.config,
        batch.input_ids[:, part],
        batch.mask[:, part],
        None if positions is None else positions[:, part],
        next_position=cache.next_position,
        **wanted,
    )
