"""Comparing backends with the float64 reference: every place of the model, every token."""

import datetime
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from gemma_hub.backend import BuildOptions
from gemma_hub.config import GemmaConfig
from gemma_hub.error_model import RATIO_LIMIT, WORST_RATIO_LIMIT
from gemma_hub.errors import InputError, PluginError
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.parameters import Weights
from gemma_hub.parity.candidates import Candidate, Registry, run_backend
from gemma_hub.parity.judging import Judging
from gemma_hub.parity.reference import Oracle, Trajectory, load_reference
from gemma_hub.parity.report import ParityReport, Text
from gemma_hub.parity.texts import Prompt
from gemma_hub.tokenizers import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
TEMPERATURE = 0.8
"""Of the sampled continuations; no filter, so that every token of the vocabulary can be drawn."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number of steps done, and the number that there are."""


def compare(
    registry: Registry,
    config: GemmaConfig,
    weights: Weights,
    prompts: Sequence[Prompt],
    *,
    source: str,
    backends: Sequence[str],
    dtype: str,
    device: str,
    max_new_tokens: int,
    witnesses: int,
    seed: int,
    eos_token_ids: Sequence[int] | None,
    tokenizer: Tokenizer | None,
    progress: Progress | None,
) -> ParityReport:
    """Compare `backends` on one model; the arguments are those of `gemma_hub.parity`."""
    _check_arguments(backends, dtype, witnesses)
    _check_names(registry, backends)
    settings = {
        "greedy": GenerationSettings(max_new_tokens=max_new_tokens, eos_token_id=eos_token_ids),
        "sampled": GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=TEMPERATURE,
            seed=seed,
            eos_token_id=eos_token_ids,
        ),
    }
    greedy, sampled = settings["greedy"], settings["sampled"]
    witness_seeds = tuple(range(1, witnesses + 1))
    oracle = Oracle(load_reference(registry), config, weights, dtype, witness_seeds)
    total = 1 + len(backends) + 2 * len(prompts)
    show = progress or (lambda what, done, total: None)

    show("float64 reference: generating", 0, total)
    prompt_ids = [prompt.token_ids for prompt in prompts]
    trajectories = oracle.trajectories(prompt_ids, greedy, sampled)
    fed = [trajectory.token_ids for trajectory in trajectories]
    options = BuildOptions(dtype=dtype, device=device)
    candidates = []
    for i, name in enumerate(backends):
        show(f"{name}: running", 1 + i, total)
        candidates.append(
            run_backend(name, registry, config, weights, options, prompt_ids, fed, greedy, sampled)
        )
    judging = Judging(config, [c for c in candidates if not c.run.error], settings)
    if any(not candidate.run.error for candidate in candidates):
        for row, trajectory in enumerate(trajectories):
            what = f"measuring rounding noise: text {trajectory.text}, {trajectory.kind}"
            show(what, 1 + len(backends) + row, total)
            judging.add(row, trajectory, oracle.truth(trajectory))
    show("done", total, total)

    ran = any(not candidate.run.error for candidate in candidates)
    return ParityReport(
        source=source,
        config=config.to_dict(),
        dtype=dtype,
        backends=tuple(candidate.run for candidate in candidates),
        rows=judging.rows() if ran else (),
        tokens=judging.checks(),
        texts=_texts(prompts, trajectories, tokenizer),
        limits={"ratio": RATIO_LIMIT, "worst_ratio": WORST_RATIO_LIMIT},
        seeds={"sampling": seed, "witnesses": list(witness_seeds)},
        sampling={"max_new_tokens": max_new_tokens, "temperature": TEMPERATURE},
        versions=_versions(candidates),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _check_arguments(backends: Sequence[str], dtype: str, witnesses: int) -> None:
    if isinstance(backends, str) or not backends or len(set(backends)) != len(backends):
        raise InputError(
            f"backends is {backends!r}; expected a list of at least one name, each once."
        )
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    if type(witnesses) is not int or witnesses < 2:
        raise InputError(f"witnesses is {witnesses!r}; expected an integer from 2 up.")


def _check_names(registry: Registry, backends: Sequence[str]) -> None:
    """Raise for a backend that there is not, before anything slow; one that fails comes later."""
    for name in backends:
        try:
            registry.load(name)
        except PluginError:
            continue


def _texts(
    prompts: Sequence[Prompt], trajectories: Iterable[Trajectory], tokenizer: Tokenizer | None
) -> tuple[Text, ...]:
    ids = {(t.text, t.kind): t.continuation for t in trajectories}

    def decoded(token_ids: tuple[int, ...]) -> str:
        return tokenizer.decode(list(token_ids), skip_special_tokens=True) if tokenizer else ""

    return tuple(
        Text(
            prompt=prompt.text,
            prompt_token_ids=prompt.token_ids,
            greedy_token_ids=ids[i, "greedy"],
            sampled_token_ids=ids[i, "sampled"],
            greedy=decoded(ids[i, "greedy"]),
            sampled=decoded(ids[i, "sampled"]),
        )
        for i, prompt in enumerate(prompts)
    )


def _versions(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Of Python, the core, the plug-ins that ran, and what those require."""
    names = ["gemma-hub", "gemma-hub-numpy", "numpy"]
    names += [c.run.distribution for c in candidates if c.run.distribution]
    for requirement in (text for c in candidates for text in c.requires):
        try:
            names.append(Requirement(requirement).name)
        except InvalidRequirement:
            continue
    found = {"Python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
