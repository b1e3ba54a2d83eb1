"""Small experiments on a subject: part of a model, other weights, other tokens; right or wrong?"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from gemma_hub.backend import Model, SupportsCache, TaskSpec
from gemma_hub.error_model import Judgement, judge, noise_band
from gemma_hub.labels import IGNORED
from gemma_hub.parameters import DTYPES, ArrayWeights, Weights, parameter_shapes
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.diagnosis.crashes import Crash, crash_of
from gemma_hub_conformance.diagnosis.recording import residual
from gemma_hub_conformance.diagnosis.watching import GRADIENTS, Seen
from gemma_hub_conformance.oracle import Oracle, Truth
from gemma_hub_conformance.rows import Batch, Row
from gemma_hub_conformance.spec import Subject, prepare, step
from gemma_hub_conformance.time_limit import TimedOut, time_limit

Found = TypeVar("Found")

MAX_SECONDS = 60.0
"""Time for one experiment; a backend that needs more hangs."""

BRANCHES = ("self_attn.o_proj", "mlp.down_proj")
"""The last matrix of each branch of a layer: where it is zero, the branch adds nothing."""


@dataclass(frozen=True, slots=True)
class Part(DesignedCheckpoint):
    """A checkpoint with weights of its own.

    Attributes:
        arrays: every parameter that the config and the task call for.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def weights(self, dtype: str = "float32") -> Weights:
        kind = DTYPES[dtype]
        return ArrayWeights({name: x.astype(kind, copy=False) for name, x in self.arrays.items()})


def changed(
    checkpoint: DesignedCheckpoint,
    label: str,
    changes: Mapping[str, Callable[[np.ndarray], np.ndarray]],
) -> Part:
    """`checkpoint` with some parameters changed.

    Args:
        checkpoint: where the others come from.
        label: tells this change from others; part of the new name.
        changes: by parameter what to make of it; one that the checkpoint does not have is left out.
    """
    weights = checkpoint.weights()
    arrays = {name: weights.read(name) for name in weights.names()}
    new = {name: np.asarray(make(arrays[name])) for name, make in changes.items() if name in arrays}
    return _part(checkpoint, label, checkpoint.config.num_hidden_layers, arrays | new)


def prefix(checkpoint: DesignedCheckpoint, layers: int) -> DesignedCheckpoint:
    """The model of the first `layers` layers, with the same final norm and head."""
    if layers == checkpoint.config.num_hidden_layers:
        return checkpoint
    weights = checkpoint.weights()
    arrays = {name: weights.read(name) for name in weights.names()}
    return _part(checkpoint, f"{layers}_layers", layers, arrays)


def hollow(checkpoint: DesignedCheckpoint) -> DesignedCheckpoint:
    """A model of two layers that add nothing: the embedding, the final norm and the head.

    Two, because the hidden states do not show the last layer's output by itself.
    """
    weights = checkpoint.weights()
    arrays = {name: weights.read(name) for name in weights.names()}
    first = "model.layers.0."
    second = {
        name.replace(first, "model.layers.1."): x
        for name, x in arrays.items()
        if name.startswith(first)
    }
    return emptied(_part(checkpoint, "hollow", 2, arrays | second), (0, 1))


def emptied(
    checkpoint: DesignedCheckpoint, layers: tuple[int, ...], branches: tuple[str, ...] = BRANCHES
) -> Part:
    """`checkpoint` with layers, or one branch of each, that add nothing."""
    names = [
        f"model.layers.{i}.{branch}.{kind}"
        for i in layers
        for branch in branches
        for kind in ("weight", "bias")
    ]
    label = f"no_{'_'.join(branches)}_in_{'_'.join(map(str, layers))}"
    return changed(checkpoint, label, dict.fromkeys(names, np.zeros_like))


def _part(
    checkpoint: DesignedCheckpoint, label: str, layers: int, arrays: Mapping[str, np.ndarray]
) -> Part:
    types = checkpoint.config.layer_types
    if types is not None:
        types = (*types[:layers], *types[:1] * (layers - len(types)))
    config = dataclasses.replace(checkpoint.config, num_hidden_layers=layers, layer_types=types)
    return Part(
        f"{checkpoint.name}+{label}",
        checkpoint.purpose,
        config,
        task=checkpoint.task,
        arrays={name: arrays[name] for name in parameter_shapes(config, checkpoint.task)},
    )


class Prober:
    """Runs a subject on experiments, and counts.

    Args:
        subject: the backend under test.
        dtype: compute type of every run.
        oracle: of another prober of the same inputs; a new one if None.

    Attributes:
        runs: models that were run so far.
    """

    def __init__(self, subject: Subject, dtype: str, oracle: Oracle | None = None) -> None:
        self.subject = subject
        self.dtype = dtype
        self.runs = 0
        self._raised: Crash | None = None
        # Of its own: what it holds of hundreds of small experiments goes with it.
        self.oracle = Oracle() if oracle is None else oracle

    def fails(self, seen: Seen) -> bool:
        """Whether the subject is wrong there, by more than rounding, or raises."""
        verdict = self.judgement(seen)
        return verdict is None or not verdict.passed

    def judgement(self, seen: Seen) -> Judgement | None:
        """The verdict on the logits, or on what the task has instead; None if it raised."""
        truth = self.truth(seen)
        found = self._attempt(lambda: self._found(self._model(seen.checkpoint), seen, truth))
        if found is None:
            return None
        return judge(found, truth.logits, noise_band(truth.logits, truth.witness_logits))

    def residual(self, seen: Seen) -> np.ndarray | None:
        """The errors in units of their noise, as in `Observation`; None where nothing compares."""
        truth = self.truth(seen)
        found = self._attempt(lambda: self._found(self._model(seen.checkpoint), seen, truth))
        if found is None or found.shape != truth.logits.shape:
            return None
        return residual(found, truth.logits, noise_band(truth.logits, truth.witness_logits))

    def wrong_states(self, seen: Seen) -> tuple[bool, ...] | None:
        """For each of the hidden states whether it is wrong; None if there are none."""
        truth = self.truth(seen)
        inputs = prepare(seen.checkpoint, seen.batch, output_hidden_states=True)
        outputs = self._attempt(lambda: self._model(seen.checkpoint).forward(inputs).to_numpy())
        states = () if outputs is None else outputs.hidden_states or ()
        if len(states) != len(truth.states):
            return None
        mask = seen.batch.mask
        return tuple(
            state.shape[:2] != mask.shape
            or not judge(
                state[mask],
                truth.states[i],
                noise_band(truth.states[i], [each[i] for each in truth.witness_states]),
            ).passed
            for i, state in enumerate(states)
        )

    def first_wrong_call(self, seen: Seen) -> int | None:
        """The first call of a cached run whose logits are wrong; None if none is."""
        end = 0
        for number, size in enumerate(seen.chunks or ()):
            end += size
            part = first_slots(seen, end)
            if part is not None and self.fails(part):
                return number
        return None

    def crash(self, seen: Seen) -> Crash | None:
        """What the subject raises if it is called as it was; None if nothing."""
        self._attempt(lambda: self._call(seen))
        return self._raised

    def crash_in_build(self, checkpoint: DesignedCheckpoint) -> Crash | None:
        """What the subject raises where it builds the model; None if nothing."""
        self._attempt(lambda: self._model(checkpoint))
        return self._raised

    def wrong_gradients(self, seen: Seen) -> tuple[str, ...] | None:
        """Names of the parameters whose gradient is wrong; None where there are no gradients."""
        labels = labels_of(seen)
        own, divisor = _labels_by_row(seen, labels)
        if not divisor:
            return ()  # nothing counts
        found = self._attempt(lambda: self._gradients(seen, labels))
        if found is None:
            return None
        true, *others = self.oracle.gradients(seen.checkpoint, real_rows(seen), own, divisor)
        wrong = []
        for name, value in true.items():
            flat = value.reshape(1, -1)
            band = noise_band(flat, [each[name].reshape(1, -1) for each in others])
            if name not in found or not judge(found[name].reshape(1, -1), flat, band).passed:
                wrong.append(name)
        return tuple(wrong)

    def truth(self, seen: Seen) -> Truth:
        """What is right there."""
        return self.oracle.truth(seen.checkpoint, real_rows(seen), self.dtype)

    def _attempt(self, run: Callable[[], Found]) -> Found | None:
        """What `run` makes of the subject; None if it raised, which `_raised` then tells.

        Raises:
            TimedOut: it does not end, so it should not be called again.
        """
        self.runs += 1
        self._raised = None
        try:
            with time_limit(min(MAX_SECONDS, self.subject.time_limit)):
                return run()
        except (KeyboardInterrupt, TimedOut):
            raise
        except BaseException as error:  # noqa: BLE001 - a backend may raise anything, SystemExit too
            self._raised = crash_of(error, self.subject)
            return None

    def _call(self, seen: Seen) -> None:
        model = self._model(seen.checkpoint)
        inputs = prepare(seen.checkpoint, seen.batch, **wanted(seen))
        if seen.chunks is not None:
            _extended(model, seen, self.truth(seen))
        elif GRADIENTS in seen.asked:
            model.loss_and_gradients(inputs)  # type: ignore[attr-defined]
        else:
            model.forward(inputs).to_numpy()

    def _gradients(self, seen: Seen, labels: np.ndarray) -> dict[str, np.ndarray]:
        model = self._model(seen.checkpoint)
        inputs = prepare(seen.checkpoint, seen.batch, labels=labels)
        _, native = model.loss_and_gradients(inputs)  # type: ignore[attr-defined]
        return {name: np.asarray(model.to_numpy(array)) for name, array in native.items()}

    def _model(self, checkpoint: DesignedCheckpoint) -> Model:
        return self.subject.backend.build(
            checkpoint.config,
            TaskSpec(checkpoint.task),
            checkpoint.weights(self.dtype),
            self.subject.options(self.dtype),
        )

    def _found(self, model: Model, seen: Seen, truth: Truth) -> np.ndarray:
        """(n, C) as in `Truth.logits`; another shape where the subject's is another."""
        if seen.chunks is not None:
            return _extended(model, seen, truth)
        outputs = model.forward(prepare(seen.checkpoint, seen.batch)).to_numpy()
        if seen.checkpoint.task == "base":
            return _masked(outputs.last_hidden_state, seen)
        if seen.checkpoint.task == "sequence_classification":
            logits: np.ndarray = outputs.logits
            return logits[[bool(each.ids) for each in seen.batch.rows]]
        return _masked(outputs.logits, seen)


def wanted(seen: Seen) -> dict[str, Any]:
    """What `ModelInputs.prepare` is told to ask for the same things again."""
    found: dict[str, Any] = {
        name: True for name in ("output_hidden_states", "output_attentions") if name in seen.asked
    }
    if "labels" in seen.asked:
        found["labels"] = labels_of(seen)
    if "logits_to_keep" in seen.asked:
        found["logits_to_keep"] = 1
    return found


def labels_of(seen: Seen) -> np.ndarray:
    """Labels for an input, made from its ids, so that a part of it keeps its own.

    They have the form that the task asks for; where tokens have labels every fifth id has none.
    """
    config, batch = seen.checkpoint.config, seen.batch
    if seen.checkpoint.task == "sequence_classification":
        rows = np.array([sum(each.ids) for each in batch.rows])
        if config.problem_type in (None, "single_label_classification") and config.num_labels > 1:
            return rows % config.num_labels
        spread = (rows[:, None] + np.arange(config.num_labels)) % 3 / 2
        return spread.astype(np.float32)
    counts = batch.mask & (batch.input_ids % 5 != 0)
    if seen.checkpoint.task == "token_classification":
        return np.where(counts, batch.input_ids % config.num_labels, IGNORED)
    counts[:, 1:] &= batch.mask[:, :-1]
    return np.where(counts, batch.input_ids, IGNORED)


def _labels_by_row(seen: Seen, labels: np.ndarray) -> tuple[list[np.ndarray], int]:
    """The labels of each row without padding, and what their sum is divided by."""
    if seen.checkpoint.task == "sequence_classification":
        rows = [labels[b] for b, each in enumerate(seen.batch.rows) if each.ids]
        return rows, len(rows)
    rows = [labels[b, list(each.slots)] for b, each in enumerate(seen.batch.rows) if each.ids]
    first = 1 if seen.checkpoint.task == "causal_lm" else 0
    return rows, sum(int(np.count_nonzero(each[first:] != IGNORED)) for each in rows)


def first_slots(seen: Seen, end: int) -> Seen | None:
    """The first `end` slots, and the calls that filled them; None if there is no token."""
    batch = seen.batch
    rows = []
    for each in batch.rows:
        n = sum(slot < end for slot in each.slots)
        positions = None if each.positions is None else each.positions[:n]
        rows.append(Row(each.ids[:n], each.slots[:n], positions))
    if not any(each.ids for each in rows):
        return None
    chunks, filled = [], 0
    for size in seen.chunks or ():
        if filled < end:
            chunks.append(min(size, end - filled))
        filled += size
    shorter = dataclasses.replace(Batch.of(rows, end), input_ids=batch.input_ids[:, :end])
    return dataclasses.replace(
        seen, batch=shorter, chunks=None if seen.chunks is None else tuple(chunks)
    )


def real_rows(seen: Seen) -> tuple[Row, ...]:
    """The rows that have tokens."""
    return tuple(each for each in seen.batch.rows if each.ids)


def _masked(found: np.ndarray, seen: Seen) -> np.ndarray:
    return found[seen.batch.mask] if found.shape[:2] == seen.batch.mask.shape else found


def _extended(model: Model, seen: Seen, truth: Truth) -> np.ndarray:
    """(n, V) logits through a fresh cache.

    Where a call is asked for its last logits only, the others stand as they should be.
    """
    if not isinstance(model, SupportsCache):
        raise TypeError("the model has no cache")
    mask = seen.batch.mask
    found = np.zeros((*mask.shape, truth.logits.shape[-1]))
    found[mask] = truth.logits
    keep = int("logits_to_keep" in seen.asked)
    cache, start = model.init_cache(*mask.shape), 0
    for size in seen.chunks or ():
        inputs = step(seen.checkpoint, seen.batch, start, size, cache, logits_to_keep=keep)
        outputs, cache = model.extend(inputs, cache)
        logits: np.ndarray = outputs.to_numpy().logits
        start += size
        place = slice(start - (keep or size), start)
        if logits.shape != found[:, place].shape:
            return logits
        found[:, place] = logits
    together: np.ndarray = found[mask]
    return together
