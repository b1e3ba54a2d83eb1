"""A model that notes what it is called with, so that a failing call can be made again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from gemma_hub.backend import Cache, Model
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, Row

GRADIENTS = "gradients"
ASKED = ("output_hidden_states", "output_attentions", "labels", "logits_to_keep")
"""What a call may ask for beside its logits, by the attribute of `ModelInputs`."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One input that a case gave to the subject.

    Attributes:
        checkpoint: the model.
        batch: the tokens.
        chunks: slots of each call of a cached run; None for one call without a cache.
        asked: those of `ASKED` that the call asked for, and "gradients" where it was one of
            `loss_and_gradients`.
    """

    checkpoint: DesignedCheckpoint
    batch: Batch
    chunks: tuple[int, ...] | None
    asked: tuple[str, ...] = ()


def watched(model: Model, checkpoint: DesignedCheckpoint, inputs: list[Seen]) -> Model:
    """`model`, with every call's input added to `inputs` before the call.

    The calls that fill one cache are one input, which grows. Calls with embeddings in place of ids
    are not noted.
    """
    return cast(Model, _Watched(model, checkpoint, inputs))


@dataclass(slots=True)
class _Fed:
    """What a cache has been fed with: the calls, and the place of their input in the list."""

    cache: Cache  # held, so that no other one gets its identity
    calls: list[ModelInputs]
    place: int


class _Watched:
    def __init__(self, model: Any, checkpoint: DesignedCheckpoint, inputs: list[Seen]) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._inputs = inputs
        self._fed: dict[int, _Fed] = {}
        wrapped: dict[str, Callable[..., Any]] = {
            "extend": self._extend,
            "greedy_steps": self._greedy_steps,
            "loss_and_gradients": self._loss_and_gradients,
        }
        # Set only where the model has them: the cases ask for features by what a model has.
        for name in ("init_cache", "export", *wrapped):
            if hasattr(model, name):
                setattr(self, name, wrapped.get(name, getattr(model, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        self._note([inputs], asked_of(inputs))
        outputs: ModelOutputs = self._model.forward(inputs)
        return outputs

    def _loss_and_gradients(self, inputs: ModelInputs) -> Any:
        self._note([inputs], (*asked_of(inputs), GRADIENTS))
        return self._model.loss_and_gradients(inputs)

    def _extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        fed = self._note_cached([inputs], cache)
        outputs, cache = self._model.extend(inputs, cache)
        self._fed[id(cache)] = replace(fed, cache=cache)
        return outputs, cache

    def _greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> tuple[np.ndarray, Cache]:
        def steps(columns: Sequence[np.ndarray]) -> list[ModelInputs]:
            """The calls of `extend` that would feed these (B,) ids, one after the other."""
            return [
                ModelInputs.prepare(
                    self._checkpoint.config,
                    np.where(running, column, token_ids)[:, None],
                    running[:, None],
                    logits_to_keep=1,
                    next_position=cache.next_position + step,
                )
                for step, column in enumerate(columns)
            ]

        fed = self._note_cached(steps([token_ids]), cache)  # in case it raises
        chosen, after = self._model.greedy_steps(token_ids, running, cache, num_steps, stops)
        if chosen.shape[1]:
            fed = self._note_cached(steps([token_ids, *chosen.T[:-1]]), cache)
            self._fed[id(after)] = replace(fed, cache=after)
        return chosen, after

    def _note_cached(self, calls: list[ModelInputs], cache: Cache) -> _Fed:
        """Note calls that go on from `cache`; what it has been fed with once they are made."""
        before = self._fed.get(id(cache)) or _Fed(cache, [], len(self._inputs))
        calls = [*before.calls, *calls]
        asked = tuple(dict.fromkeys(name for each in calls for name in asked_of(each)))
        self._note(calls, asked, before.place, tuple(each.shape[1] for each in calls))
        return _Fed(cache, calls, before.place)

    def _note(
        self,
        calls: list[ModelInputs],
        asked: tuple[str, ...],
        place: int | None = None,
        chunks: tuple[int, ...] | None = None,
    ) -> None:
        batch = _batch(calls)
        if batch is None:
            return
        seen = Seen(self._checkpoint, batch, chunks, asked)
        if place is not None and place < len(self._inputs):
            self._inputs[place] = seen
        else:
            self._inputs.append(seen)


def asked_of(inputs: ModelInputs) -> tuple[str, ...]:
    """Those of `ASKED` that a call asks for."""
    values = {name: getattr(inputs, name) for name in ASKED}
    return tuple(name for name, value in values.items() if value is not None and value is not False
                 and not (name == "logits_to_keep" and value == 0))  # fmt: skip


def _batch(calls: list[ModelInputs]) -> Batch | None:
    """What calls one after the other were given; None if one had embeddings or no token."""
    ids = [each.input_ids for each in calls]
    if any(each is None for each in ids) or not all(len(each.attention_mask) for each in calls):
        return None
    input_ids = np.concatenate(ids, axis=1).astype(np.int64)  # type: ignore[arg-type]
    mask = np.concatenate([each.attention_mask for each in calls], axis=1)
    positions = np.concatenate([each.position_ids for each in calls], axis=1).astype(np.int64)
    if not mask.any():
        return None
    counted = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    plain = np.array_equal(positions[mask], counted[mask])
    rows = [
        Row(
            tuple(input_ids[b, mask[b]].tolist()),
            tuple(np.flatnonzero(mask[b]).tolist()),
            None if plain else tuple(positions[b, mask[b]].tolist()),
        )
        for b in range(len(mask))
    ]
    laid_out = Batch.of(rows, mask.shape[1])
    return replace(laid_out, input_ids=input_ids)  # what stands at padding may matter
