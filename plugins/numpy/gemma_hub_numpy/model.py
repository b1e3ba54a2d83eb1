"""Gemma in NumPy float64, one method per operation, and the rounding that a precision allows.

`Reference` is what every backend is measured against: it computes in float64, states the
mathematics once, and is slow. Each operation is a method of its own, so that a subclass that
overrides one of them is "Gemma with one thing changed". `Witness` is such a subclass: it overrides
the rounding and the order of sums, and nothing of the mathematics.

Axis letters: B batch, T query tokens, S key slots, D width, N query heads, K key/value heads,
H head size, F feed-forward width, V vocabulary.
"""

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import DTYPES, Weights

Array = np.ndarray
LayerCache = tuple[Array, Array]

_MASKED = -1e30  # finite, so that a row with nothing to see becomes an average and not NaN
_KEEP_BYTES = 10**9  # parameters stay in float64 between calls if all of them fit in this
_VOCABULARY_BLOCK = 32_768  # rows of the head at a time: a large vocabulary in float64 is gigabytes


class Reference:
    """Gemma in float64.

    Every array is float64, also in subclasses that round: they round to values that a narrower
    type can hold. Arrays are (B, T, ...) with heads before head size: (B, T, N, H).

    Attributes:
        config: the model's configuration.
        weights: its parameters, read when they are needed.
        dtype: name of the compute type that this model stands for.
    """

    dtype = "float64"

    def __init__(self, config: GemmaConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self._small = config.num_parameters * 8 <= _KEEP_BYTES
        self._kept: dict[str, Array] = {}

    # -- parameters and rounding: what Witness overrides ---------------------------------------

    def to_compute(self, x: Array) -> Array:
        """A parameter or an input in the compute type, rounded to nearest."""
        return np.asarray(x).astype(np.float64)

    def parameter(self, name: str) -> Array:
        """One whole parameter in the compute type."""
        if name in self._kept:
            return self._kept[name]
        value = self.to_compute(self.weights.read(name))
        if self._small:
            self._kept[name] = value
        return value

    def rows(self, name: str, index: Array | slice) -> Array:
        """Rows of one parameter; of a large model without converting the other rows."""
        if self._small:
            return self.parameter(name)[index]
        return self.to_compute(self.weights.read(name)[index])

    def contract(self, subscripts: str, a: Array, b: Array) -> Array:
        """`numpy.einsum(subscripts, a, b)`: the only way in which anything is summed."""
        return np.asarray(np.einsum(subscripts, a, b, optimize=True))

    def store(self, x: Array) -> Array:
        """`x` rounded to the compute type."""
        return x

    def single(self, x: Array) -> Array:
        """`x` rounded to float32, where the rules ask for float32 whatever the compute type."""
        return x

    # -- embedding -----------------------------------------------------------------------------

    def embedding_scale(self) -> float:
        """Factor on embeddings, rounded to the compute type."""
        return self.config.embedding_scale

    def embed(self, ids: Array) -> Array:
        """(B, T) ids to (B, T, D) unscaled embeddings."""
        return self.rows("model.embed_tokens.weight", ids)

    def scale_embeddings(self, x: Array) -> Array:
        """Unscaled embeddings, looked up or given by the caller, to the first layer's input."""
        return self.store(x * self.embedding_scale())

    # -- norm ----------------------------------------------------------------------------------

    def rms_norm(self, x: Array, weight: Array) -> Array:
        """(B, T, D) divided by its root mean square, times (offset + weight)."""
        mean_square = self.single(self.contract("btd,btd->bt", x, x) / self.config.hidden_size)
        root = self.single(np.sqrt(self.single(mean_square + self.config.rms_norm_eps)))
        normed = self.single(x / root[..., None])
        return self.store(self.single(normed * self.norm_factor(weight)))

    def norm_factor(self, weight: Array) -> Array:
        """What a norm with this weight multiplies by."""
        return self.single(self.config.rms_norm_offset + weight)

    # -- rotary positions ----------------------------------------------------------------------

    def frequencies(self, layer: int) -> Array:
        """(H/2,) radians per position."""
        half = self.config.head_dim // 2
        exponents = self.single(np.arange(half) / half)
        return self.single(self.config.layers[layer].rope_theta ** -exponents)

    def angles(self, positions: Array, layer: int) -> Array:
        """(B, T) positions to (B, T, H/2) radians."""
        scaled = self.single(positions / self.config.layers[layer].rope_factor)
        return self.single(scaled[..., None] * self.frequencies(layer))

    def rotate(self, x: Array, angles: Array) -> Array:
        """(B, T, heads, H) with entries j and j + H/2 of every head turned as one pair."""
        first, second = np.split(x, 2, axis=-1)
        cos = self.single(np.cos(angles))[:, :, None, :]
        sin = self.single(np.sin(angles))[:, :, None, :]
        turned_first = self.single(self.single(first * cos) - self.single(second * sin))
        turned_second = self.single(self.single(second * cos) + self.single(first * sin))
        return self.store(np.concatenate([turned_first, turned_second], axis=-1))

    def apply_positions(
        self, q: Array, k: Array, v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values with their positions in them; values have none."""
        return self.rotate(q, angles), self.rotate(k, angles), v

    # -- attention -----------------------------------------------------------------------------

    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        """(B, T, S) bool: which slots each query sees.

        A query sees the valid slots up to its own, and with a window only the latest of them.

        Args:
            valid: (B, S) bool, true at real tokens.
            start: slot of the first query.
            T: number of queries.
            layer: index of the layer.
        """
        slots = np.arange(valid.shape[1])
        queries = np.arange(start, start + T)
        seen = valid[:, None, :] & (slots <= queries[:, None])
        window = self.config.layers[layer].window
        if window is not None:
            # Counts real tokens and not slots, so that padding between them changes nothing.
            count = np.cumsum(valid, axis=1)
            seen &= count[:, queries, None] - count[:, None, :] < window
        return seen

    def kv_heads(self) -> Array:
        """(N,) index of the key/value head that each query head uses."""
        N, K = self.config.num_attention_heads, self.config.num_key_value_heads
        return np.arange(N) // (N // K)

    def attention_scale(self) -> float:
        """Factor on q·k."""
        return self.config.attention_scale

    def scores(self, q: Array, k: Array) -> Array:
        """(B, T, N, H) queries and (B, S, K, H) keys to (B, N, T, S) scaled and capped scores."""
        products = self.contract("btnh,bsnh->bnts", q, k[:, :, self.kv_heads()])
        scores = self.single(products * self.attention_scale())
        return self.soft_cap(scores, self.config.attn_logit_softcapping)

    def soft_cap(self, x: Array, cap: float | None) -> Array:
        """`x` bent smoothly into (-cap, cap); `x` itself if `cap` is None."""
        if cap is None:
            return x
        return self.single(cap * self.single(np.tanh(self.single(x / cap))))

    def softmax(self, scores: Array, visible: Array) -> Array:
        """(B, N, T, S) scores and (B, T, S) bool to probabilities; uniform if none is visible."""
        scores = np.where(visible[:, None], scores, _MASKED)
        shifted = self.single(scores - scores.max(axis=-1, keepdims=True))
        powers = self.single(np.exp(shifted))
        total = self.single(self.contract("bnts,s->bnt", powers, np.ones(powers.shape[-1])))
        return self.store(self.single(powers / total[..., None]))

    def mix(self, probs: Array, v: Array) -> Array:
        """(B, N, T, S) probabilities and (B, S, K, H) values to (B, T, N, H)."""
        return self.store(self.contract("bnts,bsnh->btnh", probs, v[:, :, self.kv_heads()]))

    def linear(self, x: Array, name: str) -> Array:
        """(B, T, in) times the [out, in] matrix `name`.weight, plus `name`.bias if there is one."""
        y = self.contract("bti,oi->bto", x, self.parameter(f"{name}.weight"))
        if self.config.attention_bias and ".self_attn." in name:
            y = self.single(y + self.parameter(f"{name}.bias"))
        return self.store(y)

    def project(self, i: int, x: Array) -> tuple[Array, Array, Array]:
        """Queries (B, T, N, H), keys and values (B, T, K, H) of layer `i`, without positions."""
        at = f"model.layers.{i}.self_attn"
        shape = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (self.linear(x, f"{at}.{which}_proj").reshape(shape) for which in "qkv")
        return q, k, v

    def remember(
        self, i: int, k: Array, v: Array, start: int, cache: list[LayerCache]
    ) -> LayerCache:
        """Write (B, T, K, H) to slots `start` onwards of layer `i`; the slots filled so far."""
        keys, values = cache[i]
        end = start + k.shape[1]
        keys[:, start:end] = k
        values[:, start:end] = v
        return keys[:, :end], values[:, :end]

    def attention(
        self,
        i: int,
        x: Array,
        positions: Array,
        valid: Array,
        start: int,
        cache: list[LayerCache] | None,
    ) -> Array:
        """(B, T, D), normed, to what the attention of layer `i` adds to the residual."""
        q, k, v = self.project(i, x)
        q, k, v = self.apply_positions(q, k, v, self.angles(positions, i))
        if cache is not None:
            k, v = self.remember(i, k, v, start, cache)
        visible = self.visible(valid, start, x.shape[1], i)
        probs = self.softmax(self.scores(q, k), visible)
        mixed = self.mix(probs, v)
        return self.linear(mixed.reshape(*x.shape[:2], -1), f"model.layers.{i}.self_attn.o_proj")

    # -- feed-forward --------------------------------------------------------------------------

    def activation(self, x: Array) -> Array:
        """GELU in its tanh form."""
        inner = self.single(math.sqrt(2 / math.pi) * self.single(x + 0.044715 * x * x * x))
        return self.store(self.single(0.5 * x * self.single(1 + self.single(np.tanh(inner)))))

    def mlp(self, i: int, x: Array) -> Array:
        """(B, T, D), normed, to what the feed-forward part of layer `i` adds to the residual."""
        at = f"model.layers.{i}.mlp"
        gate = self.activation(self.linear(x, f"{at}.gate_proj"))
        up = self.linear(x, f"{at}.up_proj")
        return self.linear(self.store(gate * up), f"{at}.down_proj")

    # -- the whole model -----------------------------------------------------------------------

    def block(
        self,
        i: int,
        x: Array,
        positions: Array,
        valid: Array,
        start: int,
        cache: list[LayerCache] | None,
    ) -> Array:
        """Layer `i`: (B, T, D) to (B, T, D)."""
        at = f"model.layers.{i}"
        normed = self.rms_norm(x, self.parameter(f"{at}.input_layernorm.weight"))
        x = self.store(x + self.attention(i, normed, positions, valid, start, cache))
        normed = self.rms_norm(x, self.parameter(f"{at}.post_attention_layernorm.weight"))
        return self.store(x + self.mlp(i, normed))

    def final_norm(self, x: Array) -> Array:
        """The norm between the last layer and the head."""
        return self.rms_norm(x, self.parameter("model.norm.weight"))

    def head(self, x: Array) -> Array:
        """(B, T, D), normed, to (B, T, V) logits."""
        blocks = [self.store(self.contract("btd,vd->btv", x, rows)) for rows in self.head_rows()]
        return self.soft_cap(np.concatenate(blocks, axis=-1), self.config.final_logit_softcapping)

    def head_rows(self) -> Iterator[Array]:
        """The (V, D) matrix of the head, a block of rows at a time."""
        tied = self.config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        for first in range(0, self.config.vocab_size, _VOCABULARY_BLOCK):
            yield self.rows(name, slice(first, first + _VOCABULARY_BLOCK))

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
        """Logits and, if `inputs` asks for them, hidden states.

        Args:
            inputs: the tokens of this call.
            valid: (B, slots) bool, true at slots with real tokens, those of this call included;
                the mask of `inputs` if None.
            start: slot of the first token of this call.
            cache: keys and values of earlier calls, from `new_cache`; written to.
        """
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
        states[-1] = self.final_norm(x)
        logits = self.head(states[-1][:, -inputs.logits_to_keep :])
        return ModelOutputs(logits, tuple(states) if inputs.output_hidden_states else None)


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
    """

    def __init__(self, config: GemmaConfig, weights: Weights, dtype: str, seed: int) -> None:
        super().__init__(config, weights)
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


def round_randomly(x: Array, dtype: str, random: np.random.Generator) -> Array:
    """`x`, float64, rounded to one of the two neighbours that `dtype` can hold, still in float64.

    The nearer neighbour is the likelier one, in proportion, so that the error has mean zero. A
    value that `dtype` can hold is left as it is; one past its range becomes infinite.
    """
    kind = ml_dtypes.finfo(DTYPES[dtype])  # type: ignore[no-untyped-call]
    largest = float(kind.max)
    _, exponent = np.frexp(x)  # x = m * 2**exponent with 0.5 <= |m| < 1
    step = np.ldexp(1.0, np.maximum(exponent - 1, kind.minexp) - kind.nmant)
    rounded = np.floor(x / step + random.random(np.shape(x))) * step
    rounded = np.clip(rounded, -largest, largest)
    return np.asarray(np.where(np.abs(x) > largest, np.copysign(np.inf, x), rounded))
