"""Products and sums in less precision than was asked for.

Those of float32 do it only where the sizes suit tensor cores, as libraries do, so that a small
model of odd sizes hides them. Those of a narrower type are a whole implementation in that type:
beside an exact one a bug of the size of its noise would stand out.
"""

import numpy as np

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import DTYPES, Weights
from gemma_hub_conformance.mutants.bank import Bank, StandInBackend, StandInModel, to_bfloat16
from gemma_hub_numpy.backend import NumpyBackend
from gemma_hub_numpy.model import Array, LayerCache, Reference, Witness

bank = Bank()
ALIGNED = "L2.precision.aligned"
CANCELLING = "L2.precision.cancelling"
LONG_SUMS = "L3.bfloat16.precision.long_sums"
FAR = "L3.bfloat16.precision.far_positions"
UNIT = 64
"""What sizes are a multiple of where a tensor core takes the product."""

LINEAR, SCORES, VALUES, HEAD = (
    "bti,oi->bto",
    "btnh,bsnh->bnts",
    "bnts,bsnh->btnh",
    "btd,vd->btv",
)


def to_tf32(x: Array) -> Array:
    """`x` rounded to tf32, which has the range of float32 and 10 bits after the first, and back."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.int64)
    half = 0xFFF + ((bits >> 13) & 1)  # ties to even
    rounded = ((bits + half) & ~0x1FFF).astype(np.uint32)
    return rounded.view(np.float32).astype(np.float64)


def two_bfloat16(x: Array) -> tuple[Array, Array]:
    """`x` as the sum of two numbers of bfloat16: its first 8 bits and the next 8."""
    high = to_bfloat16(x)
    return high, to_bfloat16(x - high)


def sum_in(kind: np.dtype, subscripts: str, a: Array, b: Array) -> Array:
    """`numpy.einsum` over one axis, one term after the other, each partial sum in `kind`."""
    operands, result = subscripts.split("->")
    left, right = operands.split(",")
    (letter,) = set(left) & set(right) - set(result)
    rest = subscripts.replace(letter, "")
    first, second = left.index(letter), right.index(letter)
    total = np.zeros((), np.float32)
    for k in range(a.shape[first]):
        term = np.einsum(rest, a.take(k, first), b.take(k, second))
        total = (total + term).astype(kind).astype(np.float32)
    return np.asarray(total, np.float64)


# -- float32, where the sizes suit tensor cores ----------------------------------------------------


class _OnTensorCores(Reference):
    """Takes some products in another way, in a model and a batch whose sizes suit it."""

    where: tuple[str, ...] = (LINEAR, SCORES, VALUES, HEAD)
    _suits = False

    def forward(
        self, inputs: ModelInputs, valid: Array | None, start: int, cache: list[LayerCache] | None
    ) -> ModelOutputs:
        self._suits = self.config.hidden_size % UNIT == inputs.shape[1] % UNIT == 0
        return super().forward(inputs, valid, start, cache)

    def contract(self, subscripts: str, a: Array, b: Array) -> Array:
        if self._suits and subscripts in self.where:
            return self.product(subscripts, a, b)
        return super().contract(subscripts, a, b)

    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        return super().contract(subscripts, to_tf32(a), to_tf32(b))


@bank.mutant(ALIGNED, "Products of float32 are not in tf32, whatever the sizes.")
class TfThirtyTwoEverywhere(_OnTensorCores):
    pass


@bank.mutant(ALIGNED, "Projections in float32 are not in tf32.")
class TfThirtyTwoProjections(_OnTensorCores):
    where = (LINEAR,)


@bank.mutant(ALIGNED, "Scores in float32 are not products in tf32.")
class TfThirtyTwoScores(_OnTensorCores):
    where = (SCORES,)


@bank.mutant(ALIGNED, "Probabilities times values are not in tf32.")
class TfThirtyTwoValues(_OnTensorCores):
    where = (VALUES,)


@bank.mutant(ALIGNED, "The head of a float32 model is not in tf32.")
class TfThirtyTwoHead(_OnTensorCores):
    where = (HEAD,)


class _InBfloat16(_OnTensorCores):
    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        return Reference.contract(self, subscripts, to_bfloat16(a), to_bfloat16(b))


@bank.mutant(ALIGNED, "Scores in float32 are not products in bfloat16.")
class BfSixteenScores(_InBfloat16):
    where = (SCORES,)


@bank.mutant(ALIGNED, "The head of a float32 model is not in bfloat16.")
class BfSixteenHead(_InBfloat16):
    where = (HEAD,)


class _ThreeProducts(_OnTensorCores):
    """float32 out of bfloat16: both parts of each number, but for the product of the small ones."""

    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        (a_high, a_low), (b_high, b_low) = two_bfloat16(a), two_bfloat16(b)
        pairs = ((a_high, b_high), (a_high, b_low), (a_low, b_high))
        return np.asarray(sum(Reference.contract(self, subscripts, x, y) for x, y in pairs))


@bank.mutant(ALIGNED, "Three products of bfloat16 are 16 bits; float32 has 24 and takes six.")
class SplitInTwo(_ThreeProducts):
    pass


@bank.mutant(ALIGNED, "A product of split numbers needs the low part of both.")
class SplitLacksATerm(_OnTensorCores):
    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        b_high, b_low = two_bfloat16(b)
        first = Reference.contract(self, subscripts, to_bfloat16(a), b_high)
        return np.asarray(first + Reference.contract(self, subscripts, to_bfloat16(a), b_low))


@bank.mutant(ALIGNED, "Products of float32 are not added in float16.")
class SumsInFloatSixteen(_OnTensorCores):
    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        return sum_in(np.dtype(np.float16), subscripts, a, b)


# -- float32, in the MLP ---------------------------------------------------------------------------


class _RoundedMlp(Reference):
    """Rounds the inputs of some of the MLP's products to tf32."""

    where: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    def linear(self, x: Array, name: str) -> Array:
        if name.endswith(self.where):
            return self.product(x, self.parameter(f"{name}.weight"))
        return super().linear(x, name)

    def product(self, x: Array, weight: Array) -> Array:
        return self.contract(LINEAR, to_tf32(x), to_tf32(weight))


@bank.mutant(CANCELLING, "The MLP of a float32 model is not in tf32.")
class TfThirtyTwoMlp(_RoundedMlp):
    pass


@bank.mutant(CANCELLING, "gate_proj in float32 is not a product in tf32.")
class TfThirtyTwoGate(_RoundedMlp):
    where = ("gate_proj",)


@bank.mutant(CANCELLING, "up_proj in float32 is not a product in tf32.")
class TfThirtyTwoUp(_RoundedMlp):
    where = ("up_proj",)


@bank.mutant(CANCELLING, "down_proj in float32 is not a product in tf32.")
class TfThirtyTwoDown(_RoundedMlp):
    where = ("down_proj",)


@bank.mutant(CANCELLING, "The MLP of a float32 model is not in bfloat16.")
class BfSixteenMlp(_RoundedMlp):
    def product(self, x: Array, weight: Array) -> Array:
        return self.contract(LINEAR, to_bfloat16(x), to_bfloat16(weight))


@bank.mutant(CANCELLING, "Three products of bfloat16 are 16 bits, in the MLP too.")
class SplitInTwoMlp(_RoundedMlp):
    def product(self, x: Array, weight: Array) -> Array:
        (x_high, x_low), (high, low) = two_bfloat16(x), two_bfloat16(weight)
        pairs = ((x_high, high), (x_high, low), (x_low, high))
        return np.asarray(sum(self.contract(LINEAR, a, b) for a, b in pairs))


@bank.mutant(CANCELLING, "The sums of the MLP are not in float16.")
class MlpSumsInFloatSixteen(_RoundedMlp):
    where = ("down_proj",)

    def product(self, x: Array, weight: Array) -> Array:
        return sum_in(np.dtype(np.float16), LINEAR, x, weight)


# -- narrower types --------------------------------------------------------------------------------


class _SumsInOwnType(Witness):
    """Takes the sums of some products in the type of their terms."""

    where: tuple[str, ...] = ()

    def contract(self, subscripts: str, a: Array, b: Array) -> Array:
        if subscripts in self.where:
            return sum_in(DTYPES[self.dtype], subscripts, a, b)
        return super().contract(subscripts, a, b)


class _Norm(_SumsInOwnType):
    where = ("btd,btd->bt",)


class _Linear(_SumsInOwnType):
    where = (LINEAR,)


class _Angles(Witness):
    def angles(self, positions: Array, layer: int) -> Array:
        return self.to_compute(super().angles(positions, layer))


class _Frequencies(Witness):
    def frequencies(self, layer: int) -> Array:
        return self.to_compute(super().frequencies(layer))


class _Positions(Witness):
    def angles(self, positions: Array, layer: int) -> Array:
        return super().angles(self.to_compute(positions), layer)


class _Narrow(StandInBackend):
    """A whole implementation in the type that is asked for, with one thing in it too narrow."""

    witness: type[Witness] = Witness

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        NumpyBackend().build(config, task, weights, options)
        return StandInModel(self.witness(config, weights, options.dtype, 0, task.name))


@bank.mutant(LONG_SUMS, "A norm adds its squares in float32, in a model of bfloat16 too.")
class NormSumsInOwnType(_Narrow):
    witness = _Norm


@bank.mutant(
    "L3.float16.precision.long_sums", "A projection adds in float32, in a model of float16 too."
)
class LinearSumsInOwnType(_Narrow):
    witness = _Linear


@bank.mutant(FAR, "The angles of a bfloat16 model are float32.")
class AnglesInOwnType(_Narrow):
    witness = _Angles


@bank.mutant(FAR, "The frequencies of a bfloat16 model are float32.")
class FrequenciesInOwnType(_Narrow):
    witness = _Frequencies


@bank.mutant(FAR, "The positions of a bfloat16 model are not in bfloat16.")
class PositionsInOwnType(_Narrow):
    witness = _Positions
