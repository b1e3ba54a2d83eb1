"""The backend "numpy": the contract of gemma_hub around `Reference` and `Witness`."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma_hub.backend import BuildOptions, Cache, TaskSpec
from gemma_hub.config import ARCHITECTURES, GemmaConfig
from gemma_hub.errors import InputError, UnsupportedFeature, nearest
from gemma_hub.inputs import ModelInputs
from gemma_hub.memory import check_cache_fits, free_host_memory
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import DTYPES, Index, Shape, Weights, check_weights, parameter_shapes
from gemma_hub_numpy.model import Reference, Witness

NAME = "numpy"
DEVICE = "cpu"


class NumpyBackend:
    """Builds the float64 reference, or for a narrower type one witness of it."""

    def devices(self) -> Sequence[str]:
        return (DEVICE,)

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> "NumpyModel":
        """A model that reads `weights` as it runs.

        Args:
            config: the model's configuration.
            task: any that `gemma_hub.config.ARCHITECTURES` names.
            weights: the parameters; must stay readable as long as the model is used.
            options: dtype "float64" gives `Reference`; "float32", "bfloat16" and "float16" give
                `Witness`, with extra={"witness": seed}, seed 0 if not given.

        Raises:
            UnsupportedFeature: another task, or a config that needs a feature this lacks.
            InputError: a device, a dtype or an extra option that there is not.
            CheckpointError: parameters are missing or have the wrong shape.
        """
        if task.name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnsupportedFeature(task.name, NAME, f"The tasks that it has: {known}.")
        if config.use_qk_norm:
            raise UnsupportedFeature("qk_norm", NAME, "Use a backend that lists it.")
        _check_options(options)
        check_weights(config, task.name, weights)
        held = CastWeights(config, weights, options.dtype, task.name)
        if options.dtype == "float64":
            return NumpyModel(Reference(config, held, task.name))
        seed = options.extra.get("witness", 0)
        return NumpyModel(Witness(config, held, options.dtype, seed, task.name))


class NumpyModel:
    """One checkpoint in NumPy.

    Attributes:
        native: the `Reference` or `Witness`.
        device: "cpu".
    """

    def __init__(self, reference: Reference) -> None:
        self.native = reference
        self.device = DEVICE

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        return self._typed(self.native.run(inputs))

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        self._check_fits(batch_size, max_length)
        return Cache.empty(self.native.new_cache(batch_size, max_length), batch_size, max_length)

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        valid = cache.admit(inputs)
        outputs = self.native.run(inputs, valid, cache.length, cache.arrays)
        return self._typed(outputs), cache.advanced(inputs, cache.arrays)

    def gather_rows(
        self, caches: Sequence[Cache], rows: Sequence[tuple[int, int]], max_length: int
    ) -> Cache:
        self._check_fits(len(rows), max_length)
        cache, slots = Cache.gathered(caches, rows, max_length)
        layers = zip(*(each.arrays for each in caches), strict=True)
        arrays = [
            tuple(_gathered(each, slots) for each in zip(*layer, strict=True)) for layer in layers
        ]
        return dataclasses.replace(cache, arrays=arrays)

    def greedy_steps(
        self,
        token_ids: np.ndarray,
        running: np.ndarray,
        cache: Cache,
        num_steps: int,
        stops: Sequence[int],
    ) -> tuple[np.ndarray, Cache]:
        cache.stepped(running, num_steps, None)  # raises if there is no room
        chosen: list[np.ndarray] = []
        ids = token_ids
        while len(chosen) < num_steps and not np.isin(ids[running], stops if chosen else ()).any():
            inputs = ModelInputs.prepare(
                self.native.config,
                ids[:, None],
                running[:, None],
                logits_to_keep=1,
                next_position=cache.next_position,
            )
            outputs, after = self.extend(inputs, cache)
            logits = self.to_numpy(outputs.logits)[:, -1]
            if not np.isfinite(logits[running].max(axis=1)).all():
                break  # `cache` is as it was; the slot behind its end does not count
            ids, cache = np.where(running, logits.argmax(axis=1), token_ids), after
            chosen.append(np.where(running, ids, -1))
        return np.array(chosen, np.int64).reshape(-1, len(running)).T, cache

    def export(self) -> Weights:
        return self.native.weights

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        """`array`, with bfloat16 and float16 as float32; float64 stays float64."""
        return array if array.dtype in (np.float64, np.float32) else array.astype(np.float32)

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and the gradient of each parameter in the type and the shape of it.

        Raises:
            UnsupportedFeature: the task is "base".
            InputError: the inputs have no labels.
        """
        if self.native.task == "base":
            raise UnsupportedFeature("gradients", NAME, "The model without a head has no loss.")
        kind = DTYPES[self.native.dtype]
        loss, gradients = self.native.loss_and_gradients(inputs)
        return loss, {name: value.astype(kind, copy=False) for name, value in gradients.items()}

    def _check_fits(self, batch_size: int, max_length: int) -> None:
        check_cache_fits(
            self.native.config, batch_size, max_length, itemsize=8, free=free_host_memory
        )

    def _typed(self, outputs: ModelOutputs) -> ModelOutputs:
        """Outputs in the types of the contract; the reference keeps all of them in float64."""
        exact = self.native.dtype == "float64"
        single = DTYPES["float64" if exact else "float32"]
        kind = DTYPES[self.native.dtype]
        return ModelOutputs(
            logits=_cast(outputs.logits, single),
            hidden_states=_cast_all(outputs.hidden_states, kind),
            as_numpy=self.to_numpy,
            loss=_cast(outputs.loss, single),
            attentions=_cast_all(outputs.attentions, kind),
            last_hidden_state=_cast(outputs.last_hidden_state, kind),
        )


class CastWeights:
    """Another `Weights`, each tensor cast to one type when it is read: no copy of the model."""

    def __init__(
        self, config: GemmaConfig, weights: Weights, dtype: str, task: str = "causal_lm"
    ) -> None:
        self._weights = weights
        self._shapes = parameter_shapes(config, task)
        self._dtype = dtype

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        if name not in self._shapes:
            raise KeyError(name)
        return self._dtype

    def read(self, name: str, index: Index = None) -> np.ndarray:
        return self._weights.read(name, index).astype(DTYPES[self._dtype], copy=False)


def _cast(array: np.ndarray | None, kind: np.dtype) -> np.ndarray | None:
    return None if array is None else array.astype(kind, copy=False)


def _cast_all(
    arrays: tuple[np.ndarray, ...] | None, kind: np.dtype
) -> tuple[np.ndarray, ...] | None:
    return None if arrays is None else tuple(array.astype(kind, copy=False) for array in arrays)


def _check_options(options: BuildOptions) -> None:
    if options.device not in ("auto", DEVICE):
        raise InputError(f"device is {options.device!r}; the backend 'numpy' has only {DEVICE!r}.")
    if options.dtype not in DTYPES:
        raise InputError(
            f"dtype is {options.dtype!r}; the backend 'numpy' has {', '.join(DTYPES)}."
        )
    for name in options.extra:
        if name != "witness":
            raise InputError(
                f"{name!r} is not an option of the backend 'numpy', which has only 'witness' (an "
                f"integer seed). {nearest(name, ['witness'])}".rstrip()
            )
    if "witness" in options.extra:
        seed = options.extra["witness"]
        if type(seed) is not int or seed < 0:
            raise InputError(f"witness is {seed!r}; expected a seed, an integer from 0 up.")
        if options.dtype == "float64":
            raise InputError(
                "witness is given with dtype 'float64', where nothing is rounded. Leave it out, or "
                "ask for float32, bfloat16 or float16."
            )


def _gathered(arrays: Sequence[np.ndarray], slots: np.ndarray) -> np.ndarray:
    """(B, S, ...) of the slots of (b, s, ...) arrays counted end to end; zeros where it is -1."""
    shape = arrays[0].shape[2:]
    flat = [array.reshape(-1, *shape) for array in arrays]
    return np.asarray(np.concatenate([*flat, np.zeros((1, *shape), arrays[0].dtype)])[slots])
