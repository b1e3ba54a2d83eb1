"""L4.generation: the tokens, by the core's loop over the backend's model."""

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
PROMPTS = (tokens(7, 110), tokens(4, 111), tokens(6, 112))
NEW_TOKENS = 13
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
    found = generate_ids(context.model(MODEL), MODEL.config, PROMPTS, settings)
    for number, (prompt, result) in enumerate(zip(PROMPTS, found, strict=True)):
        context.require(
            len(result.token_ids) == NEW_TOKENS and result.finish_reason == "length",
            f"row {number} ended by {result.finish_reason!r} after {len(result.token_ids)} tokens; "
            f"expected 'length' after {NEW_TOKENS}",
        )
        # On the backend's own path, so that one near tie does not end the comparison.
        truth = context.oracle.truth(MODEL, [row(prompt + result.token_ids)], context.dtype)
        band = noise_band(truth.logits, truth.witness_logits)
        for index, chosen in enumerate(result.token_ids):
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
    free = _expected(GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=()))
    stops = (free[0].token_ids[4], free[2].token_ids[9])
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=stops)
    expected = _expected(settings)
    if {each.finish_reason for each in expected} != {"stop", "length"}:
        raise RuntimeError("The stop case needs a row that stops and one that does not.")
    _same(context, generate_ids(context.model(MODEL), MODEL.config, PROMPTS, settings), expected)


def _row_alone(context: CaseContext) -> None:
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=())
    expected = _expected(settings)
    found = generate_ids(context.model(MODEL), MODEL.config, PROMPTS[1:2], settings)
    _same(context, found, expected[1:2])


def _sampled(context: CaseContext) -> None:
    for extra in ({"top_k": 20, "seed": 7}, {"top_p": 0.9, "seed": 2**40 + 11}):
        settings = GenerationSettings(
            max_new_tokens=NEW_TOKENS, temperature=0.8, eos_token_id=(), **extra
        )
        found = generate_ids(context.model(MODEL), MODEL.config, PROMPTS, settings)
        _same(context, found, _expected(settings))


def _expected(settings: GenerationSettings) -> list[GeneratedIds]:
    """The reference's tokens, which must not hang on rounding."""
    weights = MODEL.weights()
    models = [
        Reference(MODEL.config, weights),
        *(Witness(MODEL.config, weights, "float32", seed) for seed in (1, 2)),
    ]
    results = [generate_ids(NumpyModel(m), MODEL.config, PROMPTS, settings) for m in models]
    if any(other != results[0] for other in results[1:]):
        raise RuntimeError("A prompt of the generation cases is too close to a tie.")
    if any(len(set(each.token_ids)) < len(each.token_ids) / 2 for each in results[0]):
        raise RuntimeError("A row of the generation cases repeats itself and shows nothing.")
    return results[0]


def _same(context: CaseContext, found: list[GeneratedIds], expected: list[GeneratedIds]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        context.require(
            one == other,
            f"row {number} is {one.token_ids} ({one.finish_reason}); "
            f"expected {other.token_ids} ({other.finish_reason})",
        )
