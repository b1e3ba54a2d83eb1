"""Small experiments on a subject: part of a model, other weights, other tokens; right or wrong?"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from gemma_hub.backend import Model, SupportsCache, TaskSpec
from gemma_hub.error_model import Judgement, judge, noise_band
from gemma_hub.parameters import DTYPES, ArrayWeights, Weights, parameter_shapes
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.diagnosis.recording import Seen, residual
from gemma_hub_conformance.oracle import Oracle, Truth
from gemma_hub_conformance.rows import Row
from gemma_hub_conformance.spec import Subject, prepare, step

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
        # Of its own: what it holds of hundreds of small experiments goes with it.
        self.oracle = Oracle() if oracle is None else oracle

    def fails(self, seen: Seen) -> bool:
        """Whether the subject is wrong there, by more than rounding, or raises."""
        verdict = self.judgement(seen)
        return verdict is None or not verdict.passed

    def judgement(self, seen: Seen) -> Judgement | None:
        """The verdict on the logits, or on what the task has instead; None if it raised."""
        self.runs += 1
        truth = self.truth(seen)
        try:
            found = self._found(self._model(seen.checkpoint), seen)
        except Exception:  # noqa: BLE001 - a backend may raise anything, and that is wrong here
            return None
        return judge(found, truth.logits, noise_band(truth.logits, truth.witness_logits))

    def residual(self, seen: Seen) -> np.ndarray | None:
        """The errors in units of their noise, as in `Observation`; None where nothing compares."""
        self.runs += 1
        truth = self.truth(seen)
        try:
            found = self._found(self._model(seen.checkpoint), seen)
        except Exception:  # noqa: BLE001 - as in `judgement`
            return None
        if found.shape != truth.logits.shape:
            return None
        return residual(found, truth.logits, noise_band(truth.logits, truth.witness_logits))

    def wrong_states(self, seen: Seen) -> tuple[bool, ...] | None:
        """For each of the hidden states whether it is wrong; None if there are none."""
        self.runs += 1
        truth = self.truth(seen)
        try:
            inputs = prepare(seen.checkpoint, seen.batch, output_hidden_states=True)
            outputs = self._model(seen.checkpoint).forward(inputs).to_numpy()
        except Exception:  # noqa: BLE001 - as above; then there is no trace
            return None
        states = outputs.hidden_states or ()
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

    def truth(self, seen: Seen) -> Truth:
        """What is right there."""
        return self.oracle.truth(seen.checkpoint, real_rows(seen), self.dtype)

    def _model(self, checkpoint: DesignedCheckpoint) -> Model:
        return self.subject.backend.build(
            checkpoint.config,
            TaskSpec(checkpoint.task),
            checkpoint.weights(self.dtype),
            self.subject.options(self.dtype),
        )

    def _found(self, model: Model, seen: Seen) -> np.ndarray:
        """(n, C) as in `Truth.logits`; another shape where the subject's is another."""
        if seen.chunks is not None:
            return _masked(_extended(model, seen), seen)
        outputs = model.forward(prepare(seen.checkpoint, seen.batch)).to_numpy()
        if seen.checkpoint.task == "base":
            return _masked(outputs.last_hidden_state, seen)
        if seen.checkpoint.task == "sequence_classification":
            logits: np.ndarray = outputs.logits
            return logits[[bool(each.ids) for each in seen.batch.rows]]
        return _masked(outputs.logits, seen)


def real_rows(seen: Seen) -> tuple[Row, ...]:
    """The rows that have tokens."""
    return tuple(each for each in seen.batch.rows if each.ids)


def _masked(found: np.ndarray, seen: Seen) -> np.ndarray:
    return found[seen.batch.mask] if found.shape[:2] == seen.batch.mask.shape else found


def _extended(model: Model, seen: Seen) -> np.ndarray:
    """(B, T, V) logits through a fresh cache."""
    if not isinstance(model, SupportsCache):
        raise TypeError("the model has no cache")
    cache = model.init_cache(*seen.batch.mask.shape)
    parts, start = [], 0
    for size in seen.chunks or ():
        outputs, cache = model.extend(step(seen.checkpoint, seen.batch, start, size, cache), cache)
        parts.append(outputs.to_numpy().logits)
        start += size
    return np.concatenate(parts, axis=1)
