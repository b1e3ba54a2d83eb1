"""Gemma in PyTorch, top to bottom. Twin: gemma_hub_flax/model.py, line for line.

Parameter names and layouts are those of the Hugging Face checkpoint. What each cast is for:
docs/explanation/numerics.md. What the arguments of a call mean: calls.py.
Axes: B batch, T tokens, S key slots, D width, N query heads, K key/value heads, H head size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_hub.config import GemmaConfig
from gemma_hub_torch.attention import MASKED, Mask, Rope, attend, causal_mask, rope, rotate
from gemma_hub_torch.cache import KeyValueCache, LayerCache, append, filled
from gemma_hub_torch.calls import (
    finished_cache,
    last_real_tokens,
    prepare_call,
    sequence_labels,
    token_labels,
)
from gemma_hub_torch.dropout import dropout
from gemma_hub_torch.fast_attention import fused_mask
from gemma_hub_torch.fast_native import has_native, is_for_one_pass, native_gated_, native_norm
from gemma_hub_torch.linear import Embedding, Linear
from gemma_hub_torch.losses import causal_loss, cross_entropy, sequence_loss
from gemma_hub_torch.outputs import BaseModelOutput, HeadOutput
from gemma_hub_torch.pretrained import Pretrained
from gemma_hub_torch.remat import remat


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight): float32 inside, cast to x's dtype at the very end.

    Attributes:
        native: compute as fast_native.py does where that is for it.
    """

    native = False

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.offset = config.rms_norm_offset
        self.weight = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        if self.native and is_for_one_pass(x, self.weight):
            return native_norm(x, self.weight, self.eps, self.offset)
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
        self.dropout = config.attention_dropout
        self.q_proj = Linear(D, N * H, std=std, bias=bias)
        self.k_proj = Linear(D, K * H, std=std, bias=bias)
        self.v_proj = Linear(D, K * H, std=std, bias=bias)
        self.o_proj = Linear(N * H, D, std=std, bias=bias)

    def forward(
        self, x: Tensor, turns: Rope, mask: Mask, cache: LayerCache | None, start: int
    ) -> tuple[Tensor, Tensor, LayerCache]:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.head_dim)
        k = self.k_proj(x).reshape(B, T, -1, self.head_dim)
        v = self.v_proj(x).reshape(B, T, -1, self.head_dim)
        q = rotate(q, turns)
        k = rotate(k, turns)
        cache = append(cache, k, v, start)
        k, v = filled(cache.keys, mask.shape[2]), filled(cache.values, mask.shape[2])
        rate = self.dropout if self.training else 0.0
        out, probs = attend(q, k, v, mask, self.scale, rate)
        return self.o_proj(out.reshape(B, T, -1)), probs, cache


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of GELU.

    Attributes:
        native: as in `RMSNorm`.
    """

    native = False

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        D, F_, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(D, F_, std=std)
        self.up_proj = Linear(D, F_, std=std)
        self.down_proj = Linear(F_, D, std=std)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.native and is_for_one_pass(gate, up):
            return self.down_proj(native_gated_(gate, up))
        gate = F.gelu(gate, approximate="tanh")  # in float32 inside, for 16-bit types too
        return self.down_proj(gate * up)


class Block(nn.Module):
    """One layer. `post_attention_layernorm` is the norm before the MLP: its name is historical."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(
        self, x: Tensor, turns: Rope, mask: Mask, cache: LayerCache | None, start: int
    ) -> tuple[Tensor, Tensor, LayerCache]:
        out, probs, cache = self.self_attn(self.input_layernorm(x), turns, mask, cache, start)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, probs, cache


class GemmaModel(Pretrained, nn.Module):
    """The decoder without a head.

    Attributes:
        gradient_checkpointing: compute each layer's activations again in the backward pass
            instead of keeping them.
        native: compute as fast_native.py does where that is for it.
    """

    task = "base"
    native = False

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            std=config.initializer_range,
            padding_id=config.pad_token_id,
        )
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """Hidden states of a batch.

        Args:
            input_ids: (B, T) ids.
            attention_mask: (B, T), or (B, length of the cache + T); 0 at padding.
            position_ids: (B, T); None counts each row's real tokens.
            past_key_values: what an earlier call or `init_cache` returned; used up by this call.
            inputs_embeds: (B, T, D) unscaled embeddings instead of `input_ids`.
            use_cache: return `past_key_values`.
            output_attentions: return each layer's attention weights.
            output_hidden_states: return each layer's output.

        Raises:
            InputError: a wrong shape, type or id, or both or neither of the two inputs.
            CapacityError: more tokens than the cache or the model has room for.
        """
        call = prepare_call(
            self.config, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        )
        x = call.inputs
        if inputs_embeds is None:
            x = self.embed_tokens(x)
        x = x.to(self.embed_tokens.weight.dtype)
        x = x * torch.full((), self.config.embedding_scale, dtype=x.dtype, device=x.device)
        turns = rope(call.position_ids, self.config)
        visible = causal_mask(call.visible, call.start, x.shape[1])
        native = self.native and has_native(x.dtype)
        mask: Mask = visible if output_attentions else fused_mask(visible, MASKED, native)
        hidden_states, attentions, caches = [x], [], []
        for layer, cache in zip(self.layers, call.layers, strict=True):
            run = remat(layer) if self.gradient_checkpointing else layer
            x, probs, cache = run(x, turns, mask, cache, call.start)
            hidden_states.append(x)
            attentions.append(probs)
            caches.append(cache)
        hidden_states[-1] = self.norm(x)
        return BaseModelOutput(
            last_hidden_state=hidden_states[-1],
            past_key_values=finished_cache(call, caches) if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class GemmaForCausalLM(Pretrained, nn.Module):
    """The decoder with the head that scores the next token."""

    task = "causal_lm"

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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        num_items_in_batch: int | None = None,
    ) -> HeadOutput:
        """Logits (B, T, V) of each next token.

        Arguments are those of `GemmaModel`, and:

        Args:
            labels: (B, T) ids, not shifted; -100 does not count.
            logits_to_keep: compute logits of this many last positions only; 0 for all.
            num_items_in_batch: divide the loss by it instead of by the labels that count.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        x = out.last_hidden_state[:, -logits_to_keep:]
        if self.config.tie_word_embeddings:
            logits = self.model.embed_tokens.scores(x)
        else:
            logits = self.lm_head(x)
        logits = logits.to(torch.float32)
        loss = None
        if labels is not None:
            labels = token_labels(labels, tuple(logits.shape[:2]), self.config.vocab_size)
            loss = causal_loss(logits, labels, num_items_in_batch)
        return HeadOutput(loss, logits, *out[1:])


class GemmaForSequenceClassification(Pretrained, nn.Module):
    """The decoder with a head that scores labels of each row, from its last real token."""

    task = "sequence_classification"

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = GemmaModel(config)
        self.score = Linear(config.hidden_size, config.num_labels, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        pooled_positions: Tensor | None = None,
    ) -> HeadOutput:
        """Logits (B, num_labels).

        Arguments are those of `GemmaModel`, and:

        Args:
            labels: (B,) integers, or numbers of the logits' shape, as the problem type asks for
                (`gemma_hub.problem`).
            pooled_positions: (B,) index of the token that stands for its row; None for the last
                real one.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        x = out.last_hidden_state
        B, T, _ = x.shape
        if pooled_positions is None:
            pooled_positions = last_real_tokens(self.config, input_ids, attention_mask, B, T)
        logits = self.score(x[torch.arange(B, device=x.device), pooled_positions]).to(torch.float32)
        loss = None
        if labels is not None:
            kind, labels = sequence_labels(self.config, labels, B)
            loss = sequence_loss(kind, logits, labels)
        return HeadOutput(loss, logits, *out[1:])


class GemmaForTokenClassification(Pretrained, nn.Module):
    """The decoder with a head that scores labels of each token."""

    task = "token_classification"

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = GemmaModel(config)
        self.dropout = config.classifier_dropout
        self.score = Linear(
            config.hidden_size, config.num_labels, std=config.initializer_range, bias=True
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        num_items_in_batch: int | None = None,
    ) -> HeadOutput:
        """Logits (B, T, num_labels).

        Arguments are those of `GemmaModel`, and:

        Args:
            labels: (B, T) integers; -100 does not count.
            num_items_in_batch: divide the loss by it instead of by the labels that count.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        rate = self.dropout if self.training else 0.0
        logits = self.score(dropout(out.last_hidden_state, rate)).to(torch.float32)
        loss = None
        if labels is not None:
            labels = token_labels(labels, tuple(logits.shape[:2]), self.config.num_labels)
            loss = cross_entropy(logits, labels, num_items_in_batch)
        return HeadOutput(loss, logits, *out[1:])
