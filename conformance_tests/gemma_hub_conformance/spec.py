"""What a case is: a named check of one behaviour, and what it is given to run on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Never

import numpy as np

from gemma_hub.backend import Backend, BuildOptions, Cache, Model, SupportsCache, TaskSpec
from gemma_hub.error_model import Judgement, judge, noise_band
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.package import Package
from gemma_hub_conformance.rows import Batch, Row
from gemma_hub_conformance.seeds import current_seed


class CaseFailed(AssertionError):
    """A backend does not do what the case asks for; the message says what it did."""


@dataclass(frozen=True, slots=True)
class CaseSpec:
    """One case.

    Attributes:
        id: permanent; "L2.cache.chunks_of_3". The first part is its level: L0 package, L1 contract,
            L2 meaning in float32, L3 narrower types, L4 generation, L5 heads, losses and gradients,
            L6 checkpoints, L7 tokenizer.
        doc: one line, for the reference page.
        run: returns if the backend is right, raises `CaseFailed` if not.
        needs: what it does not apply without: features of `gemma_hub.backend.FEATURES`, and
            "task:NAME" for a task other than causal_lm.
        dtype: compute type that it runs in.
    """

    id: str
    doc: str
    run: Callable[["CaseContext"], None]
    needs: frozenset[str] = frozenset()
    dtype: str = "float32"

    @property
    def level(self) -> int:
        """0 to 7."""
        return int(self.id[1])


@dataclass
class Subject:
    """The backend under test, with the models that the cases share.

    Attributes:
        name: the backend's name.
        backend: the object with `build`.
        features: what it claims.
        dtypes: compute types that it claims; with `extra`, those that it still has.
        extra: `BuildOptions.extra` for every model.
        tasks: tasks that it claims.
        distribution: that ships the backend; empty for one that is not installed.
        version: of that distribution.
        device: `BuildOptions.device` for every model.
        package: how a new process loads it; None for one that is not installed, which cannot pass
            the cases of L0.
        time_limit: seconds that one case may take, or a new process.
        harm: what it did that made the run stop; empty while it may go on.
    """

    name: str
    backend: Backend
    features: frozenset[str]
    dtypes: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("causal_lm",)
    distribution: str = ""
    version: str = ""
    device: str = "auto"
    package: Package | None = None
    time_limit: float = 600.0
    harm: str = ""
    _models: dict[tuple[str, str, int], Model] = field(default_factory=dict)

    @property
    def claims(self) -> frozenset[str]:
        """Everything that a case may need and this backend says it has."""
        return self.features | {f"task:{task}" for task in self.tasks}

    def options(self, dtype: str) -> BuildOptions:
        """What every model is built with."""
        return BuildOptions(dtype=dtype, device=self.device, extra=self.extra)

    def model(self, checkpoint: DesignedCheckpoint, dtype: str) -> Model:
        """The model of a checkpoint, built once."""
        key = (checkpoint.name, dtype, current_seed())
        if key not in self._models:
            self._models[key] = self.backend.build(
                checkpoint.config,
                TaskSpec(checkpoint.task),
                checkpoint.weights(dtype),
                self.options(dtype),
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
        layers: ratio of each hidden state, where the case compares them.
        values: how many numbers the comparisons were about.
        requirements: how many conditions were checked, those of the comparisons included.
    """

    subject: Subject
    oracle: Oracle
    dtype: str = "float32"
    judgements: list[Judgement] = field(default_factory=list)
    layers: tuple[float, ...] = ()
    values: int = 0
    requirements: int = 0

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
        """Fail unless the (B, T, C) logits of every real token are right up to rounding."""
        truth = self.oracle.truth(checkpoint, batch.rows, self.dtype)
        self.require_shape("the logits", logits, (*batch.mask.shape, truth.logits.shape[-1]))
        self.compare("logits", logits[batch.mask], truth.logits, truth.witness_logits)

    def judge_rows(
        self, logits: np.ndarray, checkpoint: DesignedCheckpoint, rows: Sequence[Row]
    ) -> None:
        """Fail unless the (B, C) logits of `rows` by a sequence classifier are right."""
        truth = self.oracle.truth(checkpoint, rows, self.dtype)
        self.require_shape("the logits", logits, truth.logits.shape)
        self.compare("logits", logits, truth.logits, truth.witness_logits)

    def require_shape(self, what: str, found: np.ndarray | None, expected: tuple[int, ...]) -> None:
        """Fail unless the array has the shape."""
        self.require(
            found is not None and found.shape == expected,
            f"{what} have shape {getattr(found, 'shape', None)}; expected {expected}",
        )

    def compare(
        self,
        what: str,
        found: np.ndarray,
        reference: np.ndarray,
        witnesses: tuple[np.ndarray, ...],
    ) -> None:
        """Fail unless `found` (n, ...) is within the noise band of `reference`."""
        judgement = self.judged(found, reference, witnesses)
        self.require(judgement.passed, f"{what}: {judgement.reason}")

    def judged(
        self, found: np.ndarray, reference: np.ndarray, witnesses: tuple[np.ndarray, ...]
    ) -> Judgement:
        """The verdict on `found` (n, ...), noted and not acted on."""
        judgement = judge(found, reference, noise_band(reference, witnesses))
        self.judgements.append(judgement)
        self.values += reference.size
        return judgement

    def compare_layers(
        self,
        found: Sequence[np.ndarray],
        reference: Sequence[np.ndarray],
        witnesses: Sequence[Sequence[np.ndarray]],
    ) -> None:
        """Fail unless every hidden state is within its noise band; keep all their ratios.

        Args:
            found: the embedding, the layers' outputs and the final norm's, (n, D) each.
            reference: likewise.
            witnesses: for each witness the same.
        """
        own = list(zip(*witnesses, strict=True))
        bands = [noise_band(true, each) for true, each in zip(reference, own, strict=True)]
        # Before the first that is wrong ends the case: a report shows the way to the last.
        self.layers = tuple(
            judge(*each).ratio for each in zip(found, reference, bands, strict=True)
        )
        for index, state in enumerate(found):
            self.compare(f"hidden_states[{index}]", state, reference[index], own[index])

    def require(self, condition: bool, message: str) -> None:
        """Fail with `message` unless `condition`."""
        self.requirements += 1
        if not condition:
            self.fail(message)

    def fail(self, message: str) -> Never:
        """The case failed."""
        raise CaseFailed(message)


def prepare(checkpoint: DesignedCheckpoint, batch: Batch, **wanted: Any) -> ModelInputs:
    """`batch` as a backend receives it."""
    return ModelInputs.prepare(
        checkpoint.config,
        batch.input_ids,
        batch.mask,
        batch.position_ids,
        task=checkpoint.task,
        **wanted,
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
