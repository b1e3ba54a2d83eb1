"""What is right: the float64 reference and its witnesses, computed once for each row.

The truth of a row is computed for that row alone, without padding and without a cache, so a
backend's batches, padding and cache are compared with something that has none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.losses import Rounding
from gemma_hub_conformance.rows import Row
from gemma_hub_conformance.seeds import current_seed
from gemma_hub_numpy.model import Reference, Witness, round_randomly

WITNESSES = 8
_FIRST_SEED = 7001  # far from the seeds that a user of the numpy backend would choose


@dataclass(frozen=True, slots=True)
class Truth:
    """The reference's result and the witnesses', for n real tokens.

    Attributes:
        logits: (n, V) float64; of a token classifier (n, labels), of a sequence classifier
            (rows, labels), and of the task base the last of the states.
        states: num_hidden_layers + 1 arrays (n, D) float64.
        witness_logits: WITNESSES arrays like `logits`.
        witness_states: for each witness its states.
    """

    logits: np.ndarray
    states: tuple[np.ndarray, ...]
    witness_logits: tuple[np.ndarray, ...]
    witness_states: tuple[tuple[np.ndarray, ...], ...]


Gradients = dict[str, np.ndarray]
Found = tuple[dict[Any, Any], ...]
"""What an oracle knows: truths, attentions and gradients by their keys."""


class Oracle:
    """Truths by checkpoint, row, precision and seed of the run; kept in memory."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str, int], tuple[Reference, ...]] = {}
        self._truths: dict[tuple[str, Row, str, int], Truth] = {}
        self._attentions: dict[tuple[str, Row, int], tuple[tuple[np.ndarray, ...], ...]] = {}
        self._gradients: dict[tuple[object, ...], tuple[Gradients, ...]] = {}

    def learn(self, found: Found) -> None:
        """Keep what another oracle found; what is known already stays."""
        for own, new in zip(self._kept(), found, strict=True):
            for key, value in new.items():
                own.setdefault(key, value)

    def found_since(self, told: Sequence[int]) -> Found:
        """What it found after it knew `told` truths, attentions and gradients, for `learn`."""
        return tuple(
            dict(islice(each.items(), count, None))
            for each, count in zip(self._kept(), told, strict=True)
        )

    def _kept(self) -> tuple[dict[Any, Any], ...]:
        return self._truths, self._attentions, self._gradients

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

    def attentions(
        self, checkpoint: DesignedCheckpoint, each: Row
    ) -> tuple[tuple[np.ndarray, ...], ...]:
        """For the reference and each witness in float32 the layers' (N, n, n) probabilities."""
        key = (checkpoint.name, each, current_seed())
        if key not in self._attentions:
            inputs = _alone(checkpoint, each, output_attentions=True)
            results = [model.run(inputs) for model in self.models(checkpoint, "float32")]
            self._attentions[key] = tuple(
                tuple(layer[0] for layer in result.attentions or ()) for result in results
            )
        return self._attentions[key]

    def gradients(
        self,
        checkpoint: DesignedCheckpoint,
        rows: Sequence[Row],
        labels: Sequence[np.ndarray],
        divisor: int,
    ) -> tuple[Gradients, ...]:
        """The reference's and each float32 witness's gradients of the sum over `rows` / `divisor`.

        Args:
            checkpoint: the model.
            rows: the sequences; each is run alone.
            labels: for each row its own, one for each real token where the task's are by token.
            divisor: number of labels that count; of a sequence classifier the number of rows.
        """
        drawn = (checkpoint.name, current_seed())
        key = (*drawn, tuple(rows), *(each.tobytes() for each in labels), divisor)
        if key not in self._gradients:
            models = self.models(checkpoint, "float32")
            totals: list[Gradients] = [{} for _ in models]
            for each, own in zip(rows, labels, strict=True):
                by_token = checkpoint.task != "sequence_classification"
                items = {"num_items_in_batch": divisor} if by_token else {}
                inputs = _alone(checkpoint, each, labels=own[None], **items)
                for total, model in zip(totals, models, strict=True):
                    for name, value in model.loss_and_gradients(inputs)[1].items():
                        part = value if by_token else value / divisor
                        total[name] = total[name] + part if name in total else part
            self._gradients[key] = tuple(totals)
        return self._gradients[key]

    def _row(self, checkpoint: DesignedCheckpoint, row: Row, dtype: str) -> Truth:
        key = (checkpoint.name, Row(row.ids, (), row.positions), dtype, current_seed())
        if key not in self._truths:
            inputs = _alone(checkpoint, row, output_hidden_states=True)
            results = [model.run(inputs) for model in self.models(checkpoint, dtype)]
            states = tuple(
                tuple(state[0] for state in result.hidden_states or ()) for result in results
            )
            if checkpoint.task == "base":
                logits = tuple(each[-1] for each in states)
            elif checkpoint.task == "sequence_classification":
                logits = tuple(result.logits for result in results)
            else:
                logits = tuple(result.logits[0] for result in results)
            self._truths[key] = Truth(logits[0], states[0], logits[1:], states[1:])
        return self._truths[key]

    def models(self, checkpoint: DesignedCheckpoint, dtype: str) -> tuple[Reference, ...]:
        """The reference and then the witnesses, on weights already rounded to `dtype`."""
        key = (checkpoint.name, dtype, current_seed())
        if key not in self._models:
            config, weights = checkpoint.config, checkpoint.weights(dtype)
            task = checkpoint.task
            witnesses = (Witness(config, weights, dtype, seed, task) for seed in witness_seeds())
            self._models[key] = (Reference(config, weights, task), *witnesses)
        return self._models[key]


def witness_seeds() -> range:
    """The seeds of the witnesses of this run; no two runs share one."""
    first = _FIRST_SEED + WITNESSES * current_seed()
    return range(first, first + WITNESSES)


def witness_roundings() -> tuple[Rounding, ...]:
    """For each witness how it rounds to float32 what is computed from its results."""
    return tuple(
        partial(round_randomly, dtype="float32", random=np.random.default_rng(seed))
        for seed in witness_seeds()
    )


def _alone(checkpoint: DesignedCheckpoint, row: Row, **wanted: Any) -> ModelInputs:
    """`row` as a batch of its own without padding."""
    return ModelInputs.prepare(
        checkpoint.config,
        [row.ids],
        # Given, so that a pad id at the end of a row is a token to a sequence classifier too.
        [[1] * len(row.ids)],
        None if row.positions is None else [row.positions],
        task=checkpoint.task,
        **wanted,
    )


def _joined(parts: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
