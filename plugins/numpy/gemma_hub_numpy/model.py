"""Gemma in NumPy float64, one method per operation, and the rounding that a precision allows.

`Reference` is what every backend is measured against: it computes in float64, states the
mathematics once, and is slow. Each operation is a method of its own (in `layers`, `heads`, `losses`
and `gradients`), so that a subclass that overrides one of them is "Gemma with one thing changed".
`Witness` is such a subclass: it overrides the rounding and the order of sums, and nothing of the
mathematics.
"""

from dataclasses import replace
from functools import cache

import ml_dtypes
import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import InputError
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import DTYPES, Weights
from gemma_hub_numpy.arithmetic import Array
from gemma_hub_numpy.gradients import Backward, Gradients
from gemma_hub_numpy.layers import LayerCache

__all__ = ["Array", "Gradients", "LayerCache", "Reference", "Witness", "round_randomly"]

_EXPONENT = np.int64(0x7FF0000000000000)
"""The bits of a float64 that are its exponent."""


class Reference(Backward):
    """Gemma in float64: `Reference(config, weights, task="causal_lm")`.

    Attributes:
        config: the model's configuration.
        weights: its parameters, read when they are needed.
        task: a key of `gemma_hub.config.ARCHITECTURES`.
        dtype: name of the compute type that this model stands for.
    """

    def new_cache(self, batch_size: int, max_length: int) -> list[LayerCache]:
        """Zeros for the keys and the values of every layer."""
        shape = (batch_size, max_length, self.config.num_key_value_heads, self.config.head_dim)
        layers = range(self.config.num_hidden_layers)
        return [(np.zeros(shape), np.zeros(shape)) for _ in layers]

    def run(
        self,
        inputs: ModelInputs,
        valid: Array | None = None,
        start: int = 0,
        cache: list[LayerCache] | None = None,
    ) -> ModelOutputs:
        """The task's result, and what else `inputs` ask for.

        Args:
            inputs: the tokens of this call, prepared for this task.
            valid: (B, slots) bool, true at slots with real tokens, those of this call included;
                the mask of `inputs` if None.
            start: slot of the first token of this call.
            cache: keys and values of earlier calls, from `new_cache`; written to.
        """
        if not inputs.output_attentions:
            return self.forward(inputs, valid, start, cache)
        with self.taping() as tape:
            outputs = self.forward(inputs, valid, start, cache)
        layers = range(self.config.num_hidden_layers)
        attentions = tuple(tape[f"model.layers.{i}.self_attn.probs"] for i in layers)
        return replace(outputs, attentions=attentions)

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        """The loss of `inputs.labels`, and {name: gradient} for every parameter.

        Raises:
            InputError: `inputs` have no labels.
        """
        if inputs.labels is None:
            raise InputError("The inputs have no labels; gradients are those of a loss.")
        with self.taping() as tape:
            outputs = self.run(inputs)
        return float(outputs.loss), self.gradients(inputs, tape)

    def forward(
        self,
        inputs: ModelInputs,
        valid: Array | None,
        start: int,
        cache: list[LayerCache] | None,
    ) -> ModelOutputs:
        """`run` without attentions."""
        T = inputs.shape[1]
        valid = inputs.attention_mask if valid is None else valid[:, : start + T]
        if inputs.input_ids is None:
            x = self.to_compute(np.asarray(inputs.inputs_embeds))
        else:
            x = self.embed(inputs.input_ids)
        x = self.scale_embeddings(x)
        states = [x]
        for i in range(self.config.num_hidden_layers):
            x = self.block(i, x, inputs.position_ids, valid, start, cache)
            states.append(x)
        x = states[-1] = self.keep("model.norm.y", self.final_norm(x))
        logits = self.logits(x, inputs)
        if logits is not None:
            logits = self.keep("logits", logits)
        return ModelOutputs(
            logits=logits,
            hidden_states=tuple(states) if inputs.output_hidden_states else None,
            loss=None if inputs.labels is None or logits is None else self.loss(logits, inputs),
            last_hidden_state=x if self.task == "base" else None,
        )


class Witness(Reference):
    """One legal implementation of Gemma in a narrower type, drawn at random by `seed`.

    The rules say what is rounded where; they leave open in which order a sum is taken and which
    way each result is rounded. A witness draws both at random. The spread of many witnesses is how
    far two correct implementations may be apart.

    The same seed gives the same numbers: every `run` starts its random stream afresh.

    Args:
        config: the model's configuration.
        weights: its parameters, in any type; they are rounded to `dtype` to nearest.
        dtype: "float32", "bfloat16" or "float16".
        seed: which implementation, an integer from 0 up.
        task: a key of `gemma_hub.config.ARCHITECTURES`.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: Weights,
        dtype: str,
        seed: int,
        task: str = "causal_lm",
    ) -> None:
        super().__init__(config, weights, task)
        self.dtype = dtype
        self.seed = seed
        self._random = np.random.default_rng(seed)

    def to_compute(self, x: Array) -> Array:
        return np.asarray(x).astype(DTYPES[self.dtype]).astype(np.float64)

    def embedding_scale(self) -> float:
        return float(self.to_compute(np.asarray(self.config.embedding_scale)))

    def contract(self, subscripts: str, a: Array, b: Array) -> Array:
        """The sum in float32, its terms in random order."""
        operands, result = subscripts.split("->")
        left, right = operands.split(",")
        a, b = a.astype(np.float32), b.astype(np.float32)
        for letter in sorted(set(left) & set(right) - set(result)):
            order = self._random.permutation(a.shape[left.index(letter)])
            a = a.take(order, left.index(letter))
            b = b.take(order, right.index(letter))
        return np.asarray(np.einsum(subscripts, a, b, optimize=True)).astype(np.float64)

    def store(self, x: Array) -> Array:
        return round_randomly(x, self.dtype, self._random)

    def single(self, x: Array) -> Array:
        return round_randomly(x, "float32", self._random)

    def run(
        self,
        inputs: ModelInputs,
        valid: Array | None = None,
        start: int = 0,
        cache: list[LayerCache] | None = None,
    ) -> ModelOutputs:
        self._random = np.random.default_rng((self.seed, start))
        # Past the range of float16 comes infinity and then NaN, in silence as in any framework.
        with np.errstate(over="ignore", invalid="ignore"):
            return super().run(inputs, valid, start, cache)

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        with np.errstate(over="ignore", invalid="ignore"):
            return super().loss_and_gradients(inputs)


def round_randomly(x: Array, dtype: str, random: np.random.Generator) -> Array:
    """`x`, float64, rounded to one of the two neighbours that `dtype` can hold, still in float64.

    The nearer neighbour is the likelier one, in proportion, so that the error has mean zero. A
    value that `dtype` can hold is left as it is; one past its range becomes infinite.
    """
    least, unit, largest = _grid(dtype)
    x = np.asarray(x, np.float64)
    # The exponent's bits alone are the power of two below |x|. frexp and ldexp say the same slowly:
    # witnesses spend most of their time here.
    power = (x.view(np.int64) & _EXPONENT).view(np.float64)
    step = np.minimum(np.maximum(power, least), largest) * unit  # infinity's too is finite
    rounded = np.floor(x / step + random.random(x.shape)) * step
    if x.size and not np.abs(rounded).max() <= largest:  # so that NaN goes here too
        rounded = np.clip(rounded, -largest, largest)
        rounded = np.where(np.abs(x) > largest, np.copysign(np.inf, x), rounded)
    return np.asarray(rounded)


@cache
def _grid(dtype: str) -> tuple[float, float, float]:
    """The smallest normal number of `dtype`, the step after 1, and the largest number."""
    kind = ml_dtypes.finfo(DTYPES[dtype])  # type: ignore[no-untyped-call]
    return 2.0**kind.minexp, 2.0**-kind.nmant, float(kind.max)
