"""Gemma in NumPy, one function for each piece.

Axes: B batch, T tokens, S slots of keys, D width, N query heads, K key/value heads, H head size, V
vocabulary.
"""

import math

import numpy as np

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.inputs import ModelInputs
from gemma_hub.labels import IGNORED
from gemma_hub.parameters import Weights, parameter_shapes

Parameters = dict[str, np.ndarray]
Store = list[tuple[np.ndarray, np.ndarray]]


def load_parameters(config: GemmaConfig, weights: Weights) -> Parameters:
    """Every parameter that the config calls for, read one at a time; matrices are [out, in]."""
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        if tuple(weights.shape(name)) != shape:
            raise CheckpointError(f"{name} is {weights.shape(name)}; the config wants {shape}.")
        parameters[name] = weights.read(name).astype(np.float32)
    return parameters


def linear(parameters: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    """(B, T, in) to (B, T, out), with the bias if there is one."""
    y: np.ndarray = x @ parameters[f"{name}.weight"].T
    bias = parameters.get(f"{name}.bias")
    return y if bias is None else y + bias


def embed(config: GemmaConfig, parameters: Parameters, ids: np.ndarray) -> np.ndarray:
    """(B, T) ids to (B, T, D) scaled embeddings."""
    rows = np.take(parameters["model.embed_tokens.weight"], ids, axis=0)
    return rows * np.float32(config.embedding_scale)


def rms_norm(config: GemmaConfig, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(B, T, D) divided by its root mean square, times (offset + weight)."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    normed: np.ndarray = x / np.sqrt(mean_square + np.float32(config.rms_norm_eps))
    return normed * (np.float32(config.rms_norm_offset) + weight)


def rotate(config: GemmaConfig, layer: int, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(B, T, heads, H) with pairs of features turned by an angle that grows with position."""
    spec, half = config.layers[layer], config.head_dim // 2
    frequencies = spec.rope_theta ** -(np.arange(half, dtype=np.float32) / half)
    scaled = positions.astype(np.float32) / np.float32(spec.rope_factor)
    angles = scaled[:, :, None, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return np.concatenate(turned, axis=-1)


def attend(
    config: GemmaConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """(B, T, N, H) queries of the last of S slots and (B, S, K, H) keys, values to (B, T, N, H)."""
    tokens, slots, sharing = q.shape[1], np.arange(k.shape[1]), q.shape[2] // k.shape[2]
    k, v = np.repeat(k, sharing, axis=2), np.repeat(v, sharing, axis=2)
    seen = valid[:, None, :] & (slots <= slots[-tokens:, None])
    scores = np.einsum("btnh,bsnh->bnts", q, k) * np.float32(config.attention_scale)
    scores = np.where(seen[:, None], scores, np.float32(-1e30))
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs = powers / powers.sum(axis=-1, keepdims=True)
    mixed: np.ndarray = np.einsum("bnts,bsnh->btnh", probs, v)
    return mixed


def attention(
    config: GemmaConfig,
    parameters: Parameters,
    layer: int,
    x: np.ndarray,
    positions: np.ndarray,
    valid: np.ndarray,
    cache: Store | None = None,
    start: int = 0,
) -> np.ndarray:
    """(B, T, D), normed, to what the attention of one layer adds to the residual."""
    at, end = f"model.layers.{layer}.self_attn", start + x.shape[1]
    heads = (*x.shape[:2], -1, config.head_dim)
    q, k, v = (linear(parameters, f"{at}.{which}_proj", x).reshape(heads) for which in "qkv")
    q, k = rotate(config, layer, q, positions), rotate(config, layer, k, positions)
    if cache is not None:
        keys, values = cache[layer]
        keys[:, start:end], values[:, start:end] = k, v
        k, v = keys[:, :end], values[:, :end]
    mixed = attend(config, q, k, v, valid[:, :end])
    return linear(parameters, f"{at}.o_proj", mixed.reshape(*x.shape[:2], -1))


def mlp(parameters: Parameters, layer: int, x: np.ndarray) -> np.ndarray:
    """(B, T, D), normed, to what the feed-forward part of one layer adds to the residual."""
    at = f"model.layers.{layer}.mlp"
    gate = linear(parameters, f"{at}.gate_proj", x)
    up = linear(parameters, f"{at}.up_proj", x)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return linear(parameters, f"{at}.down_proj", 0.5 * gate * (1 + np.tanh(inner)) * up)


def head(config: GemmaConfig, parameters: Parameters, x: np.ndarray) -> np.ndarray:
    """(B, T, D), normed, to (B, T, V) logits."""
    tied = config.tie_word_embeddings
    return linear(parameters, "model.embed_tokens" if tied else "lm_head", x)


def causal_loss(logits: np.ndarray, labels: np.ndarray, num_items: int | None) -> np.float32:
    """Sum of -log p of each label, by the logits before it, divided by their number."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, np.where(counted, labels, 0)[..., None], axis=-1)
    total = np.where(counted, chosen[..., 0], 0).sum()
    return np.float32(-total / (num_items or counted.sum()))


def run(
    config: GemmaConfig,
    parameters: Parameters,
    inputs: ModelInputs,
    valid: np.ndarray | None = None,
    cache: Store | None = None,
    start: int = 0,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(B, T, V) logits of the last `logits_to_keep` tokens, and all hidden states."""
    valid = inputs.attention_mask if valid is None else valid
    x = embed(config, parameters, np.asarray(inputs.input_ids))
    states = [x]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        normed = rms_norm(config, parameters[f"{at}.input_layernorm.weight"], x)
        x = x + attention(
            config, parameters, layer, normed, inputs.position_ids, valid, cache, start
        )
        normed = rms_norm(config, parameters[f"{at}.post_attention_layernorm.weight"], x)
        x = x + mlp(parameters, layer, normed)
        states.append(x)
    states[-1] = rms_norm(config, parameters["model.norm.weight"], x)
    return head(config, parameters, states[-1][:, -inputs.logits_to_keep :]), states
