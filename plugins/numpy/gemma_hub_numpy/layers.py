"""The operations of Gemma, one method each, and the layer that they make.

Axis letters: B batch, T query tokens, S key slots, D width, N query heads, K key/value heads,
H head size, F feed-forward width, V vocabulary, C labels.
"""

import math

import numpy as np

from gemma_hub_numpy.arithmetic import Arithmetic, Array

LayerCache = tuple[Array, Array]

_MASKED = -1e30  # finite, so that a row with nothing to see becomes an average and not NaN


class Layers(Arithmetic):
    """From ids to the final norm. Arrays are (B, T, ...), heads before head size: (B, T, N, H)."""

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
        if f"{name}.bias" in self.shapes:
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
        at = f"model.layers.{i}.self_attn"
        q, k, v = self.project(i, self.keep(f"{at}.x", x))
        self.keep(f"{at}.q_proj", q)
        self.keep(f"{at}.k_proj", k)
        angles = self.keep(f"{at}.angles", self.angles(positions, i))
        q, k, v = self.apply_positions(q, k, v, angles)
        if cache is not None:
            k, v = self.remember(i, k, v, start, cache)
        q, k, v = self.keep(f"{at}.q", q), self.keep(f"{at}.k", k), self.keep(f"{at}.v", v)
        visible = self.keep(f"{at}.visible", self.visible(valid, start, x.shape[1], i))
        scores = self.keep(f"{at}.scores", self.scores(q, k))
        probs = self.keep(f"{at}.probs", self.softmax(scores, visible))
        mixed = self.keep(f"{at}.mixed", self.mix(probs, v).reshape(*x.shape[:2], -1))
        return self.keep(f"{at}.o_proj", self.linear(mixed, f"{at}.o_proj"))

    # -- feed-forward --------------------------------------------------------------------------

    def activation(self, x: Array) -> Array:
        """GELU in its tanh form."""
        inner = self.single(math.sqrt(2 / math.pi) * self.single(x + 0.044715 * x * x * x))
        return self.store(self.single(0.5 * x * self.single(1 + self.single(np.tanh(inner)))))

    def mlp(self, i: int, x: Array) -> Array:
        """(B, T, D), normed, to what the feed-forward part of layer `i` adds to the residual."""
        at = f"model.layers.{i}.mlp"
        gate = self.keep(f"{at}.gate", self.linear(self.keep(f"{at}.x", x), f"{at}.gate_proj"))
        active = self.keep(f"{at}.active", self.activation(gate))
        up = self.keep(f"{at}.up", self.linear(x, f"{at}.up_proj"))
        product = self.keep(f"{at}.product", self.store(active * up))
        return self.keep(f"{at}.down_proj", self.linear(product, f"{at}.down_proj"))

    # -- one layer -----------------------------------------------------------------------------

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
        self.keep(f"{at}.x", x)
        normed = self.rms_norm(x, self.parameter(f"{at}.input_layernorm.weight"))
        x = self.store(x + self.attention(i, normed, positions, valid, start, cache))
        self.keep(f"{at}.middle", x)
        normed = self.rms_norm(x, self.parameter(f"{at}.post_attention_layernorm.weight"))
        return self.store(x + self.mlp(i, normed))

    def final_norm(self, x: Array) -> Array:
        """The norm between the last layer and the head."""
        return self.rms_norm(self.keep("model.norm.x", x), self.parameter("model.norm.weight"))
