"""L2.laws: what must not change when a model or a batch is written in another way.

A model has many ways to be written down: its heads, features, units and tokens may stand in any
order if everything that meets them is in the same order. Each case here rewrites the weights or the
batch and compares with the truth of the original, so what it shows does not hang on the reference
alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import ArrayWeights, Weights
from gemma_hub_conformance.cases.forward import LENGTH, left_padded, padded
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

Arrays = Mapping[str, np.ndarray]
Change = Callable[[Arrays, GemmaConfig], Arrays]

HUGE = 2.0**20
"""A power of two past the range of float16: a factor of it is exact in float32 and bfloat16."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rewritten(DesignedCheckpoint):
    """A designed checkpoint with the same function and other weights.

    Attributes:
        change: makes the weights from those of the original.
    """

    change: Change = lambda arrays, _: arrays

    def weights(self, dtype: str = "float32") -> Weights:
        """The parameters after the change."""
        original = DesignedCheckpoint.weights(self, dtype)
        arrays = {name: original.read(name) for name in original.names()}
        return ArrayWeights(dict(self.change(arrays, self.config)))


def cases() -> list[CaseSpec]:
    """Weights in another order or of another size, and rows, padding and positions moved."""
    rewritten: dict[str, tuple[str, DesignedCheckpoint, Change]] = {
        "heads_permuted": (
            "Heads in another order, with their biases and columns of o_proj",
            CHECKPOINTS["bias"],
            permuted_heads,
        ),
        "units_permuted": ("Units of the MLP in another order", GQA, permuted_units),
        "features_permuted": (
            "Features of the residual stream in another order",
            CHECKPOINTS["untied"],
            permuted_features,
        ),
        "values_permuted": ("Features of the values in another order", GQA, permuted_values),
        "up_scaled": ("up_proj times 2^20 and down_proj divided by it", GQA, scaled_up),
        "values_scaled": ("v_proj divided by 2^20 and o_proj times it", GQA, scaled_values),
    }
    weights = [
        CaseSpec(
            f"L2.laws.{name}",
            f"{doc}: nothing changes.",
            partial(_rewritten, name=name, original=original, change=change),
        )
        for name, (doc, original, change) in rewritten.items()
    ]
    inputs = {
        "tokens_renamed": ("Embedding rows in another order, ids to match.", _tokens_renamed),
        "rows_permuted": ("Rows of a batch in another order.", _rows_permuted),
        "rows_alone": ("Each row of a batch alone.", _rows_alone),
        "rows_repeated": ("One row several times in a batch.", _rows_repeated),
        "padding_split": ("Padding moved to the other side and into a row.", _padding_split),
        "positions_shifted": ("All positions of a row shifted by one number.", _positions_shifted),
    }
    return [*weights, *(CaseSpec(f"L2.laws.{n}", doc, run) for n, (doc, run) in inputs.items())]


def _rewritten(
    context: CaseContext, name: str, original: DesignedCheckpoint, change: Change
) -> None:
    checkpoint = Rewritten(
        f"{original.name}+{name}",
        f"`{original.name}` written in another way: {name}",
        original.config,
        original.name,
        change=change,
    )
    batch = Batch.of(left_padded(), LENGTH)
    context.judge_logits(context.forward(checkpoint, batch).logits, original, batch)


# -- weights -------------------------------------------------------------------------------------


def permuted_heads(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """Key/value heads backwards, each with its query heads, and those turned by one."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    kv_heads = np.arange(K)[::-1]
    heads = np.concatenate([np.roll(np.arange(N).reshape(K, -1)[kv], 1) for kv in kv_heads])
    order = {"q_proj": _spread(heads, H), "k_proj": _spread(kv_heads, H)}
    order["v_proj"] = order["k_proj"]
    return {
        name: array[:, order["q_proj"]]
        if name.endswith("o_proj.weight")
        else array[order.get(name.split(".")[-2], slice(None))]
        for name, array in arrays.items()
    }


def permuted_units(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """Units of the MLP in an order without pattern."""
    order = _order(config.intermediate_size)
    rows = ("gate_proj.weight", "up_proj.weight")
    return {
        name: array[:, order]
        if name.endswith("down_proj.weight")
        else array[order]
        if name.endswith(rows)
        else array
        for name, array in arrays.items()
    }


def permuted_features(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """The residual stream in an order without pattern, for all that read and write it."""
    order = _order(config.hidden_size)
    writers = ("o_proj.weight", "down_proj.weight")
    return {
        name: array[order] if name.endswith(writers) or array.ndim == 1 else array[:, order]
        for name, array in arrays.items()
    }


def permuted_values(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """The features of every value head in an order without pattern; o_proj reads them so."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    order = _order(H)
    values, mixed = (_spread(np.arange(n), H).reshape(n, H)[:, order].ravel() for n in (K, N))
    return {
        name: array[values]
        if name.endswith("v_proj.weight")
        else array[:, mixed]
        if name.endswith("o_proj.weight")
        else array
        for name, array in arrays.items()
    }


def scaled_up(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """The MLP's products are huge, and its result is the same."""
    return _scaled(arrays, {"up_proj.weight": HUGE, "down_proj.weight": 1 / HUGE})


def scaled_values(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """The values are tiny, and the attention's result is the same."""
    return _scaled(arrays, {"v_proj.weight": 1 / HUGE, "o_proj.weight": HUGE})


def _scaled(arrays: Arrays, factors: Mapping[str, float]) -> Arrays:
    return {
        name: array * array.dtype.type(factors.get(".".join(name.split(".")[-2:]), 1.0))
        for name, array in arrays.items()
    }


def _spread(heads: np.ndarray, size: int) -> np.ndarray:
    """Indices of the rows of the heads, `size` rows each."""
    return (heads[:, None] * size + np.arange(size)).ravel()


def _order(count: int) -> np.ndarray:
    return np.random.default_rng(count).permutation(count)


# -- inputs --------------------------------------------------------------------------------------


def _tokens_renamed(context: CaseContext) -> None:
    order = _order(GQA.config.vocab_size)  # new id i is what was order[i]
    checkpoint = Rewritten(
        "gqa+tokens_renamed",
        "`gqa` with its embedding rows in another order",
        GQA.config,
        GQA.name,
        change=lambda arrays, _: {
            name: array[order] if "embed_tokens" in name else array
            for name, array in arrays.items()
        },
    )
    batch = Batch.of(left_padded(), LENGTH)
    new_ids = np.argsort(order)
    renamed = dataclasses.replace(batch, input_ids=new_ids[batch.input_ids])
    logits = context.forward(checkpoint, renamed).logits
    context.judge_logits(logits[..., new_ids], GQA, batch)


def _rows_permuted(context: CaseContext) -> None:
    rows = left_padded()
    for order in ((2, 0, 1), (1, 0, 2)):
        batch = Batch.of([rows[i] for i in order], LENGTH)
        context.judge_logits(context.forward(GQA, batch).logits, GQA, batch)


def _rows_alone(context: CaseContext) -> None:
    for each in padded("both_sides"):
        batch = Batch.of([each], LENGTH)
        context.judge_logits(context.forward(GQA, batch).logits, GQA, batch)


def _rows_repeated(context: CaseContext) -> None:
    one, other = left_padded()[1:]
    batch = Batch.of([one, other, one], LENGTH)
    context.judge_logits(context.forward(GQA, batch).logits, GQA, batch)


def _padding_split(context: CaseContext) -> None:
    ids = tokens(LENGTH - 9, 4)
    splits = ((9, 0, 0), (0, 9, 0), (0, 0, 9), (4, 0, 5), (3, 3, 3), (1, 7, 1))
    rows = [_with_padding(ids, *split) for split in splits]
    for part in (rows[:3], rows[3:]):
        batch = Batch.of(part, LENGTH)
        context.judge_logits(context.forward(GQA, batch).logits, GQA, batch)


def _with_padding(ids: tuple[int, ...], left: int, inside: int, right: int) -> Row:
    """`ids` with so many slots of padding before, in the middle and after."""
    middle = left + len(ids) // 2
    slots = (*range(left, middle), *range(middle + inside, left + len(ids) + inside))
    assert slots[-1] + right == LENGTH - 1
    return Row(ids, slots)


def _positions_shifted(context: CaseContext) -> None:
    ids = [each.ids for each in padded("no_padding")]
    shifts = (31, 512, 3000)
    plain = [row(each) for each in ids]
    moved = [
        row(each, 0, range(shift, shift + len(each)))
        for each, shift in zip(ids, shifts, strict=True)
    ]
    batch = Batch.of(moved, LENGTH)
    logits = context.forward(GQA, batch).logits
    truth = context.oracle.truth(GQA, plain, context.dtype)
    noise = context.oracle.truth(GQA, moved, context.dtype).witness_logits
    context.require_shape("the logits", logits, (*batch.mask.shape, GQA.config.vocab_size))
    context.compare("logits", logits[batch.mask], truth.logits, noise)
