"""Gemma in Flax NNX, top to bottom. Twin: gemma_hub_torch/model.py, line for line.

Parameter names and layouts are those of the Hugging Face checkpoint. What each cast is for:
docs/explanation/numerics.md.
Axes: B batch, T tokens, S key slots, D width, N query heads, K key/value heads, H head size.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gemma_hub.config import GemmaConfig
from gemma_hub_flax.attention import attend, causal_mask, rope_angles, rotate
from gemma_hub_flax.cache import LayerCache, append, filled
from gemma_hub_flax.linear import Embedding, Linear, linear

Caches = tuple[LayerCache | None, ...]


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight): float32 inside, cast to x's dtype at the very end."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs) -> None:
        self.eps = config.rms_norm_eps
        self.offset = config.rms_norm_offset
        self.weight = nnx.Param(jnp.zeros(config.hidden_size))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        y = y * (self.offset + self.weight.astype(jnp.float32))
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Rotary attention with N query heads that share K key/value heads."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs) -> None:
        D, N, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        H, std, bias = config.head_dim, config.initializer_range, config.attention_bias
        self.head_dim = H
        self.scale = config.attention_scale
        self.q_proj = Linear(D, N * H, rngs, std=std, bias=bias)
        self.k_proj = Linear(D, K * H, rngs, std=std, bias=bias)
        self.v_proj = Linear(D, K * H, rngs, std=std, bias=bias)
        self.o_proj = Linear(N * H, D, rngs, std=std, bias=bias)

    def __call__(
        self, x: Array, angles: Array, mask: Array, cache: LayerCache | None, start: Array | int
    ) -> tuple[Array, LayerCache | None]:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)
        q = rotate(q, angles)
        k = rotate(k, angles)
        if cache is not None:
            cache = append(cache, k, v, start)
            k, v = filled(cache, mask.shape[2])
        out = attend(q, k, v, mask, self.scale)
        return self.o_proj(out.reshape(B, T, -1)), cache


class MLP(nnx.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of GELU."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs) -> None:
        D, F_, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(D, F_, rngs, std=std)
        self.up_proj = Linear(D, F_, rngs, std=std)
        self.down_proj = Linear(F_, D, rngs, std=std)

    def __call__(self, x: Array) -> Array:
        gate = self.gate_proj(x)
        gate = jax.nn.gelu(gate.astype(jnp.float32), approximate=True).astype(x.dtype)
        return self.down_proj(gate * self.up_proj(x))


class Block(nnx.Module):
    """One layer. `post_attention_layernorm` is the norm before the MLP: its name is historical."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs) -> None:
        self.self_attn = Attention(config, rngs)
        self.mlp = MLP(config, rngs)
        self.input_layernorm = RMSNorm(config, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs)

    def __call__(
        self, x: Array, angles: Array, mask: Array, cache: LayerCache | None, start: Array | int
    ) -> tuple[Array, LayerCache | None]:
        out, cache = self.self_attn(self.input_layernorm(x), angles, mask, cache, start)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, cache


class FlaxGemmaModel(nnx.Module):
    """The decoder without a head."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, rngs, std=config.initializer_range
        )
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config, rngs)

    def __call__(
        self,
        inputs: Array,
        position_ids: Array,
        valid: Array,
        cache: Caches | None = None,
        start: Array | int = 0,
    ) -> tuple[tuple[Array, ...], Caches]:
        """Hidden states, num_layers + 1 entries with the final norm's last, and the cache.

        Args:
            inputs: (B, T) ids, or (B, T, D) unscaled embeddings.
            position_ids: (B, T) integers.
            valid: (B, S) bool, the slots that hold real tokens; S = T without a cache.
            cache: one `LayerCache` per layer; None without a cache.
            start: slot of the first token.
        """
        x = self.embed_tokens(inputs) if inputs.ndim == 2 else inputs
        scale = jnp.full((), self.config.embedding_scale, dtype=x.dtype)
        x = x * scale
        angles = rope_angles(position_ids, self.config)
        mask = causal_mask(valid, start, x.shape[1])
        hidden_states = [x]
        new_cache = []
        for layer, old in zip(self.layers, cache or (None,) * len(self.layers), strict=True):
            x, new = layer(x, angles, mask, old, start)
            hidden_states.append(x)
            new_cache.append(new)
        hidden_states[-1] = self.norm(x)
        return tuple(hidden_states), tuple(new_cache)


class FlaxGemmaForCausalLM(nnx.Module):
    """The decoder with the head that scores the next token."""

    def __init__(self, config: GemmaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = FlaxGemmaModel(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, rngs, std=config.initializer_range
            )

    def __call__(
        self,
        inputs: Array,
        position_ids: Array,
        valid: Array,
        cache: Caches | None = None,
        start: Array | int = 0,
        logits_to_keep: int = 0,
    ) -> tuple[Array, tuple[Array, ...], Caches]:
        """Logits (B, T, V) in float32, hidden states and cache; arguments as in `FlaxGemmaModel`.

        `logits_to_keep` limits the logits to that many last positions; 0 means all.
        """
        hidden_states, cache = self.model(inputs, position_ids, valid, cache, start)
        x = hidden_states[-1][:, -logits_to_keep:]
        if self.config.tie_word_embeddings:
            logits = linear(x, self.model.embed_tokens.weight[...])
        else:
            logits = self.lm_head(x)
        return logits.astype(jnp.float32), hidden_states, cache
