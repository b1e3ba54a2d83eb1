"""Running one backend for a comparison: one padded batch, and the generated tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma_hub.backend import Backend, BuildOptions, Model, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import GemmaHubError, PluginError
from gemma_hub.generation.loop import generate_ids
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import Weights
from gemma_hub.parity.report import BackendRun
from gemma_hub.plugins.spec import BackendSpec

TokenIds = tuple[int, ...]


class Loaded(Protocol):
    """What `PluginRegistry.load` returns, as far as a comparison reads it."""

    @property
    def spec(self) -> BackendSpec: ...
    @property
    def distribution(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def backend(self) -> Backend: ...


class Registry(Protocol):
    """Where backends come from."""

    def load(self, name: str | None = None) -> Loaded: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one backend made of the batch.

    Attributes:
        run: how it went.
        places: per place of the model an array (B, T, width) of the left-padded batch; empty if the
            run failed.
        greedy: continuation of each prompt.
        sampled: likewise, drawn.
        requires: the distributions that the backend needs, as PEP 508 strings.
    """

    run: BackendRun
    places: tuple[np.ndarray, ...] = ()
    greedy: tuple[TokenIds, ...] = ()
    sampled: tuple[TokenIds, ...] = ()
    requires: tuple[str, ...] = ()


def place_names(config: GemmaConfig) -> tuple[str, ...]:
    """Names of the places of a forward pass, in order: num_hidden_layers + 2 of them."""
    layers = (f"layer {i}" for i in range(config.num_hidden_layers - 1))
    return ("embedding", *layers, "final norm", "logits")


def places(model: Model, config: GemmaConfig, inputs: ModelInputs) -> tuple[np.ndarray, ...]:
    """The arrays of one forward pass in the order of `place_names`, as NumPy.

    Raises:
        PluginError: the model did not return the hidden states that the contract asks for.
    """
    outputs = model.forward(inputs)
    states = outputs.hidden_states
    if states is None or len(states) != config.num_hidden_layers + 1:
        found = "no hidden_states" if states is None else f"{len(states)} hidden_states"
        raise PluginError(
            f"The backend returned {found}; expected {config.num_hidden_layers + 1} for "
            "output_hidden_states=True. See docs/reference/backend-contract.md."
        )
    return tuple(np.asarray(model.to_numpy(array)) for array in (*states, outputs.logits))


def left_padded(config: GemmaConfig, sequences: Sequence[TokenIds]) -> ModelInputs:
    """One batch with every sequence at the right end, with hidden states asked for."""
    width = max(map(len, sequences))
    ids = np.full((len(sequences), width), config.pad_token_id or 0, np.int64)
    mask = np.zeros((len(sequences), width), np.bool_)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = sequence
        mask[row, width - len(sequence) :] = True
    return ModelInputs.prepare(config, ids, mask, output_hidden_states=True)


def continuations(
    model: Model,
    config: GemmaConfig,
    prompts: Sequence[TokenIds],
    settings: GenerationSettings,
) -> tuple[TokenIds, ...]:
    """New ids of each prompt."""
    return tuple(row.token_ids for row in generate_ids(model, config, prompts, settings))


def run_backend(
    name: str,
    registry: Registry,
    config: GemmaConfig,
    weights: Weights,
    options: BuildOptions,
    prompts: Sequence[TokenIds],
    sequences: Sequence[TokenIds],
    greedy: GenerationSettings,
    sampled: GenerationSettings,
) -> Candidate:
    """Build one backend's model and run it; what it raises becomes `run.error`."""
    loaded: Loaded | None = None
    start = time.perf_counter()
    try:
        loaded = registry.load(name)
        model = loaded.backend.build(config, TaskSpec(), weights, options)
        arrays = places(model, config, left_padded(config, sequences))
        tokens = [continuations(model, config, prompts, s) for s in (greedy, sampled)]
    except Exception as error:  # noqa: BLE001 - a backend may raise anything, and the others go on
        shown = (
            str(error) if isinstance(error, GemmaHubError) else f"{type(error).__name__}: {error}"
        )
        return Candidate(_run_record(name, loaded, start, error=shown))
    run = _run_record(name, loaded, start, device=model.device)
    return Candidate(run, arrays, tokens[0], tokens[1], loaded.spec.requires)


def _run_record(
    name: str, loaded: Loaded | None, start: float, device: str = "", error: str = ""
) -> BackendRun:
    return BackendRun(
        name=name,
        distribution=loaded.distribution if loaded else "",
        version=loaded.version if loaded else "",
        device=device,
        seconds=time.perf_counter() - start,
        error=error,
    )
