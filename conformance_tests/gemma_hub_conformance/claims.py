"""What a backend does not claim, it must refuse with a typed error: never do it wrongly."""

import dataclasses
from collections.abc import Callable

import numpy as np

from gemma_hub.backend import (
    FEATURES,
    Model,
    SupportsCache,
    SupportsCacheRows,
    SupportsExport,
    SupportsGradients,
    SupportsGreedySteps,
    TaskSpec,
)
from gemma_hub.errors import GemmaHubError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.checkpoints import GQA, DesignedCheckpoint
from gemma_hub_conformance.heads import BASE, SEQUENCE, TOKEN
from gemma_hub_conformance.spec import CaseFailed, Subject

IDS = np.arange(12, 12 + 3 * 23).reshape(3, 23)
"""(3, 23): the shape of most cases' batches, so that a compiled backend compiles nothing for it."""


def check_refused(subject: Subject, feature: str) -> None:
    """Fail unless `subject`, which does not claim `feature`, refuses it by its name.

    A feature of the model's interface may be absent from it; otherwise it raises
    `UnsupportedFeature`. "task:NAME" is a feature too.
    """
    what = f"the unclaimed feature {feature!r}"
    error = _expect(UnsupportedFeature, what, lambda: _use(subject, feature))
    named = getattr(error, "feature", None)
    if named != feature:
        raise CaseFailed(f"{what} is refused under the name {named!r}")


def check_present(subject: Subject, feature: str) -> None:
    """Fail unless `subject`, which claims `feature`, has it. "task:NAME" is a feature too.

    Whether it does it rightly is a question for other cases.
    """
    if feature in _PROTOCOLS:
        if not isinstance(subject.model(GQA, usable_dtype(subject)), _PROTOCOLS[feature]):
            raise CaseFailed(
                f"the backend claims {feature!r} and its model has no {FEATURES[feature]}"
            )
        return
    try:
        _use(subject, feature)
    except UnsupportedFeature as error:
        raise CaseFailed(f"the backend claims {feature!r} and refuses it: {error}") from error


def check_dtype_refused(subject: Subject, dtype: str) -> None:
    """Fail unless a model in the unclaimed compute type `dtype` is refused."""
    _expect(
        GemmaHubError,
        f"the unclaimed dtype {dtype!r}",
        lambda: subject.backend.build(
            GQA.config, TaskSpec(), GQA.weights(), subject.options(dtype)
        ),
    )


def _use(subject: Subject, feature: str) -> None:
    if feature.startswith("task:"):
        checkpoint = _TASKS[feature.removeprefix("task:")]
        task, options = TaskSpec(checkpoint.task), subject.options(usable_dtype(subject))
        subject.backend.build(checkpoint.config, task, checkpoint.weights(), options)
    elif feature in _CONFIGS:
        config = dataclasses.replace(GQA.config, **_CONFIGS[feature])  # type: ignore[arg-type]
        # With weights that fit, so that it is the feature and nothing else that is refused.
        weights = DesignedCheckpoint(feature, "", config).weights()
        subject.backend.build(config, TaskSpec(), weights, subject.options(usable_dtype(subject)))
    else:
        _CALLS[feature](subject.model(GQA, usable_dtype(subject)))


def usable_dtype(subject: Subject) -> str:
    """A compute type that is not what is refused."""
    return "float32" if "float32" in subject.dtypes else subject.dtypes[0]


_CONFIGS: dict[str, dict[str, object]] = {
    "sliding_window": {"sliding_window": 5, "layer_types": ("sliding_attention",) * 3},
    "softcap": {"final_logit_softcapping": 3.0},
    "qk_norm": {"use_qk_norm": True},
}


def _cache(model: Model) -> None:
    if not isinstance(model, SupportsCache):
        raise UnsupportedFeature("cache", "this one")
    model.init_cache(1, 1)


def _cache_rows(model: Model) -> None:
    if not isinstance(model, SupportsCacheRows):
        raise UnsupportedFeature("cache_rows", "this one")
    model.gather_rows([model.init_cache(1, 1)], [(0, 0)], 1)


def _greedy_steps(model: Model) -> None:
    if not isinstance(model, SupportsGreedySteps):
        raise UnsupportedFeature("greedy_steps", "this one")
    model.greedy_steps(IDS[0, :1], np.ones(1, np.bool_), model.init_cache(1, 1), 1, ())


def _export(model: Model) -> None:
    if not isinstance(model, SupportsExport):
        raise UnsupportedFeature("export", "this one")
    model.export()


def _embeds(model: Model) -> None:
    embeds = np.ones((*IDS.shape, GQA.config.hidden_size), np.float32)
    model.forward(ModelInputs.prepare(GQA.config, inputs_embeds=embeds))


def _gradients(model: Model) -> None:
    if not isinstance(model, SupportsGradients):
        raise UnsupportedFeature("gradients", "this one")
    model.loss_and_gradients(ModelInputs.prepare(GQA.config, IDS, labels=IDS))


def _attentions(model: Model) -> None:
    model.forward(ModelInputs.prepare(GQA.config, IDS, output_attentions=True))


_TASKS = {
    checkpoint.task: checkpoint
    for checkpoint in (GQA, BASE, SEQUENCE["single_label_classification"], TOKEN)
}

_PROTOCOLS: dict[str, type] = {
    "cache": SupportsCache,
    "cache_rows": SupportsCacheRows,
    "export": SupportsExport,
    "gradients": SupportsGradients,
    "greedy_steps": SupportsGreedySteps,
}

_CALLS: dict[str, Callable[[Model], None]] = {
    "cache": _cache,
    "cache_rows": _cache_rows,
    "greedy_steps": _greedy_steps,
    "export": _export,
    "inputs_embeds": _embeds,
    "gradients": _gradients,
    "attentions": _attentions,
}


def _expect(kind: type[GemmaHubError], what: str, use: Callable[[], object]) -> GemmaHubError:
    try:
        use()
    except kind as error:
        return error
    except Exception as error:
        raise CaseFailed(
            f"{what} raised {type(error).__name__} ({error}); expected {kind.__name__}"
        ) from error
    raise CaseFailed(f"{what} was accepted; expected {kind.__name__}")
