"""The designed checkpoints: small Gemmas on which a wrong operation cannot hide.

A freshly initialised tiny model hides most bugs: its norms are all 1, its attention is flat, its
residual branches vanish next to the embedding. Here every value matters: norm weights differ and
stay away from 0, scores are large, no two dimensions are equal, one embedding row is so small that
epsilon counts, every config value differs from the class's default, and every number has a full
float32 mantissa, so that a silent cast shows. See docs/explanation/error-model.md.
"""

import dataclasses
import functools
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import DTYPES, ArrayWeights, Weights, parameter_shapes
from gemma_hub_conformance.seeds import current_seed, entropy

PAD_ID, BOS_ID, EOS_ID, END_OF_TURN_ID = 3, 5, 1, 9
TINY_ROW_ID = 11
"""Its embedding is 1e-4 of the others, so that the norm's epsilon shows."""

SHARD_BYTES = 60_000
"""Largest file of the sharded checkpoint: it has several."""

# Lengths of the inputs go up to 23, so this holds offset 8190 as well, and is no round number.
MAX_POSITION = 8219

_MAIN = GemmaConfig(
    vocab_size=131,
    hidden_size=48,  # sqrt(48) = sqrt(3072) / 8: rounds in bfloat16 exactly as Gemma 7B's
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,  # 3 query heads on each: neither MQA nor MHA
    head_dim=16,  # 6 x 16 is not 48
    max_position_embeddings=MAX_POSITION,
    rms_norm_eps=3e-6,
    rope_theta=50_000.0,
    pad_token_id=PAD_ID,
    bos_token_id=BOS_ID,
    eos_token_id=(EOS_ID, END_OF_TURN_ID),
)


@dataclass(frozen=True, slots=True)
class DesignedCheckpoint:
    """A config with weights made from its name and the seed of the run.

    Attributes:
        name: part of the case ids; seeds the weights.
        purpose: what it is there to catch.
        config: the model.
        weights_of: name whose weights it shares, where only the config differs; else its own.
        storage: "memory", or "shards": written to disk in several files and read back.
        task: what it is built for, a key of `gemma_hub.config.ARCHITECTURES`.
    """

    name: str
    purpose: str
    config: GemmaConfig
    weights_of: str = ""
    storage: str = "memory"
    task: str = "causal_lm"

    def weights(self, dtype: str = "float32") -> Weights:
        """The parameters; rounded to `dtype` where it is not float32."""
        shapes = tuple(parameter_shapes(self.config, self.task).items())
        weights = _weights(self.weights_of or self.name, shapes, dtype, current_seed())
        return _on_disk(self.name, self.config, weights) if self.storage == "shards" else weights


def _variant(**changes: object) -> GemmaConfig:
    return dataclasses.replace(_MAIN, **changes)  # type: ignore[arg-type]


GQA = DesignedCheckpoint(
    "gqa", "the main one: 1 < kv heads < heads, heads * head_dim != hidden", _MAIN
)

CHECKPOINTS = MappingProxyType(
    {
        checkpoint.name: checkpoint
        for checkpoint in (
            GQA,
            DesignedCheckpoint(
                "mqa",
                "one kv head, as Gemma 2B; its embedding scale is exact",
                _variant(
                    hidden_size=64,
                    num_attention_heads=4,
                    num_key_value_heads=1,
                    head_dim=32,
                    num_hidden_layers=2,
                ),
            ),
            DesignedCheckpoint(
                "mha",
                "as many kv heads as heads, as Gemma 7B",
                _variant(
                    hidden_size=96,
                    num_attention_heads=4,
                    num_key_value_heads=4,
                    head_dim=32,
                    num_hidden_layers=2,
                ),
            ),
            DesignedCheckpoint(
                "square",
                "every projection is square: a transposed or exchanged one fits all shapes",
                _variant(
                    hidden_size=64,
                    intermediate_size=64,
                    num_attention_heads=4,
                    num_key_value_heads=4,
                    head_dim=16,
                    num_hidden_layers=2,
                ),
            ),
            DesignedCheckpoint(
                "untied",
                "an lm_head of its own",
                _variant(tie_word_embeddings=False, num_hidden_layers=2),
            ),
            DesignedCheckpoint(
                "bias",
                "biases on the four attention projections",
                _variant(attention_bias=True, num_hidden_layers=2),
            ),
            DesignedCheckpoint(
                "shards", "the main one, read from several files", _MAIN, "gqa", "shards"
            ),
            DesignedCheckpoint(
                "small_limit",
                "fewer positions than rotary features",
                _variant(max_position_embeddings=23, head_dim=32, num_hidden_layers=2),
            ),
            DesignedCheckpoint(
                "linear_rope",
                "positions divided by a factor that is no power of two",
                _variant(rope_scaling={"rope_type": "linear", "factor": 3.5}),
                "gqa",
            ),
        )
    }
)
"""Every designed checkpoint by its name."""

LATER = MappingProxyType(
    {
        "sliding_window": DesignedCheckpoint(
            "sliding_window",
            "every other layer sees the latest five tokens",
            _variant(
                sliding_window=5,
                layer_types=("sliding_attention", "full_attention", "sliding_attention"),
            ),
            "gqa",
        ),
        "softcap": DesignedCheckpoint(
            "softcap",
            "caps on scores and logits, low enough to matter",
            _variant(attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
            "gqa",
        ),
    }
)
"""Checkpoints with a feature that first-generation Gemma does not have, by that feature."""


@functools.lru_cache(maxsize=256)  # of a few seeds, where one process runs many
def _weights(
    name: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], dtype: str, seed: int
) -> ArrayWeights:
    """The arrays; `seed` is the current one, given so that each seed is remembered by itself."""
    arrays = {
        parameter: _tensor(
            np.random.default_rng(entropy(zlib.crc32(name.encode()), index)), parameter, shape
        )
        for index, (parameter, shape) in enumerate(shapes)
    }
    stored = {key: array.astype(DTYPES[dtype]) for key, array in arrays.items()}
    for array in stored.values():
        array.setflags(write=False)  # one backend must not change what the next one is given
    return ArrayWeights(stored)


_FOLDERS: dict[str, tuple[tempfile.TemporaryDirectory[str], Weights]] = {}


def _on_disk(name: str, config: GemmaConfig, weights: Weights) -> Weights:
    """`weights` after a journey through several files; the folder goes when the process ends."""
    key = f"{name} {weights.dtype('model.norm.weight')} {current_seed()}"
    if key not in _FOLDERS:
        folder = tempfile.TemporaryDirectory(prefix="gemma-hub-conformance-")
        path = Path(folder.name) / "checkpoint"
        save_checkpoint(path, config, weights, max_shard_bytes=SHARD_BYTES)
        files = list(path.glob("*.safetensors"))
        if len(files) < 3:
            raise RuntimeError(f"The sharded checkpoint has {len(files)} files; expected more.")
        _FOLDERS[key] = (folder, open_checkpoint(path).weights)
    return _FOLDERS[key][1]


# Standard deviation of each matrix, times 1 / sqrt(fan in): scores reach a spread of 2 to 3,
# gates cover -4 to 4, where the two GELU formulas differ most, and no branch drowns another.
_GAINS = {"q_proj": 1.0, "k_proj": 1.0, "v_proj": 0.8, "o_proj": 1.0,
          "gate_proj": 1.0, "up_proj": 0.7, "down_proj": 0.7, "lm_head": 1.0,
          "score": 1.0}  # fmt: skip


def _tensor(rng: np.random.Generator, parameter: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter as float32."""
    kind = parameter.split(".")[-2]
    if kind.endswith("norm"):
        values = rng.uniform(-0.6, 2.0, shape)
    elif parameter.endswith(".bias"):
        values = rng.normal(0.0, 0.5, shape)
    elif kind == "embed_tokens":
        rows = np.exp(0.35 * rng.standard_normal((shape[0], 1)))
        rows[TINY_ROW_ID] *= 1e-4
        values = rng.standard_normal(shape) * rows / np.sqrt(shape[1])
    else:
        values = rng.standard_normal(shape) * _GAINS[kind] / np.sqrt(shape[1])
    return values.astype(np.float32)
