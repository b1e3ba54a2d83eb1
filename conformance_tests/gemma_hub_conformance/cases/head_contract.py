"""L5.contract: types of what the heads return, and what they refuse."""

from gemma_hub.backend import SupportsGradients
from gemma_hub.errors import GemmaHubError, InputError, UnsupportedFeature
from gemma_hub_conformance.cases.forward import LENGTH, padded
from gemma_hub_conformance.cases.heads import CLASSIFIER, NEEDS
from gemma_hub_conformance.cases.losses import sequence_labels, token_labels
from gemma_hub_conformance.checkpoints import GQA, DesignedCheckpoint
from gemma_hub_conformance.heads import BASE, TOKEN
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.spec import CaseContext, CaseSpec, prepare


def cases() -> list[CaseSpec]:
    """Types, and gradients of nothing."""
    checks = {
        "sequence_type": ("Logits and loss of a sequence classifier are float32.", _sequence_type),
        "token_type": ("Logits and loss of a token classifier are float32.", _token_type),
        "no_labels_no_loss": ("Without labels there is no loss.", _no_loss),
        "gradients_need_labels": (
            "Gradients of inputs without labels are an InputError.",
            _gradients_need_labels,
        ),
        "base_has_no_gradients": (
            "The task base has no loss: its gradients are UnsupportedFeature.",
            _base_has_no_gradients,
        ),
    }
    needs = {
        "sequence_type": NEEDS["sequence"],
        "token_type": NEEDS["token"],
        "gradients_need_labels": frozenset({"gradients"}),
        "base_has_no_gradients": NEEDS["base"] | {"gradients"},
    }
    return [
        CaseSpec(f"L5.contract.{name}", doc, run, needs.get(name, frozenset()))
        for name, (doc, run) in checks.items()
    ]


def _batch() -> Batch:
    return Batch.of(padded("left_padding"), LENGTH)


def _types(context: CaseContext, checkpoint: DesignedCheckpoint, labels: object) -> None:
    outputs = context.model(checkpoint).forward(prepare(checkpoint, _batch(), labels=labels))
    for name in ("logits", "loss"):
        kind = str(getattr(outputs, name).dtype).rpartition(".")[2]
        context.require(kind == "float32", f"{name} is {kind}; expected float32")


def _sequence_type(context: CaseContext) -> None:
    _types(context, CLASSIFIER, sequence_labels("single_label_classification", 1))


def _token_type(context: CaseContext) -> None:
    _types(context, TOKEN, token_labels(_batch(), 1))


def _no_loss(context: CaseContext) -> None:
    loss = context.forward(GQA, _batch()).loss
    context.require(loss is None, f"without labels the loss is {loss}; expected None")


def _gradients_need_labels(context: CaseContext) -> None:
    _refuses_gradients(context, GQA, InputError)


def _base_has_no_gradients(context: CaseContext) -> None:
    _refuses_gradients(context, BASE, UnsupportedFeature)


def _refuses_gradients(
    context: CaseContext, checkpoint: DesignedCheckpoint, expected: type[GemmaHubError]
) -> None:
    model = context.model(checkpoint)
    if not isinstance(model, SupportsGradients):
        context.fail("the backend claims 'gradients' and its model has no loss_and_gradients")
    inputs = prepare(checkpoint, _batch())
    what = f"loss_and_gradients of the task {checkpoint.task!r} without labels"
    try:
        model.loss_and_gradients(inputs)
    except expected:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        kind = type(error).__name__
        context.fail(f"{what} raised {kind} ({error}); expected {expected.__name__}")
    context.fail(f"{what} was accepted; expected {expected.__name__}")
