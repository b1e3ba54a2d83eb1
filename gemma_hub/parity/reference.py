"""The float64 reference and its witnesses, run sequence by sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gemma_hub.backend import Backend, BuildOptions, Model, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.error_model import NoiseBand, noise_band
from gemma_hub.errors import BackendNotFoundError, PluginError
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import Weights
from gemma_hub.parity.candidates import Registry, TokenIds, continuations, places

REFERENCE = "numpy"
Kind = Literal["greedy", "sampled"]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt followed by one of the reference's continuations: what every model is fed."""

    text: int
    kind: Kind
    prompt: TokenIds
    continuation: TokenIds

    @property
    def token_ids(self) -> TokenIds:
        """What is fed: the last new token too, which nothing follows."""
        return self.prompt + self.continuation


@dataclass(frozen=True, slots=True)
class Truth:
    """What one trajectory should give.

    Attributes:
        places: per place of the model (1, T, width) float64.
        bands: per place what rounding does to it.
    """

    places: tuple[np.ndarray, ...]
    bands: tuple[NoiseBand, ...]


class Oracle:
    """The reference of one checkpoint, with witnesses of one precision.

    Models are built when needed and dropped after: at any time there is one of them, and the
    arrays of one trajectory.
    """

    def __init__(
        self,
        backend: Backend,
        config: GemmaConfig,
        weights: Weights,
        dtype: str,
        witness_seeds: Sequence[int],
    ) -> None:
        self._backend, self._config, self._weights = backend, config, weights
        self._dtype, self._seeds = dtype, tuple(witness_seeds)

    def trajectories(
        self,
        prompts: Sequence[TokenIds],
        greedy: GenerationSettings,
        sampled: GenerationSettings,
    ) -> tuple[Trajectory, ...]:
        """Every prompt with its greedy and with its sampled continuation."""
        model = self._build(BuildOptions(dtype="float64"))
        greedy_ids = continuations(model, self._config, prompts, greedy)
        sampled_ids = continuations(model, self._config, prompts, sampled)
        return tuple(
            trajectory
            for i, prompt in enumerate(prompts)
            for trajectory in (
                Trajectory(i, "greedy", prompt, greedy_ids[i]),
                Trajectory(i, "sampled", prompt, sampled_ids[i]),
            )
        )

    def truth(self, trajectory: Trajectory) -> Truth:
        """The float64 result of one trajectory, unpadded, and the noise around it."""
        inputs = ModelInputs.prepare(
            self._config, [list(trajectory.token_ids)], output_hidden_states=True
        )
        reference = places(self._build(BuildOptions(dtype="float64")), self._config, inputs)
        runs = [
            places(
                self._build(BuildOptions(dtype=self._dtype, extra={"witness": seed})),
                self._config,
                inputs,
            )
            for seed in self._seeds
        ]
        bands = tuple(
            noise_band(true, [run[place] for run in runs]) for place, true in enumerate(reference)
        )
        return Truth(reference, bands)

    def _build(self, options: BuildOptions) -> Model:
        return self._backend.build(self._config, TaskSpec(), self._weights, options)


def load_reference(registry: Registry) -> Backend:
    """The backend that is the reference.

    Raises:
        PluginError: it is not there, or does not work; names the distribution to install.
    """
    try:
        return registry.load(REFERENCE).backend
    except (BackendNotFoundError, PluginError) as error:
        raise PluginError(
            "A comparison needs the float64 reference, the backend 'numpy', and it cannot be used: "
            f"{error} Install it with: pip install gemma-hub-numpy"
        ) from error
