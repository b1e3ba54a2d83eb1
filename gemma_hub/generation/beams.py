"""Beam search: the best continuations of each prompt by the sum of their log-probabilities.

At every step each running beam of a prompt is continued with every token, and the best `num_beams`
of all these go on. What ends is put aside and ranked by its score, until nothing that runs can be
better. The algorithm is that of Transformers, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.generation.choosing import Chooser
from gemma_hub.generation.context import can_edit
from gemma_hub.generation.loop import GeneratedIds
from gemma_hub.generation.prefix import Prefix
from gemma_hub.generation.prompt_checks import checked_prompt
from gemma_hub.generation.prompts import ReadPrompts, read_prompts
from gemma_hub.generation.rules import Row, change_scores, check_ids
from gemma_hub.generation.sampling import check_logits
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.generation.stopping import StoppedText
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import FinishReason, ModelOutputs


def beam_search(
    model: Model,
    config: GemmaConfig,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    text: StoppedText | None = None,
    prefix: Prefix | None = None,
) -> list[GeneratedIds]:
    """The best `num_return_sequences` continuations of each prompt, the best first.

    Those of a prompt are together. They depend on the prompt and the settings alone.

    Args:
        model: any backend's; one that cannot exchange the rows of its cache runs the whole
            sequences again at every step.
        config: the model's.
        prompts: token ids without padding, one sequence a row.
        settings: `eos_token_ids` of None means those of `config`.
        text: empty, with the stop texts of `settings`; each beam gets a copy of it.
        prefix: what all prompts begin with, which `model` has read already.

    Raises:
        InputError: a prompt or a setting is wrong, or a prompt has fewer continuations than asked.
        CapacityError: a prompt and its new tokens need more positions than the model has.
        GemmaHubError: no token can be chosen from the logits.
    """
    if prefix is not None:
        prefix.check_model(model)
    first = () if prefix is None else prefix.token_ids
    checked = [
        checked_prompt(f"Prompt {index}", prompt, config, settings.max_new_tokens, first)
        for index, prompt in enumerate(prompts)
    ]
    check_ids(settings, config.vocab_size)
    if not checked:
        return []
    chooser = Chooser.of(settings, config)
    searches = [PromptSearch(index, ids, chooser, text) for index, ids in enumerate(checked)]
    room = max(map(len, checked)) + settings.max_new_tokens - 1  # the last token is never fed
    movable = model if can_edit(model) else _WithoutCache(model)
    _run(searches, read_prompts(movable, config, checked, room, prefix), room)
    return [found for search in searches for found in search.results()]


def _run(searches: list["PromptSearch"], read: ReadPrompts, room: int) -> None:
    """Take all searches to their ends; each row that is fed is a running beam of one of them."""
    contexts, places, logits = read.contexts, read.places, read.logits
    while True:
        rows = [places[parent] for parent in _advance(searches, logits)]
        searches = [search for search in searches if search.running]
        if not searches:
            return
        if rows != [(0, row) for row in range(len(logits))]:
            contexts = [contexts[0].gather(rows, room, *contexts[1:])]
        places = [(0, row) for row in range(len(rows))]
        ids = np.array([[beam.token_ids[-1]] for search in searches for beam in search.running])
        logits = contexts[0].extend(ids, np.ones(ids.shape, np.bool_))[:, -1]


def _advance(searches: list["PromptSearch"], logits: np.ndarray) -> list[int]:
    """One step of each search; for each beam that then runs, which row it continues."""
    parents: list[int] = []
    start = 0
    for search in searches:
        end = start + len(search.running)
        search.advance(logits[start:end])
        parents += [start + beam.parent for beam in search.running]
        start = end
    return parents


class _WithoutCache:
    """A model as if it had no cache, for one whose rows cannot be exchanged there."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.native, self.device = model.native, model.device

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        return self._model.forward(inputs)

    def to_numpy(self, array: Any) -> np.ndarray:
        return self._model.to_numpy(array)


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation of a prompt, or the beginning of one.

    Attributes:
        token_ids: its new ids.
        total: the sum of their log-probabilities after the rules.
        logprobs: natural-log probability of each under the model itself, before the rules.
        parent: place, among the beams that ran, of the one that it continues.
        text: its text, where there are stop texts.
        finish_reason: None while it may go on.
    """

    token_ids: tuple[int, ...] = ()
    total: float = 0.0
    logprobs: tuple[float, ...] = ()
    parent: int = 0
    text: StoppedText | None = None
    finish_reason: FinishReason | None = None


class PromptSearch:
    """The search for the continuations of one prompt.

    Attributes:
        prompt: its ids.
        running: at most `num_beams` beams of one length, the best first; none once it is over.
        finished: at most `num_beams` beams that have ended, the best first.
    """

    def __init__(
        self, index: int, prompt: np.ndarray, chooser: Chooser, text: StoppedText | None
    ) -> None:
        """A search with one running beam, which has no tokens yet.

        Args:
            index: of the prompt in the request.
            prompt: (T,) its ids.
            chooser: the settings and the stop ids.
            text: an empty text with the stop texts.
        """
        self.prompt = prompt
        self.running = [Beam(text=text)]
        self.finished: list[Beam] = []
        self._index = index
        self._settings, self._stops = chooser.settings, chooser.stops

    def advance(self, logits: np.ndarray) -> None:
        """One more token on every beam; `logits` are the (n, V) of the n running ones."""
        size = self._settings.num_beams
        candidates = self._candidates(logits)
        # Only the best `num_beams` may end: the others are there so that enough beams go on.
        ended = [beam for beam in candidates[:size] if beam.finish_reason is not None]
        self.finished = sorted(self.finished + ended, key=self._score, reverse=True)[:size]
        self.running = [beam for beam in candidates if beam.finish_reason is None][:size]
        if not self._may_improve():
            self.running = []

    def results(self) -> list[GeneratedIds]:
        """The best finished beams, `num_return_sequences` of them.

        Raises:
            InputError: there are fewer.
        """
        wanted = self._settings.num_return_sequences
        if len(self.finished) < wanted:
            raise InputError(
                f"Prompt {self._index} has {len(self.finished)} continuations under the rules of "
                f"this call, and num_return_sequences is {wanted}. Ask for fewer, forbid less, or "
                "let allowed_tokens return an id that ends the row."
            )
        return [self._record(beam) for beam in self.finished[:wanted]]

    def _candidates(self, logits: np.ndarray) -> list[Beam]:
        """The best continuations of the running beams by one token, the best first.

        Each beam can end in as many ways as there are stop ids. So `num_beams` of them are left to
        go on, unless stop texts end more.
        """
        rows = [Row(self._index, self.prompt, list(beam.token_ids)) for beam in self.running]
        numbers, step = np.full(len(rows), self._index), len(rows[0].new)
        check_logits(logits, numbers, step)
        logprobs = _log_softmax(logits)
        ruled = change_scores(logprobs, rows, self._settings, self._stops)
        # A beam that the rules leave no token ends without a result; NaN is an error here too.
        is_alive = ruled.max(axis=1) != -np.inf
        if is_alive.any():
            check_logits(ruled[is_alive], numbers[is_alive], step)
        totals = ruled + np.array([[beam.total] for beam in self.running])
        count = max(2, 1 + len(self._stops)) * self._settings.num_beams
        return [
            self._continued(place // logits.shape[1], place % logits.shape[1], totals, logprobs)
            for place in _largest(totals.ravel(), count).tolist()
        ]

    def _continued(
        self, parent: int, token_id: int, totals: np.ndarray, logprobs: np.ndarray
    ) -> Beam:
        """The beam at place `parent` with one more token; the arrays are (n, V)."""
        old = self.running[parent]
        token_ids = (*old.token_ids, token_id)
        text = None if old.text is None else old.text.copy()
        if text is not None:
            text.push(token_id)
        reason: FinishReason | None = None
        if token_id in self._stops or (text is not None and text.is_stopped):
            reason = "stop"
        elif len(token_ids) == self._settings.max_new_tokens:
            reason = "length"
        own = (*old.logprobs, float(logprobs[parent, token_id]))
        return Beam(token_ids, float(totals[parent, token_id]), own, parent, text, reason)

    def _score(self, beam: Beam) -> float:
        """What beams that have ended are ranked by."""
        return float(beam.total / len(beam.token_ids) ** self._settings.length_penalty)

    def _may_improve(self) -> bool:
        """Whether a running beam may come among the finished ones.

        A sum falls, unless rules raise it; but with a positive `length_penalty` a longer beam has a
        better score for the same sum. "never" reckons with the greatest length there can be, and
        False with the present one.
        """
        settings = self._settings
        if not self.running or len(self.finished) < settings.num_beams:
            return bool(self.running)
        if settings.early_stopping is True:
            return False
        best = self.running[0]
        length = len(best.token_ids)
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = settings.max_new_tokens
        hoped = best.total / length**settings.length_penalty
        return bool(hoped > self._score(self.finished[-1]))

    def _record(self, beam: Beam) -> GeneratedIds:
        assert beam.finish_reason is not None
        return GeneratedIds(
            token_ids=beam.token_ids,
            finish_reason=beam.finish_reason,
            logprobs=beam.logprobs if self._settings.logprobs else None,
            score=self._score(beam),
        )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """(B, V) float64 natural-log probabilities."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values above -inf, the largest first, of equal ones the first.

    In (beam, id) order that is the lower beam first, and then the lower id.
    """
    count = min(count, len(values))
    border = np.partition(values, -count)[-count]
    places = np.flatnonzero((values >= border) & (values > -np.inf))
    order = np.argsort(-values[places], kind="stable")
    return np.asarray(places[order[:count]])
