"""L4.sampling: sampled tokens, which need the whole distribution where greedy needs its peak.

The core draws each token with one number, so a backend samples rightly if its logits are right
where they are drawn from: after a prompt of padded rows, and after each single token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from gemma_hub.backend import Model
from gemma_hub.generation.loop import GeneratedIds, generate_ids
from gemma_hub.generation.random import uniform
from gemma_hub.generation.sampling import choose, log_probabilities
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub_conformance.cases.generation import CERTAIN, MODEL, NEW_TOKENS
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.oracle import Truth
from gemma_hub_conformance.rows import row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

LENGTHS = (4, 7, 6)
"""Of the prompts: those of L4.generation in another order, so that nothing is compiled anew."""
_FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.3, "seed": 3},
    "top_k": {"temperature": 0.9, "top_k": 12, "seed": 2**63 + 5},
    "top_p": {"temperature": 0.7, "top_p": 0.8, "seed": 2**33 + 1},
}
_PLAIN = _FILTERS["temperature"]

Prompts = Sequence[Sequence[int]]


def cases() -> list[CaseSpec]:
    """Seeded tokens under each filter, rows that are alone or alike, and their probabilities."""
    filters = [
        CaseSpec(
            f"L4.sampling.{name}",
            f"Seeded tokens with `{name}` are the reference's, or as good within the noise.",
            partial(_filtered, changes=changes),
        )
        for name, changes in _FILTERS.items()
    ]
    checks = {
        "row_alone": ("A row's sample hangs on no other row and on no padding.", _row_alone),
        "same_prompt": ("Several continuations of one prompt do not mix.", _same_prompt),
        "repeated": ("The same seed twice gives the same tokens, to the bit.", _repeated),
        "probabilities": ("Log-probabilities of sampled tokens.", _probabilities),
    }
    return [*filters, *(CaseSpec(f"L4.sampling.{n}", doc, run) for n, (doc, run) in checks.items())]


def judge_samples(
    context: CaseContext,
    checkpoint: DesignedCheckpoint,
    prompts: Prompts,
    found: Sequence[Sequence[int]],
    settings: GenerationSettings,
) -> None:
    """Fail unless each token is one that the reference draws, up to rounding, on the row's path.

    Args:
        context: of the case.
        checkpoint: the model that `found` is from.
        prompts: that of each row of `found`; the rows are numbered from 0 in the request.
        found: the new tokens of each row, without stop ids.
        settings: that it was asked for, with a temperature.
    """
    assert settings.seed is not None
    for number, (prompt, new) in enumerate(zip(prompts, found, strict=True)):
        context.require(
            len(new) == settings.max_new_tokens,
            f"row {number} has {len(new)} new tokens; expected {settings.max_new_tokens}",
        )
        truth = _truth(context, checkpoint, prompt, new)
        for step, token in enumerate(new):
            drawn = float(uniform(settings.seed, number, step))
            right = _right_tokens(truth, step, settings, drawn)
            context.require(
                token in right,
                f"row {number}, new token {step} is {token}; the reference draws {sorted(right)} "
                f"with the number {drawn:.7f}",
            )


def _right_tokens(
    truth: Truth, step: int, settings: GenerationSettings, drawn: float
) -> frozenset[int]:
    """What the reference draws, and would draw with its noise up to `CERTAIN` times as large."""
    true = truth.logits[step]
    noise = np.stack([witness[step] - true for witness in truth.witness_logits])
    moved = [true + size * noise for size in (-CERTAIN, -1.0, 1.0, CERTAIN)]
    logits = np.concatenate([true[None], *moved])
    return frozenset(choose(logits, settings, np.full(len(logits), drawn)).tolist())


def _truth(
    context: CaseContext,
    checkpoint: DesignedCheckpoint,
    prompt: Sequence[int],
    new: Sequence[int],
) -> Truth:
    """The truth of each place after which one of the new tokens was chosen."""
    # On the backend's own path, so that one near tie does not end the comparison.
    whole = context.oracle.truth(checkpoint, [row((*prompt, *new))], context.dtype)
    chosen = slice(len(prompt) - 1, -1)
    return Truth(
        whole.logits[chosen],
        tuple(state[chosen] for state in whole.states),
        tuple(logits[chosen] for logits in whole.witness_logits),
        tuple(tuple(state[chosen] for state in states) for states in whole.witness_states),
    )


def _filtered(context: CaseContext, changes: dict[str, Any]) -> None:
    settings, prompts = _settings(**changes), _prompts()
    found = _generated(context.model(MODEL), prompts, settings)
    judge_samples(context, MODEL, prompts, _new(found), settings)


def _row_alone(context: CaseContext) -> None:
    settings, prompts = _settings(**_PLAIN), _prompts()
    # Row 0 has padding in the batch and none alone; its number, which chooses u, is the same.
    for some in (prompts, prompts[:1]):
        found = _generated(context.model(MODEL), some, settings)
        judge_samples(context, MODEL, some, _new(found), settings)


def _same_prompt(context: CaseContext) -> None:
    prompt = max(_prompts(), key=len)
    settings = _settings(**_PLAIN, num_return_sequences=len(LENGTHS))
    found = _generated(context.model(MODEL), [prompt], settings)
    judge_samples(context, MODEL, [prompt] * len(LENGTHS), _new(found), settings)


def _repeated(context: CaseContext) -> None:
    settings, prompts = _settings(**_PLAIN, logprobs=True), _prompts()
    first, second = (_generated(context.model(MODEL), prompts, settings) for _ in range(2))
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        context.require(
            one.token_ids == other.token_ids,
            f"row {number} is {one.token_ids} and then, with the same seed, {other.token_ids}",
        )
        context.require(
            one.logprobs == other.logprobs,
            f"row {number}: log-probabilities differ in some bits between two runs with one seed",
        )


def _probabilities(context: CaseContext) -> None:
    settings, prompts = _settings(**_PLAIN, logprobs=True), _prompts()
    found = _generated(context.model(MODEL), prompts, settings)
    truths = [
        _truth(context, MODEL, prompt, result.token_ids)
        for prompt, result in zip(prompts, found, strict=True)
    ]

    def of_tokens(logits: Sequence[np.ndarray]) -> np.ndarray:
        """(B, new tokens) log-probabilities, from each row's (new tokens, V) logits."""
        return np.stack(
            [
                log_probabilities(each, np.asarray(result.token_ids))
                for each, result in zip(logits, found, strict=True)
            ]
        )

    reference = of_tokens([truth.logits for truth in truths])
    own = zip(*(truth.witness_logits for truth in truths), strict=True)
    witnesses = tuple(of_tokens(each) for each in own)
    context.compare(
        "log-probabilities", np.array([each.logprobs for each in found]), reference, witnesses
    )


def _settings(**changes: Any) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=(), **changes)


def _prompts() -> list[tuple[int, ...]]:
    return [tokens(length, 410 + number) for number, length in enumerate(LENGTHS)]


def _generated(model: Model, prompts: Prompts, settings: GenerationSettings) -> list[GeneratedIds]:
    return generate_ids(model, MODEL.config, prompts, settings)


def _new(found: Sequence[GeneratedIds]) -> list[tuple[int, ...]]:
    return [each.token_ids for each in found]
