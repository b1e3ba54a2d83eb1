"""L2.precision, L3: products are taken, and sums are added, in the precision that was asked for.

Accelerators, and the libraries above them, like to round the inputs of a float32 matrix product to
tf32 (11 significant bits) or bfloat16 (8) and say nothing. They do so where the sizes suit their
units, so one model here has such sizes, and one has sums in which the leading bits cancel, so that
what is rounded away is the result. In a narrower type it is the sum that must not be in that type,
and a short sum hides it: a third model has long ones. Positions far from 0 show a table of cosines
whose angles were computed in the narrower type.
"""

import dataclasses

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub_conformance.cases.forward import LENGTH
from gemma_hub_conformance.cases.laws import Arrays, Rewritten
from gemma_hub_conformance.cases.liveness import ONE_LAYER
from gemma_hub_conformance.checkpoints import GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

ALIGNED = DesignedCheckpoint(
    "aligned",
    "every size is a multiple of 64, as tensor cores like it",
    dataclasses.replace(
        GQA.config,
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    ),
)
ALIGNED_LENGTH = 64
CANCELLED = 2.0**5
"""How much larger the terms of the sums are than the sums."""


def cancelling(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """Half of the MLP's units stand against the other half.

    Unit j and unit j + F/2 are one and the same, and down_proj adds c + e times the one and -c
    times the other, c much larger than e: with all 24 bits that is e times the unit, and with 11
    most of e is gone.
    """
    half = config.intermediate_size // 2
    return {name: _cancelling(name, array, half) for name, array in arrays.items()}


def _cancelling(name: str, array: np.ndarray, half: int) -> np.ndarray:
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return np.concatenate([array[:half], array[:half]])
    if name.endswith("down_proj.weight"):
        small, large = array[:, :half], array[:, half:] * array.dtype.type(CANCELLED)
        return np.concatenate([large + small, -large], axis=1)
    return array


CANCELLING = Rewritten(
    "cancelling",
    "sums of the MLP whose terms are 32 times larger than they are",
    ONE_LAYER.config,
    "gqa",
    change=cancelling,
)


def one_sided(arrays: Arrays, config: GemmaConfig) -> Arrays:
    """Long sums whose terms have one sign, so that the sum outgrows its terms.

    up_proj is gate_proj, and gelu(x) * x is never negative; a row of down_proj has one sign.
    """
    return {name: _one_sided(name, array, arrays) for name, array in arrays.items()}


def _one_sided(name: str, array: np.ndarray, arrays: Arrays) -> np.ndarray:
    if name.endswith("up_proj.weight"):
        return arrays[name.replace("up_proj", "gate_proj")]
    if name.endswith("down_proj.weight"):
        return np.asarray(np.abs(array) * np.sign(array[:, :1]) * array.dtype.type(2.0**-4))
    return array


# A sum of ones in bfloat16 ends at 256, because 257 is none of its numbers.
LONG_SUMS = Rewritten(
    "long_sums",
    "a norm and an MLP that add a thousand terms of one sign",
    dataclasses.replace(
        GQA.config,
        hidden_size=1024,
        intermediate_size=1536,
        num_hidden_layers=1,
        # Else a token's own logit is so large that its last rounding is all that one sees of it.
        tie_word_embeddings=False,
    ),
    change=one_sided,
)


def cases() -> list[CaseSpec]:
    """Sizes that suit tensor cores, sums that cancel, long sums, and positions far from 0."""
    long_sums = [
        CaseSpec(
            f"L3.{dtype}.precision.long_sums",
            f"Norms and MLP add a thousand terms of one sign in {dtype}.",
            _long_sums,
            dtype=dtype,
        )
        for dtype in ("bfloat16", "float16")
    ]
    return [
        CaseSpec(
            "L2.precision.aligned",
            "Logits where every size is a multiple of 64.",
            _aligned,
        ),
        CaseSpec(
            "L2.precision.cancelling",
            "Logits where the leading bits of a sum cancel.",
            _cancelling_sums,
        ),
        *long_sums,
        CaseSpec(
            "L3.bfloat16.precision.far_positions",
            "Positions far from 0, and far from one another, in bfloat16.",
            _far_positions,
            dtype="bfloat16",
        ),
    ]


def _aligned(context: CaseContext) -> None:
    vocabulary = ALIGNED.config.vocab_size
    rows = [
        row(tokens(ALIGNED_LENGTH, 210, vocabulary)),
        row(tokens(ALIGNED_LENGTH - 5, 211, vocabulary), 5),
    ]
    batch = Batch.of(rows, ALIGNED_LENGTH)
    context.judge_logits(context.forward(ALIGNED, batch).logits, ALIGNED, batch)


def _cancelling_sums(context: CaseContext) -> None:
    batch = Batch.of([row(tokens(23, 212)), row(tokens(17, 213), 6), row(tokens(20, 214))], LENGTH)
    context.judge_logits(context.forward(CANCELLING, batch).logits, CANCELLING, batch)


def _long_sums(context: CaseContext) -> None:
    batch = Batch.of([row(tokens(23, 215)), row(tokens(17, 216), 6)], LENGTH)
    context.judge_logits(context.forward(LONG_SUMS, batch).logits, LONG_SUMS, batch)


def _far_positions(context: CaseContext) -> None:
    rows = []
    for left, (first, second) in ((0, (0, 4001)), (9, (251, 2047)), (3, (2047, 8001))):
        before, after = 9, LENGTH - left - 9
        positions = (*range(first, first + before), *range(second, second + after))
        rows.append(row(tokens(before + after, 216 + left), left, positions))
    batch = Batch.of(rows, LENGTH)
    context.judge_logits(context.forward(GQA, batch).logits, GQA, batch)
