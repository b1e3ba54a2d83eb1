"""L6.checkpoint: weights from a file into a model and back, and weights that do not fit."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from gemma_hub.backend import Model, SupportsExport, TaskSpec
from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.errors import CheckpointError, GemmaHubError
from gemma_hub.parameters import ArrayWeights, Weights
from gemma_hub_conformance.cases.forward import LENGTH, left_padded
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.seeds import entropy
from gemma_hub_conformance.spec import CaseContext, CaseFailed, CaseSpec, prepare

_UNTIED = CHECKPOINTS["untied"]
_EXPORT = frozenset({"export"})
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SURPLUS_DRAW = 60_001  # no other draw of the suite has this key


@dataclasses.dataclass(frozen=True, slots=True)
class MixedTypes(DesignedCheckpoint):
    """A designed checkpoint whose tensors are stored in all three types in turn."""

    def weights(self, dtype: str = "float32") -> Weights:
        """The parameters as they are stored, whatever `dtype` a model is to have."""
        kinds = ("bfloat16", "float16", "float32")
        stored = [DesignedCheckpoint.weights(self, kind) for kind in kinds]
        return ArrayWeights(
            {name: stored[i % 3].read(name) for i, name in enumerate(stored[0].names())}
        )


MIXED = MixedTypes("gqa_mixed", "`gqa` stored in three types", GQA.config, GQA.name)


def cases() -> list[CaseSpec]:
    """Saved and read again, refused, widened, and left as they were."""
    saved = [
        CaseSpec(
            f"L6.checkpoint.saved.{name}",
            f"`{checkpoint.name}` in {dtype}, saved and read, is bit-equal and works.",
            partial(_saved, checkpoint=checkpoint),
            needs=_EXPORT,
            dtype=dtype,
        )
        for name, checkpoint, dtype in (
            ("gqa", GQA, "float32"),
            ("untied", _UNTIED, "float32"),
            ("gqa_bfloat16", GQA, "bfloat16"),
            ("gqa_float16", GQA, "float16"),
        )
    ]
    again = CaseSpec(
        "L6.checkpoint.saved_again",
        "What is saved, read and saved again is byte for byte the first file.",
        _saved_again,
        needs=_EXPORT,
    )
    checks = {
        "missing": ("A parameter that is not there is a CheckpointError with its name.", _missing),
        "misshapen": ("One of another shape is a CheckpointError with its name.", _misshapen),
        "surplus": ("What the config does not call for is refused or has no effect.", _surplus),
        "widened": ("Tensors stored in narrower types become float32 unchanged.", _widened),
        "reordered": ("Tensors in another order make the same model.", _reordered),
        "source_kept": ("Neither build nor a call writes to the source's arrays.", _source_kept),
    }
    others = [CaseSpec(f"L6.checkpoint.{name}", *check) for name, check in checks.items()]
    return [*saved, again, *others]


# -- saved and read --------------------------------------------------------------------------------


def _saved(context: CaseContext, checkpoint: DesignedCheckpoint) -> None:
    source = checkpoint.weights(context.dtype)
    with _folder() as folder:
        _save(context, folder / "saved", checkpoint, _export(context, context.model(checkpoint)))
        found = open_checkpoint(folder / "saved").weights
        for name in source.names():
            _require_bits(context, name, found.read(name), source.read(name))
        _judge(context, _build(context, found, checkpoint), checkpoint)


def _saved_again(context: CaseContext) -> None:
    with _folder() as folder:
        save_checkpoint(folder / "source", GQA.config, GQA.weights())
        _save(context, folder / "first", GQA, _export(context, context.model(GQA)))
        model = _build(context, open_checkpoint(folder / "first").weights)
        _save(context, folder / "second", GQA, _export(context, model))
        for path in sorted((folder / "source").iterdir()):
            for copy in ("first", "second"):
                context.require(
                    (folder / copy / path.name).read_bytes() == path.read_bytes(),
                    f"{path.name} of the {copy} saved checkpoint differs from the source's",
                )


@contextmanager
def _folder() -> Iterator[Path]:
    # A model may map the files for as long as it lives, which some systems do not let go of.
    with tempfile.TemporaryDirectory(
        prefix="gemma-hub-conformance-", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _export(context: CaseContext, model: Model) -> Weights:
    if not isinstance(model, SupportsExport):
        context.fail("the backend claims 'export' and its model has no export")
    return model.export()


def _save(
    context: CaseContext, path: Path, checkpoint: DesignedCheckpoint, weights: Weights
) -> None:
    try:
        save_checkpoint(path, checkpoint.config, weights)
    except GemmaHubError as error:
        context.fail(f"the export cannot be saved: {error}")


# -- weights that do not fit -----------------------------------------------------------------------


def _missing(context: CaseContext) -> None:
    for checkpoint, name in (
        (GQA, "model.layers.1.mlp.down_proj.weight"),
        (GQA, "model.norm.weight"),
        (_UNTIED, _HEAD),  # where the embedding could stand in for it
    ):
        arrays = _arrays(checkpoint.weights())
        del arrays[name]
        _require_refused(context, checkpoint, arrays, name, "is missing")


def _misshapen(context: CaseContext) -> None:
    arrays = _arrays(GQA.weights())
    layer = "model.layers.1"
    for name, change in (
        # A model can run with the first two, so that only the shape tells.
        ("model.norm.weight", arrays["model.norm.weight"][:1]),
        (_EMBEDDING, np.concatenate([arrays[_EMBEDDING]] * 2)),
        (f"{layer}.self_attn.q_proj.weight", arrays[f"{layer}.self_attn.q_proj.weight"].T),
        (f"{layer}.mlp.gate_proj.weight", arrays[f"{layer}.mlp.gate_proj.weight"][:-1]),
    ):
        changed = np.ascontiguousarray(change)
        _require_refused(
            context, GQA, {**arrays, name: changed}, name, f"has shape {changed.shape}"
        )


def _require_refused(
    context: CaseContext,
    checkpoint: DesignedCheckpoint,
    arrays: Mapping[str, np.ndarray],
    name: str,
    what: str,
) -> None:
    try:
        _build(context, ArrayWeights(arrays), checkpoint)
    except CheckpointError as error:
        context.require(
            name in str(error), f"{name} {what}, and the error does not name it: {error}"
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        context.fail(f"{name} {what}: {type(error).__name__} ({error}); expected a CheckpointError")
    else:
        raise CaseFailed(f"{name} {what}, and a model was built; expected a CheckpointError")


def _surplus(context: CaseContext) -> None:
    arrays = _arrays(GQA.weights())
    attention = "model.layers.0.self_attn"
    surplus = {
        _HEAD: arrays[_EMBEDDING].shape,
        f"{attention}.q_proj.bias": arrays[f"{attention}.q_proj.weight"].shape[:1],
        f"{attention}.q_norm.weight": (GQA.config.head_dim,),
    }
    rng = np.random.default_rng(entropy(_SURPLUS_DRAW))
    for name, shape in surplus.items():
        extra = rng.standard_normal(shape).astype(np.float32)
        try:
            model = _build(context, ArrayWeights({**arrays, name: extra}))
        except CheckpointError:
            continue  # refused, which is as good
        _judge(context, model, GQA, f"with {name}, which the config does not call for, ")


# -- the way into the model ------------------------------------------------------------------------


def _widened(context: CaseContext) -> None:
    model = context.model(MIXED)
    _judge(context, model, MIXED)
    if "export" not in context.subject.features:
        return
    exported, source = _export(context, model), MIXED.weights()
    for name in source.names():
        found, stored = np.asarray(exported.read(name)), source.read(name)
        # Both as float64, which holds all three types: what type it is in memory is not asked.
        _require_bits(context, name, found.astype(np.float64), stored.astype(np.float64))


def _reordered(context: CaseContext) -> None:
    arrays = _arrays(GQA.weights())
    _judge(context, _build(context, ArrayWeights(dict(reversed(arrays.items())))), GQA)


def _source_kept(context: CaseContext) -> None:
    arrays = {name: array.copy() for name, array in _arrays(GQA.weights()).items()}
    model = _build(context, ArrayWeights(arrays))
    _judge(context, model, GQA)
    for name, array in arrays.items():
        _require_bits(context, name, array, GQA.weights().read(name))


def _build(context: CaseContext, weights: Weights, checkpoint: DesignedCheckpoint = GQA) -> Model:
    options = context.subject.options(context.dtype)
    task = TaskSpec(checkpoint.task)
    return context.subject.backend.build(checkpoint.config, task, weights, options)


def _arrays(weights: Weights) -> dict[str, np.ndarray]:
    return {name: weights.read(name) for name in weights.names()}


def _judge(
    context: CaseContext, model: Model, checkpoint: DesignedCheckpoint, what: str = ""
) -> None:
    """Fail unless the model's logits are those of the checkpoint."""
    batch = Batch.of(left_padded(), LENGTH)
    logits = model.forward(prepare(checkpoint, batch)).to_numpy().logits
    truth = context.oracle.truth(checkpoint, batch.rows, context.dtype)
    context.require_shape(f"{what}the logits", logits, (*batch.mask.shape, truth.logits.shape[-1]))
    context.compare(f"{what}logits", logits[batch.mask], truth.logits, truth.witness_logits)


def _require_bits(context: CaseContext, name: str, found: np.ndarray, expected: np.ndarray) -> None:
    context.require(
        found.dtype == expected.dtype,
        f"{name} is {found.dtype}; expected {expected.dtype}",
    )
    context.require(
        found.shape == expected.shape and found.tobytes() == expected.tobytes(),
        f"{name} is not bit-equal to the source",
    )
