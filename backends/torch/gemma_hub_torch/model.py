"""Gemma in PyTorch, top to bottom. Twin: gemma_hub_flax/model.py, line for line.

Parameter names and layouts are those of the Hugging Face checkpoint. What each cast is for:
docs/explanation/numerics.md.
Axes: B batch, T tokens, S key slots, D width, N query heads, K key/value heads, H head size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_hub.config import GemmaConfig
from gemma_hub_torch.attention import attend, causal_mask, rope_angles, rotate
from gemma_hub_torch.cache import LayerCache, append, filled
from gemma_hub_torch.linear import Embedding, Linear, linear

Caches = tuple[LayerCache | None, ...]


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight): float32 inside, cast to x's dtype at the very end."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.offset = config.rms_norm_offset
        self.weight = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(torch.mean(y * y, -1, keepdim=True) + self.eps)
        y = y * (self.offset + self.weight.to(torch.float32))
        return y.to(x.dtype)


class Attention(nn.Module):
    """Rotary attention with N query heads that share K key/value heads."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        D, N, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        H, std, bias = config.head_dim, config.initializer_range, config.attention_bias
        self.head_dim = H
        self.scale = config.attention_scale
        self.q_proj = Linear(D, N * H, std=std, bias=bias)
        self.k_proj = Linear(D, K * H, std=std, bias=bias)
        self.v_proj = Linear(D, K * H, std=std, bias=bias)
        self.o_proj = Linear(N * H, D, std=std, bias=bias)

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor, cache: LayerCache | None, start: int
    ) -> tuple[Tensor, LayerCache | None]:
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


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of GELU."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        D, F_, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(D, F_, std=std)
        self.up_proj = Linear(D, F_, std=std)
        self.down_proj = Linear(F_, D, std=std)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.gelu(gate.to(torch.float32), approximate="tanh").to(x.dtype)
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    """One layer. `post_attention_layernorm` is the norm before the MLP: its name is historical."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor, cache: LayerCache | None, start: int
    ) -> tuple[Tensor, LayerCache | None]:
        out, cache = self.self_attn(self.input_layernorm(x), angles, mask, cache, start)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, cache


class GemmaModel(nn.Module):
    """The decoder without a head."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, std=config.initializer_range
        )
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config)

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        valid: Tensor,
        cache: Caches | None = None,
        start: int = 0,
    ) -> tuple[tuple[Tensor, ...], Caches]:
        """Hidden states, num_layers + 1 entries with the final norm's last, and the cache.

        Args:
            inputs: (B, T) ids, or (B, T, D) unscaled embeddings.
            position_ids: (B, T) integers.
            valid: (B, S) bool, the slots that hold real tokens; S = T without a cache.
            cache: one `LayerCache` per layer; None without a cache.
            start: slot of the first token.
        """
        x = self.embed_tokens(inputs) if inputs.ndim == 2 else inputs
        scale = torch.full((), self.config.embedding_scale, dtype=x.dtype, device=x.device)
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


class GemmaForCausalLM(nn.Module):
    """The decoder with the head that scores the next token."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = GemmaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, std=config.initializer_range
            )

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        valid: Tensor,
        cache: Caches | None = None,
        start: int = 0,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, tuple[Tensor, ...], Caches]:
        """Logits (B, T, V) in float32, hidden states and cache; arguments as in `GemmaModel`.

        `logits_to_keep` limits the logits to that many last positions; 0 means all.
        """
        hidden_states, cache = self.model(inputs, position_ids, valid, cache, start)
        x = hidden_states[-1][:, -logits_to_keep:]
        if self.config.tie_word_embeddings:
            logits = linear(x, self.model.embed_tokens.weight)
        else:
            logits = self.lm_head(x)
        return logits.to(torch.float32), hidden_states, cache
