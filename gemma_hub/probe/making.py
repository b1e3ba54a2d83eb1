"""Making a probe: by the float64 reference with its witnesses, or by a model that is loaded."""

import platform
from collections.abc import Callable
from importlib import metadata

import numpy as np

from gemma_hub.backend import BuildOptions, Model, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.error_model import Float64, noise_band
from gemma_hub.errors import BackendNotFoundError, PluginError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import Index, Shape, Weights
from gemma_hub.plugins.registry import LoadedBackend, plugin_registry
from gemma_hub.probe.record import Noise, Probe, rows_of

REFERENCE = "numpy"
WITNESSES = 3
Progress = Callable[[int, int], None]
"""Called with (parameters read, parameters to read)."""

_TOKENS = 32
_COLUMNS = 32
_WIDEST = "float32"  # the widest type that a witness has


def fixed_input(config: GemmaConfig, task: str) -> np.ndarray:
    """(B, T) int64: ids spread over the vocabulary, <bos> first in each row and no padding id."""
    # A text has one result where it is classified as a whole, so there are more and shorter ones.
    length = 4 if task == "sequence_classification" else 8
    ids = _spread(_TOKENS, config.vocab_size, 0.5)
    ids = np.where(ids == config.pad_token_id, (ids + 1) % config.vocab_size, ids)
    ids = ids.reshape(-1, length)
    if config.bos_token_id is not None and config.bos_token_id < config.vocab_size:
        ids[:, 0] = config.bos_token_id
    return np.asarray(ids[:, : config.max_position_embeddings], np.int64)


def reference_probe(
    config: GemmaConfig,
    task: str,
    weights: Weights,
    dtype: str,
    progress: Progress | None = None,
) -> Probe | None:
    """The probe of a model, made in float64 from its weights, with the noise of `dtype`.

    The weights are read tensor by tensor, and none stays in memory where they are many.

    Args:
        config: the model's.
        task: what it is for, a key of `gemma_hub.config.ARCHITECTURES`.
        weights: its parameters.
        dtype: the precision whose rounding noise is measured: that of the weights, usually.
        progress: told how far it is.

    Returns:
        The probe; None if the reference is not installed (`gemma-hub-numpy`) or lacks something
        that the model needs, or if the model's results are not finite, so that nothing can be
        compared with them.
    """
    try:
        reference = plugin_registry().load(REFERENCE)
    except (BackendNotFoundError, PluginError):
        return None
    counted = _Counted(weights, 1 + WITNESSES, progress)
    ids = fixed_input(config, task)
    columns = fixed_columns(config, task, ids)
    noise_dtype = _WIDEST if dtype == "float64" else dtype

    def run(options: BuildOptions) -> Float64:
        counted.begin()
        model = reference.backend.build(config, TaskSpec(task), counted, options)
        return results(model, config, task, ids)[:, columns]

    try:
        values = run(BuildOptions(dtype="float64"))
        witnesses = [
            run(BuildOptions(dtype=noise_dtype, extra={"witness": seed}))
            for seed in range(1, WITNESSES + 1)
        ]
    except UnsupportedFeature:
        return None
    if not all(np.isfinite(array).all() for array in (values, *witnesses)):
        return None
    band = noise_band(values, witnesses)
    if band.token_rms.max() >= 1:  # rounding alone makes anything of this model
        return None
    return Probe(
        task=task,
        token_ids=ids,
        columns=columns,
        values=values,
        dtype="float64",
        noise=Noise(dtype=noise_dtype, tokens=band.token_rms, elements=band.element_rms),
        made_by=_made_by(reference),
    )


def probe_of_model(
    model: Model, config: GemmaConfig, task: str, loaded: LoadedBackend, dtype: str
) -> Probe | None:
    """The probe of a model, made by the backend that it is loaded on; None if it is not finite.

    Args:
        model: what the backend built.
        config: the model's.
        task: what it was built for.
        loaded: the backend.
        dtype: the type that it was built in.
    """
    ids = fixed_input(config, task)
    columns = fixed_columns(config, task, ids)
    values = results(model, config, task, ids)[:, columns]
    if not np.isfinite(values).all():
        return None
    return Probe(
        task=task,
        token_ids=ids,
        columns=columns,
        values=values,
        dtype=dtype,
        noise=None,
        made_by=_made_by(loaded),
    )


def results(model: Model, config: GemmaConfig, task: str, token_ids: np.ndarray) -> Float64:
    """(n, width) float64: what a probe holds of a model, before columns are taken."""
    outputs = model.forward(ModelInputs.prepare(config, token_ids, task=task))
    found = outputs.last_hidden_state if task == "base" else outputs.logits
    array = np.asarray(model.to_numpy(found), np.float64)
    array = array.reshape(-1, array.shape[-1])
    if task != "causal_lm":
        return array
    # Not finite where a logit is not; what is made of it says so.
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = array - array.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def fixed_columns(config: GemmaConfig, task: str, token_ids: np.ndarray) -> np.ndarray:
    """(K,) int64: which entries of a result are kept; other ids than those of the input."""
    width = rows_of(config, task, token_ids)[1]
    return np.arange(width) if width <= _COLUMNS else _spread(_COLUMNS, width, 0.25)


def _spread(count: int, below: int, start: float) -> np.ndarray:
    """(count,) integers in [0, below), evenly spread; `start` is where in a step they begin."""
    return np.asarray((np.arange(count) + start) * below / count, np.int64)


def _made_by(loaded: LoadedBackend) -> dict[str, str]:
    versions = {"backend": loaded.name, loaded.distribution: loaded.version}
    for name in ("gemma-hub", "numpy"):
        versions[name] = metadata.version(name)
    return versions | {"Python": platform.python_version()}


class _Counted:
    """`Weights` that tell how many parameters of how many runs were read."""

    def __init__(self, weights: Weights, runs: int, progress: Progress | None) -> None:
        self._weights, self._progress = weights, progress
        self._each = len(weights.names())
        self._total = runs * self._each
        self._begun = -1
        self._seen: set[str] = set()

    def begin(self) -> None:
        """Another run begins."""
        self._begun += 1
        self._seen.clear()

    def names(self) -> tuple[str, ...]:
        return self._weights.names()

    def shape(self, name: str) -> Shape:
        return self._weights.shape(name)

    def dtype(self, name: str) -> str:
        return self._weights.dtype(name)

    def read(self, name: str, index: Index = None) -> np.ndarray:
        if name not in self._seen:
            self._seen.add(name)
            if self._progress:
                self._progress(self._begun * self._each + len(self._seen), self._total)
        return self._weights.read(name, index)
