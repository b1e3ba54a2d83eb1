"""L1.contract: what a caller may rely on, whatever the numbers."""

import dataclasses
from functools import partial

import numpy as np

from gemma_hub.backend import BuildOptions, SupportsExport, TaskSpec
from gemma_hub.errors import GemmaHubError, UnsupportedFeature
from gemma_hub_conformance.cases.forward import LENGTH, padded
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.spec import CaseContext, CaseFailed, CaseSpec, prepare


def cases() -> list[CaseSpec]:
    """Types, side effects, errors and export."""
    checks = {
        "devices": ("The backend names the devices that it builds on.", _devices),
        "logits_type": ("Logits are float32.", _logits_type),
        "logits_type_bfloat16": ("Logits of a bfloat16 model are float32.", _logits_type),
        "inputs_unchanged": ("No array of the inputs is written to.", _inputs_unchanged),
        "repeated_call": ("The same call twice gives bit-equal logits.", _repeated_call),
        "two_models": ("Two models in one process do not share anything.", _two_models),
        "refuses_dtype": ("An unknown dtype is a typed error.", _refuses_dtype),
        "refuses_device": ("An unknown device is a typed error.", _refuses_device),
        "refuses_task": ("An unknown task is UnsupportedFeature.", _refuses_task),
    }
    named = [
        CaseSpec(
            f"L1.contract.{name}", doc, run, dtype="bfloat16" if "bfloat16" in name else "float32"
        )
        for name, (doc, run) in checks.items()
    ]
    export = [
        CaseSpec(
            f"L1.contract.export_{name}",
            f"The parameters of `{name}` come back bit-equal, by their names, and no others.",
            partial(judge_export, checkpoint=CHECKPOINTS[name]),
            needs=frozenset({"export"}),
        )
        for name in ("gqa", "untied", "bias")
    ]
    return [*named, *export]


def _batch() -> Batch:
    return Batch.of(padded("left_padding"), LENGTH)


def _devices(context: CaseContext) -> None:
    devices = context.subject.backend.devices()
    context.require(len(devices) > 0, "devices() is empty")
    context.require(all(isinstance(d, str) for d in devices), f"devices() is {devices!r}")


def _logits_type(context: CaseContext) -> None:
    outputs = context.model(GQA).forward(prepare(GQA, _batch()))
    kind = str(outputs.logits.dtype).rpartition(".")[2]
    context.require(kind == "float32", f"the logits are {kind}; expected float32")


def _inputs_unchanged(context: CaseContext) -> None:
    inputs = prepare(GQA, _batch())
    names = ("input_ids", "attention_mask", "position_ids")
    before = {name: getattr(inputs, name).copy() for name in names}
    context.model(GQA).forward(inputs)
    for name in names:
        context.require(
            np.array_equal(before[name], getattr(inputs, name)), f"forward changed {name}"
        )


def _repeated_call(context: CaseContext) -> None:
    first, second = (context.forward(GQA, _batch()).logits for _ in range(2))
    context.require(
        first.tobytes() == second.tobytes(), "two calls with the same inputs differ in some bits"
    )


def _two_models(context: CaseContext) -> None:
    before = context.forward(GQA, _batch()).logits
    other = CHECKPOINTS["linear_rope"]  # the same shapes
    context.judge_logits(context.forward(other, _batch()).logits, other, _batch())
    after = context.forward(GQA, _batch()).logits
    context.require(
        before.tobytes() == after.tobytes(), "a model's logits changed when another one ran"
    )


def _refuses(context: CaseContext, what: str, task: str, options: BuildOptions) -> GemmaHubError:
    try:
        context.subject.backend.build(GQA.config, TaskSpec(task), GQA.weights(), options)
    except GemmaHubError as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        context.fail(f"{what} raised {type(error).__name__} ({error}); expected a GemmaHubError")
    raise CaseFailed(f"{what} was built; expected a GemmaHubError")


def _refuses_dtype(context: CaseContext) -> None:
    options = dataclasses.replace(context.subject.options("float32"), dtype="float3")
    _refuses(context, "dtype 'float3'", "causal_lm", options)


def _refuses_device(context: CaseContext) -> None:
    options = dataclasses.replace(context.subject.options("float32"), device="abacus:0")
    _refuses(context, "device 'abacus:0'", "causal_lm", options)


def _refuses_task(context: CaseContext) -> None:
    error = _refuses(
        context, "the task 'palm_reading'", "palm_reading", context.subject.options("float32")
    )
    context.require(
        isinstance(error, UnsupportedFeature),
        f"the error is {type(error).__name__}; expected UnsupportedFeature",
    )


def judge_export(context: CaseContext, checkpoint: DesignedCheckpoint) -> None:
    """Fail unless the model of `checkpoint` gives its parameters back bit for bit."""
    model = context.model(checkpoint)
    if not isinstance(model, SupportsExport):
        context.fail("the backend claims 'export' and its model has no export")
    exported, original = model.export(), checkpoint.weights()
    found, expected = set(exported.names()), set(original.names())
    context.require(found == expected, f"the names differ: {sorted(found ^ expected)[:5]}")
    for each in sorted(expected):
        array = np.asarray(exported.read(each))
        truth = original.read(each)
        same = array.dtype == truth.dtype and array.shape == truth.shape
        context.require(
            same and array.tobytes() == truth.tobytes(),
            f"{each} is not bit-equal to what was loaded",
        )
