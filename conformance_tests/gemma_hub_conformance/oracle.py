"""What is right: the float64 reference and its witnesses, computed once for each row.

The truth of a row is computed for that row alone, without padding and without a cache, so a
backend's batches, padding and cache are compared with something that has none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.rows import Row
from gemma_hub_numpy.model import Reference, Witness

WITNESSES = 8
_FIRST_SEED = 7001  # far from the seeds that a user of the numpy backend would choose


@dataclass(frozen=True, slots=True)
class Truth:
    """The reference's result and the witnesses', for n real tokens.

    Attributes:
        logits: (n, V) float64.
        states: num_hidden_layers + 1 arrays (n, D) float64.
        witness_logits: WITNESSES arrays (n, V).
        witness_states: for each witness its states.
    """

    logits: np.ndarray
    states: tuple[np.ndarray, ...]
    witness_logits: tuple[np.ndarray, ...]
    witness_states: tuple[tuple[np.ndarray, ...], ...]


class Oracle:
    """Truths by checkpoint, row and precision; kept in memory."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], tuple[Reference, ...]] = {}
        self._truths: dict[tuple[str, Row, str], Truth] = {}

    def truth(self, checkpoint: DesignedCheckpoint, rows: Sequence[Row], dtype: str) -> Truth:
        """The truth of `rows`, one after the other: n is the number of all their tokens."""
        parts = [self._row(checkpoint, each, dtype) for each in rows]
        return Truth(
            np.concatenate([part.logits for part in parts]),
            _joined([part.states for part in parts]),
            _joined([part.witness_logits for part in parts]),
            tuple(
                _joined(states) for states in zip(*(p.witness_states for p in parts), strict=True)
            ),
        )

    def _row(self, checkpoint: DesignedCheckpoint, row: Row, dtype: str) -> Truth:
        key = (checkpoint.name, Row(row.ids, (), row.positions), dtype)
        if key not in self._truths:
            inputs = ModelInputs.prepare(
                checkpoint.config,
                [row.ids],
                position_ids=None if row.positions is None else [row.positions],
                output_hidden_states=True,
            )
            results = [model.run(inputs) for model in self._built(checkpoint, dtype)]
            logits = tuple(result.logits[0] for result in results)
            states = tuple(
                tuple(state[0] for state in result.hidden_states or ()) for result in results
            )
            self._truths[key] = Truth(logits[0], states[0], logits[1:], states[1:])
        return self._truths[key]

    def _built(self, checkpoint: DesignedCheckpoint, dtype: str) -> tuple[Reference, ...]:
        """The reference and then the witnesses, on weights already rounded to `dtype`."""
        key = (checkpoint.name, dtype)
        if key not in self._models:
            config, weights = checkpoint.config, checkpoint.weights(dtype)
            seeds = range(_FIRST_SEED, _FIRST_SEED + WITNESSES)
            witnesses = (Witness(config, weights, dtype, seed) for seed in seeds)
            self._models[key] = (Reference(config, weights), *witnesses)
        return self._models[key]


def _joined(parts: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
