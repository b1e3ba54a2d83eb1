"""Generated tokens, each up to the first one that rounding could change."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_hub.error_model import noise_band
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.random import uniform
from gemma_hub.generation.sampling import choose
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.cases.generation import CERTAIN
from gemma_hub_conformance.checkpoints import DesignedCheckpoint
from gemma_hub_conformance.packs.catalogue import OPEN, TensorSpec, token_tensors
from gemma_hub_conformance.packs.recording import Arrays
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_numpy.backend import NumpyModel
from gemma_hub_numpy.model import Reference

NEW_TOKENS = 12
_DRAWS = 32  # prompts of one length to choose from

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"seed": 3, "temperature": 1.0, "top_k": None, "top_p": None},
    {"seed": 7, "temperature": 0.8, "top_k": 20, "top_p": None},
    {"seed": 2**40 + 11, "temperature": 0.8, "top_k": None, "top_p": 0.9},
)
"""How the sampled tokens are drawn: the arguments of `GenerationSettings`."""


@dataclass(frozen=True, slots=True)
class Traces:
    """What a model generates.

    Attributes:
        specs: of the tokens.
        prompts: the prompts, padded on the left.
        tokens: {name: int32 array}, `OPEN` from the first token on that is not certain.
        beside: `greedy_margins` (R, n), by how much the best logit is ahead of the second;
            `greedy_noise` (R, n), what rounding does to that; `uniforms` (S, R, n), the random
            number of each sampled token. All float64.
    """

    specs: tuple[TensorSpec, ...]
    prompts: Batch
    tokens: Arrays
    beside: Arrays


def trace(checkpoint: DesignedCheckpoint, models: list[Reference]) -> Traces:
    """Let the reference, the first of `models`, generate; the witnesses say what is certain."""
    prompts = [_clearest_prompt(checkpoint, models, count) for count in (7, 4, 6)]
    length = max(map(len, prompts))
    settings = [_settings(temperature=0.0), *(_settings(**each) for each in SAMPLINGS)]
    reference = NumpyModel(models[0])
    results = [generate_ids(reference, checkpoint.config, prompts, each) for each in settings]
    ids = np.array([[row.token_ids for row in rows] for rows in results])  # (1 + S, R, n)
    uniforms = np.stack(
        [uniform(each["seed"], *np.ogrid[: len(prompts), :NEW_TOKENS]) for each in SAMPLINGS]
    )
    certain, margins = np.zeros(ids.shape[:2], np.int64), []
    for r, prompt in enumerate(prompts):
        logits = _on_the_paths(checkpoint, models, prompt, ids[:, r])
        margins.append(_margins(logits[:, 0]))
        for s, each in enumerate(settings):
            draws = uniforms[s - 1, r] if s else None
            certain[s, r] = _certain(logits[:, s], ids[s, r], each, draws)
    found = np.where(np.arange(NEW_TOKENS) < certain[..., None], ids, OPEN).astype(np.int32)
    return Traces(
        token_tensors(len(prompts), NEW_TOKENS, len(SAMPLINGS)),
        Batch.of([row(ids, left=length - len(ids)) for ids in prompts], length),
        {"greedy_tokens": found[0], "sampled_tokens": found[1:]},
        {
            "greedy_margins": np.array([gap for gap, _ in margins]),
            "greedy_noise": np.array([noise for _, noise in margins]),
            "uniforms": uniforms,
        },
    )


def _clearest_prompt(
    checkpoint: DesignedCheckpoint, models: list[Reference], count: int
) -> tuple[int, ...]:
    """Of several random prompts the one whose first greedy token is the furthest from a tie.

    In a narrow type the noise is as large as many margins, and little would be certain otherwise.
    """
    prompts = [tokens(count, 180 + count * _DRAWS + draw) for draw in range(_DRAWS)]
    inputs = ModelInputs.prepare(checkpoint.config, prompts, logits_to_keep=1)
    margins, noise = _margins(np.stack([model.run(inputs).logits[:, -1] for model in models]))
    return prompts[int(np.argmax(margins / noise))]


def _margins(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) gap of the reference's best logit and the second, and the noise of that gap.

    Args:
        logits: (models, n, V), the reference's first.
    """
    band = noise_band(logits[0], tuple(logits[1:]))
    second, best = np.argsort(logits[0], axis=-1)[:, -2:].T
    rows = np.arange(len(best))
    gap = logits[0][rows, best] - logits[0][rows, second]
    return gap, np.hypot(band.element_rms[rows, best], band.element_rms[rows, second])


def _settings(**changes: Any) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=NEW_TOKENS, eos_token_id=(), **changes)


def _on_the_paths(
    checkpoint: DesignedCheckpoint,
    models: list[Reference],
    prompt: tuple[int, ...],
    ids: np.ndarray,
) -> np.ndarray:
    """(models, P, n, V) logits from which each of (P, n) new tokens is chosen on its own path."""
    rows = [[*prompt, *path[:-1].tolist()] for path in ids]
    inputs = ModelInputs.prepare(checkpoint.config, rows, logits_to_keep=ids.shape[1])
    return np.stack([model.run(inputs).logits for model in models])


def _certain(
    logits: np.ndarray, ids: np.ndarray, settings: GenerationSettings, draws: np.ndarray | None
) -> int:
    """How many tokens stay the same under `CERTAIN` times the error of each witness.

    Both signs of the error are tried. One rule for greedy and sampled tokens: it sees a near tie,
    a token at the border of top_k or top_p, and a random number at the border of two tokens.
    """
    errors = CERTAIN * (logits[1:] - logits[0])
    for n, expected in enumerate(ids):
        tried = np.concatenate([logits[0, n] + errors[:, n], logits[0, n] - errors[:, n]])
        numbers = None if draws is None else np.full(len(tried), draws[n])
        if (choose(tried, settings, numbers) != expected).any():
            return n
    return len(ids)
