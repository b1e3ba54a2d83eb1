"""L4.generation: the tokens, by the core's loop over the backend's model."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from gemma_hub.error_model import noise_band
from gemma_hub.generation.loop import GeneratedIds, generate_ids
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub_conformance.checkpoints import CHECKPOINTS
from gemma_hub_conformance.rows import row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec
from gemma_hub_numpy.backend import NumpyModel
from gemma_hub_numpy.model import Reference, Witness

# A tied head with random weights says the last token again and again; this one wanders.
MODEL = CHECKPOINTS["untied"]
LENGTHS = (7, 4, 6)
Prompts = tuple[tuple[int, ...], ...]
NEW_TOKENS = 13
DRAWS = 20
"""Of prompts, until one fits; with seed 0 that is the first."""
CERTAIN = 8.0
"""A choice is certain if the logits' gap is more than this many times their noise."""


def cases() -> list[CaseSpec]:
    """Greedy and sampled tokens, stops, and rows that do not see one another."""
    return [
        CaseSpec(
            "L4.generation.greedy",
            "Every greedy token is the reference's best, or tied with it within the noise.",
            _greedy,
        ),
        CaseSpec(
            "L4.generation.stop",
            "A row ends at its stop id and the others go on, as the reference's do.",
            _stop,
        ),
        CaseSpec(
            "L4.generation.row_alone",
            "A row gets the same greedy tokens alone and in a batch.",
            _row_alone,
        ),
        CaseSpec(
            "L4.generation.sampled",
            "The same seed gives the reference's tokens.",
            _sampled,
        ),
    ]


def _greedy(context: CaseContext) -> None:
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=())
    prompts = _prompts(0)
    found = generate_ids(context.model(MODEL), MODEL.config, prompts, settings)
    for number, (prompt, result) in enumerate(zip(prompts, found, strict=True)):
        context.require(
            len(result.token_ids) == NEW_TOKENS and result.finish_reason == "length",
            f"row {number} ended by {result.finish_reason!r} after {len(result.token_ids)} tokens; "
            f"expected 'length' after {NEW_TOKENS}",
        )
        judge_greedy(context, number, prompt, result.token_ids)


def judge_greedy(
    context: CaseContext, number: int, prompt: Sequence[int], new: Sequence[int]
) -> None:
    """Fail unless each of a row's `new` tokens is the best after those before it, or nearly."""
    # On the backend's own path, so that one near tie does not end the comparison.
    truth = context.oracle.truth(MODEL, [row((*prompt, *new))], context.dtype)
    band = noise_band(truth.logits, truth.witness_logits)
    for index, chosen in enumerate(new):
        at = len(prompt) - 1 + index
        best = int(np.argmax(truth.logits[at]))
        gap = truth.logits[at, best] - truth.logits[at, chosen]
        noise = float(np.hypot(band.element_rms[at, best], band.element_rms[at, chosen]))
        context.require(
            gap <= CERTAIN * noise,
            f"row {number}, new token {index} is {chosen}; the reference has {best}, ahead by "
            f"{gap / noise:.3g} times the noise",
        )


def _stop(context: CaseContext) -> None:
    free = GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=())
    prompts, unstopped = _expected(free, lambda results: bool(_stops(results)))
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=_stops(unstopped))
    expected = generate_ids(_models()[0], MODEL.config, prompts, settings)
    if {each.finish_reason for each in expected} != {"stop", "length"}:
        raise RuntimeError("The stop case needs a row that stops and one that does not.")
    _same(context, generate_ids(context.model(MODEL), MODEL.config, prompts, settings), expected)


def _stops(results: list[GeneratedIds]) -> tuple[int, ...]:
    """A token of the first row and one of the last, neither in the middle row; () if none are."""
    first, middle, last = (each.token_ids for each in results)
    for one, other in itertools.product(first[4:], last[9:]):
        if one not in middle and other not in middle:
            return one, other
    return ()


def _row_alone(context: CaseContext) -> None:
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=())
    prompts, expected = _expected(settings)
    found = generate_ids(context.model(MODEL), MODEL.config, prompts[1:2], settings)
    _same(context, found, expected[1:2])


def _sampled(context: CaseContext) -> None:
    for extra in ({"top_k": 20, "seed": 7}, {"top_p": 0.9, "seed": 2**40 + 11}):
        settings = GenerationSettings(
            max_new_tokens=NEW_TOKENS, temperature=0.8, eos_token_id=(), **extra
        )
        prompts, expected = _expected(settings)
        found = generate_ids(context.model(MODEL), MODEL.config, prompts, settings)
        _same(context, found, expected)


def _expected(
    settings: GenerationSettings,
    fits: Callable[[list[GeneratedIds]], bool] = lambda _: True,
) -> tuple[Prompts, list[GeneratedIds]]:
    """The first prompts whose tokens by the reference hang on no rounding, and those tokens."""
    models = _models()
    for draw in range(DRAWS):
        prompts = _prompts(draw)
        results = [generate_ids(model, MODEL.config, prompts, settings) for model in models]
        varied = all(len(set(each.token_ids)) >= len(each.token_ids) / 2 for each in results[0])
        certain = all(other == results[0] for other in results[1:])
        if varied and certain and fits(results[0]):
            return prompts, results[0]
    raise RuntimeError(f"None of {DRAWS} draws of prompts is far from ties and shows anything.")


def _prompts(draw: int) -> Prompts:
    """Three of unequal length, others for each draw."""
    first = 110 + len(LENGTHS) * draw
    return tuple(tokens(length, first + number) for number, length in enumerate(LENGTHS))


def _models() -> list[NumpyModel]:
    """The reference and two witnesses that no case is judged by."""
    weights = MODEL.weights()
    witnesses = (Witness(MODEL.config, weights, "float32", seed) for seed in (1, 2))
    return [NumpyModel(model) for model in (Reference(MODEL.config, weights), *witnesses)]


def _same(context: CaseContext, found: list[GeneratedIds], expected: list[GeneratedIds]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        context.require(
            one == other,
            f"row {number} is {one.token_ids} ({one.finish_reason}); "
            f"expected {other.token_ids} ({other.finish_reason})",
        )
