"""Gemma.load: from a checkpoint's name to a model that runs, on any backend."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import CLASSIFICATIONS, GemmaConfig
from gemma_hub.config_checks import resolved_labels
from gemma_hub.conversion.loading import open_for_task
from gemma_hub.errors import (
    ConfigError,
    InputError,
    PluginError,
    UnsupportedFeature,
    VerificationError,
    nearest,
)
from gemma_hub.parameters import DTYPES
from gemma_hub.plugins.registry import LoadedBackend, plugin_registry
from gemma_hub.probe import PROBE_FILE, needed_probe
from gemma_hub.source import resolved
from gemma_hub.tasks.causal_lm import CausalLM
from gemma_hub.tasks.embedding import BaseModel
from gemma_hub.tasks.loaded_model import LoadedModel
from gemma_hub.tasks.sequence_classification import SequenceClassifier
from gemma_hub.tasks.token_classification import TokenClassifier
from gemma_hub.tokenizers import open_tokenizer
from gemma_hub.tokenizers.interface import TokenizerInterface

TASKS: dict[str, type[LoadedModel]] = {
    kind.task: kind for kind in (CausalLM, BaseModel, SequenceClassifier, TokenClassifier)
}
"""What a model can be loaded for, by name."""

# The members that every model has ("forward"), and those that a declared feature adds.
_PROMISES = {
    "forward": ("device", "forward", "native", "to_numpy"),
    "cache": ("extend", "init_cache"),
    "cache_rows": ("gather_rows",),
    "greedy_steps": ("greedy_steps",),
    "export": ("export",),
    "gradients": ("loss_and_gradients",),
}


class Gemma:
    """The front door."""

    @overload
    @staticmethod
    def load(
        source: str | os.PathLike[str],
        backend: str | None = None,
        task: Literal["causal_lm"] = "causal_lm",
        dtype: str = "auto",
        device: str = "auto",
        allow_unknown: Sequence[str] = (),
        *,
        verify: bool = False,
        backend_options: Mapping[str, Any] | None = None,
    ) -> CausalLM: ...
    @overload
    @staticmethod
    def load(
        source: str | os.PathLike[str],
        backend: str | None = None,
        *,
        task: Literal["base"],
        dtype: str = "auto",
        device: str = "auto",
        allow_unknown: Sequence[str] = (),
        verify: bool = False,
        backend_options: Mapping[str, Any] | None = None,
    ) -> BaseModel: ...
    @overload
    @staticmethod
    def load(
        source: str | os.PathLike[str],
        backend: str | None = None,
        *,
        task: Literal["sequence_classification"],
        dtype: str = "auto",
        device: str = "auto",
        allow_unknown: Sequence[str] = (),
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        seed: int = 0,
        verify: bool = False,
        backend_options: Mapping[str, Any] | None = None,
    ) -> SequenceClassifier: ...
    @overload
    @staticmethod
    def load(
        source: str | os.PathLike[str],
        backend: str | None = None,
        *,
        task: Literal["token_classification"],
        dtype: str = "auto",
        device: str = "auto",
        allow_unknown: Sequence[str] = (),
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        seed: int = 0,
        verify: bool = False,
        backend_options: Mapping[str, Any] | None = None,
    ) -> TokenClassifier: ...
    @overload
    @staticmethod
    def load(
        source: str | os.PathLike[str],
        backend: str | None = None,
        task: str = "causal_lm",
        dtype: str = "auto",
        device: str = "auto",
        allow_unknown: Sequence[str] = (),
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        seed: int = 0,
        *,
        verify: bool = False,
        backend_options: Mapping[str, Any] | None = None,
    ) -> LoadedModel: ...

    @staticmethod
    def load(
        source: str | os.PathLike[str],
        backend: str | None = None,
        task: str = "causal_lm",
        dtype: str = "auto",
        device: str = "auto",
        allow_unknown: Sequence[str] = (),
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        seed: int = 0,
        *,
        verify: bool = False,
        backend_options: Mapping[str, Any] | None = None,
    ) -> LoadedModel:
        """A checkpoint, built on a backend.

        Args:
            source: a checkpoint of any format that `gemma-hub formats` lists, a folder or a file;
                the name of an installed checkpoint ("tiny"); or a repository of the Hugging Face
                hub, "owner/name" or "owner/name@revision", which is fetched into the hub's cache.
            backend: its name, or "distribution:name"; None for the one that GEMMA_HUB_BACKEND
                names, else as `PluginRegistry.load` chooses.
            task: what to load it for: "causal_lm", "base", "sequence_classification" or
                "token_classification".
            dtype: a key of `gemma_hub.parameters.DTYPES`; "auto" for the checkpoint's own.
            device: one of the backend's `devices()`, in its own words; "auto" for its default.
            allow_unknown: keys of config.json to ignore although nothing here knows them.
            num_labels: number of labels of a classifier. Needed where the checkpoint has no head
                for the task: it then gets a new one, and a `NewHeadWarning` says so.
            id2label: {id: name} of every label, instead of the checkpoint's names; num_labels
                follows from it.
            seed: of a new head, which is the same for every backend.
            verify: compute the probe beside the weights again, and refuse a model that differs
                from it by more than rounding. `verification` of what is returned has the figures.
            backend_options: what this backend has for itself, by its own names, such as
                {"native": True} of torch and flax.

        Returns:
            A CausalLM, BaseModel, SequenceClassifier or TokenClassifier.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            VerificationError: it does not compute what its probe says.
            CheckpointError, ConfigError, TokenizerError: the checkpoint is damaged or unknown, or
                has no head for the task and num_labels was not given.
            BackendNotFoundError, PluginError: there is no such backend, or it does not load.
            UnsupportedFeature: the backend lacks the task, the dtype or something that the config
                needs.
            InputError: the task, the dtype or the device is no known name, the labels are wrong, or
                the backend does not have such an option or not with such a value.
        """
        check_name("task", task, TASKS)
        check_name("dtype", dtype, ("auto", *DTYPES))
        options = _checked_options(backend_options)
        num_labels = _number_of_labels(task, num_labels, id2label)
        checkpoint, files = open_for_task(
            resolved(source), task, tuple(allow_unknown), num_labels=num_labels, seed=seed
        )
        config = checkpoint.config
        if id2label is not None:
            config = config.with_labels(num_labels, id2label)
        loaded = plugin_registry().load(backend)
        dtype = checkpoint.dtype if dtype == "auto" else dtype
        _check_support(loaded, config, task, dtype)
        model = loaded.backend.build(
            config,
            TaskSpec(task),
            checkpoint.weights,
            BuildOptions(dtype=dtype, device=device, extra=options),
        )
        _check_contract(loaded, model)
        ends = {"eos_token_ids": checkpoint.eos_token_ids} if task == "causal_lm" else {}
        lm = TASKS[task](
            model,
            config,
            backend=loaded,
            dtype=dtype,
            tokenizer=_tokenizer(files),
            files=files,
            **ends,
        )
        if verify:
            _verify(lm, checkpoint.path)
        return lm


def _verify(lm: LoadedModel, path: Path) -> None:
    """Check a model against the probe in its folder.

    Raises:
        CheckpointError: there is none; it is damaged; or, a VerificationError, the model differs.
        InputError: the model was loaded for another task than the probe is of.
    """
    verification = lm.verify(needed_probe(path, lm.config))
    if not verification.passed:
        raise VerificationError(
            f"{path} does not compute what its {PROBE_FILE} says: {verification.reason}. The "
            "weights were damaged or changed after it was written, or the backend "
            f"{lm.backend.name!r} is wrong ('gemma-hub verify' tries others). If they were changed "
            "on purpose, delete that file, or save the model again."
        )
    lm.verification = verification


def _tokenizer(files: Mapping[str, Path]) -> TokenizerInterface | None:
    """The tokenizer among a checkpoint's files: of the whole folder where it is an ordinary one."""
    for name in ("tokenizer.model", "tokenizer.json"):
        if name in files:
            path = files[name]
            return open_tokenizer(path.parent if path.name == name else path)
    return None


def _checked_options(options: Any) -> dict[str, Any]:
    """A copy of `backend_options`; which there are is the backend's to say.

    Raises:
        InputError: they are no mapping of names.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InputError(
            f'backend_options is {options!r}; expected names with values: {{"native": True}}.'
        )
    return dict(options)


def _number_of_labels(task: str, num_labels: int | None, id2label: Any) -> int | None:
    """`num_labels`, or the number of names in `id2label`.

    Raises:
        InputError: the task has no labels, or the two contradict one another.
    """
    if id2label is None:
        return num_labels
    if task not in CLASSIFICATIONS:
        raise InputError(f"id2label was given and the task {task!r} has no labels. Leave it out.")
    try:
        return len(resolved_labels(num_labels, id2label))
    except ConfigError as error:
        raise InputError(str(error)) from error


def check_name(what: str, name: Any, known: Collection[str]) -> None:
    """Raise an InputError unless `name` is one of `known`."""
    if not isinstance(name, str) or name not in known:
        hint = nearest(str(name), known)
        raise InputError(
            f"There is no {what} {name!r}. {hint}{' ' if hint else ''}Known: {', '.join(known)}."
        )


def _check_support(loaded: LoadedBackend, config: GemmaConfig, task: str, dtype: str) -> None:
    if task not in loaded.spec.tasks:
        known = ", ".join(loaded.spec.tasks)
        raise UnsupportedFeature(f"task:{task}", loaded.name, f"It has the tasks {known}.")
    for feature in config.required_features:
        if feature not in loaded.spec.features:
            raise UnsupportedFeature(
                feature, loaded.name, "This checkpoint's config needs it; choose another backend."
            )
    if dtype not in loaded.spec.dtypes:
        known = ", ".join(loaded.spec.dtypes)
        raise UnsupportedFeature(f"dtype:{dtype}", loaded.name, f"Pass dtype= one of {known}.")


def _check_contract(loaded: LoadedBackend, model: Any) -> None:
    """The model has what its backend's spec promises, as far as names can tell."""
    for feature, members in _PROMISES.items():
        missing = [name for name in members if getattr(model, name, None) is None]
        if missing and (feature == "forward" or feature in loaded.spec.features):
            raise PluginError(
                f"Backend {loaded.name!r} (from {loaded.distribution} {loaded.version}) built a "
                f"{type(model).__name__} that lacks {', '.join(missing)}, which {feature!r} "
                "needs. Report it to the authors of that distribution."
            )
