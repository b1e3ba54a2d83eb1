"""What a backend does not claim, it must refuse with a typed error: never do it wrongly."""

import dataclasses
from collections.abc import Callable

import numpy as np

from gemma_hub.backend import Model, SupportsCache, SupportsExport, SupportsGradients, TaskSpec
from gemma_hub.errors import GemmaHubError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.heads import BASE, SEQUENCE, TOKEN
from gemma_hub_conformance.spec import CaseFailed, Subject


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
        task, options = TaskSpec(checkpoint.task), subject.options("float32")
        subject.backend.build(checkpoint.config, task, checkpoint.weights(), options)
    elif feature in _CONFIGS:
        config = dataclasses.replace(GQA.config, **_CONFIGS[feature])  # type: ignore[arg-type]
        subject.backend.build(config, TaskSpec(), GQA.weights(), subject.options("float32"))
    else:
        _CALLS[feature](subject.model(GQA, "float32"))


_CONFIGS: dict[str, dict[str, object]] = {
    "sliding_window": {"sliding_window": 5, "layer_types": ("sliding_attention",) * 3},
    "softcap": {"final_logit_softcapping": 3.0},
    "qk_norm": {"use_qk_norm": True},
}


def _cache(model: Model) -> None:
    if not isinstance(model, SupportsCache):
        raise UnsupportedFeature("cache", "this one")
    model.init_cache(1, 1)


def _export(model: Model) -> None:
    if not isinstance(model, SupportsExport):
        raise UnsupportedFeature("export", "this one")
    model.export()


def _embeds(model: Model) -> None:
    embeds = np.ones((1, 2, GQA.config.hidden_size), np.float32)
    model.forward(ModelInputs.prepare(GQA.config, inputs_embeds=embeds))


def _gradients(model: Model) -> None:
    if not isinstance(model, SupportsGradients):
        raise UnsupportedFeature("gradients", "this one")
    model.loss_and_gradients(ModelInputs.prepare(GQA.config, [[12, 13]], labels=[[12, 13]]))


def _attentions(model: Model) -> None:
    model.forward(ModelInputs.prepare(GQA.config, [[12, 13]], output_attentions=True))


_TASKS = {
    checkpoint.task: checkpoint
    for checkpoint in (BASE, SEQUENCE["single_label_classification"], TOKEN)
}

_CALLS: dict[str, Callable[[Model], None]] = {
    "cache": _cache,
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
