"""L5.gradients: the gradient of every parameter, each judged as one vector."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from gemma_hub.backend import SupportsGradients
from gemma_hub.labels import IGNORED
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub_conformance import losses
from gemma_hub_conformance.cases.forward import LENGTH, left_padded, padded
from gemma_hub_conformance.cases.heads import NEEDS
from gemma_hub_conformance.cases.losses import (
    DRAWS,
    FORMULAS,
    causal_labels,
    judge_losses,
    sequence_labels,
    token_labels,
)
from gemma_hub_conformance.checkpoints import PAD_ID, DesignedCheckpoint
from gemma_hub_conformance.heads import GRADIENTS, SEQUENCE, TOKEN
from gemma_hub_conformance.oracle import Gradients
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.seeds import entropy
from gemma_hub_conformance.spec import CaseContext, CaseSpec, prepare
from gemma_hub_numpy.model import Reference

DIRECTIONS = 8
STEP = 2e-7  # of the parameters' size: the quotient is good to about nine digits
EMBEDDING = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A loss to take the gradient of.

    Attributes:
        checkpoint: the model.
        draw: makes the rows; where tokens have labels, some of them count for nothing.
        kind: problem type of a sequence classifier.
    """

    checkpoint: DesignedCheckpoint
    draw: Callable[[], tuple[Row, ...]] = left_padded
    kind: str = ""

    @property
    def rows(self) -> tuple[Row, ...]:
        """The tokens, of the run's seed."""
        return self.draw()

    @property
    def batch(self) -> Batch:
        """The rows in one batch."""
        return Batch.of(self.rows, LENGTH)

    def labels(self, seed: int = 1) -> np.ndarray:
        """What the loss compares with."""
        if self.checkpoint.task == "causal_lm":
            return causal_labels(self.batch, seed, ignored=0.2)
        if self.checkpoint.task == "token_classification":
            return token_labels(self.batch, seed, ignored=0.2)
        return sequence_labels(self.kind, seed)

    def loss(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """The loss of (B, T, C) or (B, C) logits in float64."""
        if self.checkpoint.task == "causal_lm":
            return losses.causal(logits, losses.exact, labels, None)
        if self.checkpoint.task == "token_classification":
            return losses.token(logits, losses.exact, labels, None)
        return FORMULAS[self.kind](logits, losses.exact, labels)


def with_pads() -> tuple[Row, ...]:
    """Rows in which the pad id is a real token."""
    rows = []
    for count, left in ((23, 0), (17, 6), (12, 11)):
        ids = list(tokens(count, 150 + count))
        for place in (2, 7, count - 1):
            ids[place] = PAD_ID
        rows.append(row(ids, left))
    return tuple(rows)


GQA = GRADIENTS["gqa"]
CAUSAL = Problem(GQA)
BY_TOKEN = Problem(TOKEN)
BY_ROW = {kind: Problem(SEQUENCE[kind], kind=kind) for kind in SEQUENCE}
CHOICE = BY_ROW["single_label_classification"]


def cases() -> list[CaseSpec]:
    """Every parameter's gradient; along random directions; the padding row; what is refused."""
    causal = {
        **{
            f"causal.{name}": (
                f"Causal loss of `{name}`, left-padded.",
                Problem(GRADIENTS[name]),
            )
            for name in ("gqa", "mqa", "mha", "untied", "bias")
        },
        "causal.right_padding": (
            "Causal loss, right-padded.",
            Problem(GQA, partial(padded, "right_padding")),
        ),
        "causal.pad_id_as_token": (
            "The pad id as a token: its embedding row is not trained by being looked up.",
            Problem(GQA, with_pads),
        ),
        "token": ("Loss of a token classifier, left-padded.", BY_TOKEN),
    }
    by_row = {
        f"sequence.{kind.removesuffix('_classification')}": (
            f"Loss of a sequence classifier: {kind.replace('_', ' ')}.",
            problem,
        )
        for kind, problem in BY_ROW.items()
    }
    judged = {name: (doc, partial(_every_parameter, problem=p))
              for name, (doc, p) in (causal | by_row).items()}  # fmt: skip
    along: dict[str, tuple[str, Callable[[CaseContext], None]]] = {
        f"along_directions.{name}": (
            f"Along random directions it is the difference quotient of the reference's {doc}.",
            partial(_along_directions, problem=problem),
        )
        for name, doc, problem in (
            ("causal", "causal loss", CAUSAL),
            ("sequence", "sequence classifier", CHOICE),
            ("token", "token classifier", BY_TOKEN),
        )
    }
    rest: dict[str, tuple[str, Callable[[CaseContext], None]]] = {
        "loss": ("The loss that comes with the gradients is the loss.", _loss),
        "untied_padding_row": (
            "Without a tied head the pad id's row has the gradient 0.",
            _padding_row,
        ),
        # Right and not bit-equal: a GPU adds the rows of the embedding in any order.
        "repeated_call": (
            "The same call twice gives the right gradients twice.",
            partial(_every_parameter, problem=CAUSAL, calls=2),
        ),
    }
    return [
        CaseSpec(f"L5.gradients.{name}", doc, run, _needs(name))
        for name, (doc, run) in (judged | along | rest).items()
    ]


def _needs(name: str) -> frozenset[str]:
    tasks = [NEEDS[task] for task in ("sequence", "token") if task in name.split(".")]
    return frozenset({"gradients"}).union(*tasks)


def gradients_of(
    context: CaseContext, problem: Problem, labels: np.ndarray, items: int | None = None
) -> tuple[float, Gradients]:
    """The subject's loss and gradients in NumPy; fails unless all are there and fit.

    `items` is num_items_in_batch.
    """
    checkpoint = problem.checkpoint
    model = context.model(checkpoint)
    if not isinstance(model, SupportsGradients):
        context.fail("the backend claims 'gradients' and its model has no loss_and_gradients")
    wanted = {} if items is None else {"num_items_in_batch": items}
    inputs = prepare(checkpoint, problem.batch, labels=labels, **wanted)
    loss, native = model.loss_and_gradients(inputs)
    context.require(type(loss) is float, f"the loss is {type(loss).__name__}; expected float")
    found = {name: model.to_numpy(array) for name, array in native.items()}
    shapes = parameter_shapes(checkpoint.config, checkpoint.task)
    context.require(
        found.keys() == shapes.keys(), f"the names differ: {sorted(found.keys() ^ shapes)[:5]}"
    )
    for name, shape in shapes.items():
        context.require_shape(f"the gradient of {name}", found[name], shape)
        kind = str(native[name].dtype).rpartition(".")[2]
        context.require(kind == "float32", f"the gradient of {name} is {kind}; expected float32")
    return loss, found


def true_gradients(
    context: CaseContext, problem: Problem, labels: np.ndarray, items: int | None = None
) -> tuple[Gradients, ...]:
    """The reference's and then each witness's, every row alone and without padding."""
    if problem.checkpoint.task == "sequence_classification":
        return context.oracle.gradients(problem.checkpoint, problem.rows, list(labels), len(labels))
    # A row without a token has no gradient, and no truth of its own.
    kept = {b: each for b, each in enumerate(problem.rows) if each.ids}
    own = [labels[b, list(each.slots)] for b, each in kept.items()]
    first = 1 if problem.checkpoint.task == "causal_lm" else 0
    counted = sum(int(np.count_nonzero(each[first:] != IGNORED)) for each in own)
    divisor = counted if items is None else items
    return context.oracle.gradients(problem.checkpoint, list(kept.values()), own, divisor)


def _every_parameter(context: CaseContext, problem: Problem, calls: int = 1) -> None:
    judge_gradients(context, problem, problem.labels(), calls=calls)


def judge_gradients(
    context: CaseContext,
    problem: Problem,
    labels: np.ndarray,
    items: int | None = None,
    calls: int = 1,
) -> None:
    """Fail unless every parameter's gradient is right, in each of so many calls."""
    results = [gradients_of(context, problem, labels, items)[1] for _ in range(calls)]
    truth, *witnesses = true_gradients(context, problem, labels, items)
    for call, found in enumerate(results):
        wrong = []
        for name, value in found.items():
            judgement = context.judged(
                value.reshape(1, -1),
                truth[name].reshape(1, -1),
                tuple(each[name].reshape(1, -1) for each in witnesses),
            )
            if not judgement.passed:
                wrong.append(f"{name}: {judgement.reason}")
        context.require(
            not wrong,
            f"{len(wrong)} of {len(found)} gradients are wrong{' in the second call' * call}: "
            f"{'; '.join(wrong[:3])}",
        )


def _along_directions(context: CaseContext, problem: Problem) -> None:
    labels = problem.labels()
    _, found = gradients_of(context, problem, labels)
    directions = [_direction(problem.checkpoint, seed) for seed in range(DIRECTIONS)]
    truth = [_slope(problem, labels, direction) for direction in directions]
    along = [
        np.array([[_product(each, direction) for direction in directions]])
        for each in (found, *true_gradients(context, problem, labels)[1:])
    ]
    context.compare("slopes", along[0], np.array([truth]), tuple(along[1:]))


def _direction(checkpoint: DesignedCheckpoint, seed: int) -> Gradients:
    """Random numbers for every parameter, each as large as that parameter."""
    rng = np.random.default_rng(entropy(seed, 8))
    weights = checkpoint.weights()
    return {
        name: rng.standard_normal(weights.shape(name)) * np.sqrt(np.mean(weights.read(name) ** 2))
        for name in weights.names()
    }


def _product(one: Gradients, other: Gradients) -> float:
    return float(sum(np.vdot(value.astype(np.float64), other[name]) for name, value in one.items()))


def _slope(problem: Problem, labels: np.ndarray, direction: Gradients) -> float:
    """d loss / d step along `direction`, from four losses of the reference around the weights."""
    loss = partial(_moved_loss, problem, labels, direction)
    near, far = loss(STEP) - loss(-STEP), loss(2 * STEP) - loss(-2 * STEP)
    return (8 * near - far) / (12 * STEP)


def _moved_loss(problem: Problem, labels: np.ndarray, direction: Gradients, step: float) -> float:
    checkpoint = problem.checkpoint
    weights = checkpoint.weights()
    moved = {
        name: weights.read(name).astype(np.float64) + step * direction[name]
        for name in weights.names()
    }
    reference = Reference(checkpoint.config, ArrayWeights(moved), checkpoint.task)
    return problem.loss(reference.run(prepare(checkpoint, problem.batch)).logits, labels)


def _loss(context: CaseContext) -> None:
    draws = [CAUSAL.labels(seed) for seed in range(DRAWS)]
    found = [gradients_of(context, CAUSAL, labels)[0] for labels in draws]
    formulas = [partial(losses.causal, labels=labels, num_items=None) for labels in draws]
    judge_losses(context, found, GQA, CAUSAL.batch, formulas)


def _padding_row(context: CaseContext) -> None:
    problem = Problem(GRADIENTS["untied"], with_pads)
    labels = problem.labels()
    rows = gradients_of(context, problem, labels)[1][EMBEDDING]
    true = true_gradients(context, problem, labels)[0][EMBEDDING]
    context.require(not rows[PAD_ID].any(), "the pad id's embedding row has a gradient")
    # A token that no counted label comes after has none in truth either.
    still = [i for i in range(len(rows)) if true[i].any() and not rows[i].any()]
    context.require(not still, f"the embedding rows of the tokens {still[:5]} have no gradient")
