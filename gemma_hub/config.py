"""GemmaConfig: what a Gemma model is, with every legacy spelling resolved once.

Field names are those of `config.json`. Backends read the resolved values and decide nothing.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

from gemma_hub.errors import CheckpointNotFoundError, ConfigError, first_ten, nearest

TANH_GELU = "gelu_pytorch_tanh"
# Every released Gemma 1 means the tanh form, also those whose config.json says "gelu";
# "gelu_new" and "gelu_fast" are two more names that Transformers has for the same formula.
_TANH_GELU_NAMES = frozenset({TANH_GELU, "gelu", "gelu_new", "gelu_fast"})
_ROPE_TYPES = ("default", "linear")
_DTYPES = ("bfloat16", "float16", "float32", "float64")
ATTENTION_TYPES = ("full_attention", "sliding_attention")

# Keys that Transformers writes and that do not change what the model computes at inference.
_BOOKKEEPING = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures auto_map cache_implementation
    chunk_size_feed_forward classifier_dropout finetuning_task gradient_checkpointing hidden_dropout
    hidden_dropout_prob id2label is_decoder label2id license model_type num_labels output_attentions
    output_hidden_states problem_type return_dict task_specific_params tokenizer_class
    transformers_version use_cache use_return_dict max_length min_length do_sample temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size num_beams num_beam_groups
    num_return_sequences diversity_penalty encoder_no_repeat_ngram_size early_stopping
    token_classification_bias unsloth_version unsloth_fixed
    """.split()
)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer's attention does.

    Attributes:
        window: number of latest tokens a query sees, itself included; None for all of them.
        rope_theta: base of the rotary frequencies.
        rope_factor: positions are divided by it (linear RoPE scaling); 1.0 for none.
    """

    window: int | None
    rope_theta: float
    rope_factor: float


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """A Gemma model's hyper-parameters, checked on construction.

    The defaults are those of Transformers' GemmaConfig (the 7b model). Fields that first-generation
    Gemma does not have (windows, caps, q/k norm) are here for later generations: a config that uses
    one names it in `required_features`, and a backend that lacks it refuses the config.
    """

    vocab_size: int = 256_000
    hidden_size: int = 3072
    intermediate_size: int = 24_576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256  # independent of hidden_size / num_attention_heads
    hidden_activation: str = TANH_GELU
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2
    dtype: str | None = None  # the checkpoint's own statement; None where it makes none
    rms_norm_offset: float = 1.0  # the norm multiplies by (offset + weight)
    query_pre_attn_scalar: float | None = (
        None  # attention scale is its -0.5 power; head_dim if None
    )
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in _TUPLES:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _check_types(self)
        _check_values(self)
        object.__setattr__(self, "hidden_activation", TANH_GELU)
        if _rope_type(self.rope_scaling) == "default":
            object.__setattr__(self, "rope_scaling", None)

    # -- resolved values that backends read ----------------------------------------------------

    @property
    def attention_scale(self) -> float:
        """Factor on q·k."""
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def embedding_scale(self) -> float:
        """Factor on token embeddings; a backend rounds it to its compute dtype before use."""
        return math.sqrt(self.hidden_size)

    @property
    def rope_factor(self) -> float:
        """Positions are divided by this (linear RoPE scaling); 1.0 for none."""
        return float(self.rope_scaling["factor"]) if self.rope_scaling else 1.0

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One `LayerSpec` per layer, first to last."""
        types = self.layer_types or ("full_attention",) * self.num_hidden_layers
        return tuple(
            LayerSpec(
                window=self.sliding_window if kind == "sliding_attention" else None,
                rope_theta=self.rope_theta,
                rope_factor=self.rope_factor,
            )
            for kind in types
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple, whatever form `eos_token_id` has."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def required_features(self) -> tuple[str, ...]:
        """Features of `gemma_hub.backend.FEATURES` that a backend must have for this config."""
        wanted = {
            "sliding_window": self.sliding_window is not None,
            "softcap": (self.attn_logit_softcapping or self.final_logit_softcapping) is not None,
            "qk_norm": self.use_qk_norm,
        }
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        D, F, H = self.hidden_size, self.intermediate_size, self.head_dim
        N, K = self.num_attention_heads, self.num_key_value_heads
        attention = 2 * N * H * D + 2 * K * H * D
        bias = (N * H + 2 * K * H + D) if self.attention_bias else 0
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + bias + 3 * D * F + 2 * D) + D

    # -- reading and writing -------------------------------------------------------------------

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], allow_unknown: Sequence[str] = ()) -> Self:
        """A config from the content of a `config.json`, old or new.

        Args:
            raw: the parsed JSON object.
            allow_unknown: keys to ignore although nothing here knows them.

        Raises:
            ConfigError: for a key that is not known and not null or false, or a wrong value.
        """
        model_type = raw.get("model_type", "gemma")
        if model_type != "gemma":
            raise ConfigError(
                f"model_type is {model_type!r}; this version reads 'gemma' (first generation: "
                f"Gemma 1, 1.1 and CodeGemma). {nearest(str(model_type), ['gemma'])}".rstrip()
            )
        values = _resolve_legacy(raw)
        fields = {field.name for field in dataclasses.fields(cls)}
        known = fields | _BOOKKEEPING
        unknown = [
            key
            for key, value in values.items()
            if key not in known and key not in allow_unknown and value not in (None, False)
        ]
        if unknown:
            hint = nearest(unknown[0], fields | _LEGACY)
            raise ConfigError(
                f"config.json has keys that gemma_hub does not know: {first_ten(unknown)}. {hint} "
                "If the model does not depend on them, remove them from the file or pass "
                f"allow_unknown={sorted(unknown)!r} to GemmaConfig.from_pretrained."
            )
        return cls(**{key: value for key, value in values.items() if key in fields})

    @classmethod
    def from_pretrained(cls, source: str | Path, allow_unknown: Sequence[str] = ()) -> Self:
        """The config of a checkpoint folder, or of a `config.json` file.

        Raises:
            CheckpointNotFoundError: there is no such file.
            ConfigError: the file is not a JSON object, or holds a wrong value.
        """
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"There is no config.json at {path}. A checkpoint is a folder with config.json, "
                "the weights as *.safetensors and tokenizer.model."
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}. Get the file again.") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds a JSON {type(raw).__name__}; expected an object.")
        try:
            return cls.from_dict(raw, allow_unknown)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def preset(cls, name: str) -> Self:
        """The config of a released model, such as 'gemma-2b' or 'codegemma-7b-it'."""
        table = json.loads(resources.files("gemma_hub").joinpath("presets.json").read_text("utf-8"))
        if name not in table["names"]:
            raise ConfigError(
                f"There is no preset {name!r}. {nearest(name, table['names'])} "
                f"Presets: {', '.join(table['names'])}."
            )
        return cls.from_dict(table["shapes"][table["names"][name]])

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that Transformers 4 and 5 read as the same model."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _LATER or getattr(self, field.name) != field.default
        }
        values["hidden_act"] = self.hidden_activation
        values["torch_dtype"] = values.pop("dtype")
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **values}


_LEGACY = frozenset({"hidden_act", "rope_parameters", "torch_dtype"})
_LATER = frozenset(
    "rms_norm_offset query_pre_attn_scalar layer_types sliding_window attn_logit_softcapping "
    "final_logit_softcapping use_qk_norm".split()
)
_TUPLES = ("eos_token_id", "layer_types")


def _resolve_legacy(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the older and newer spellings of Transformers turned into this class's fields."""
    values = dict(raw)
    # hidden_activation came later and wins; an old file has it as null.
    hidden_act = values.pop("hidden_act", None)
    if values.get("hidden_activation") is None:
        values["hidden_activation"] = TANH_GELU if hidden_act is None else hidden_act
    torch_dtype = values.pop("torch_dtype", None)
    if values.get("dtype") is None:
        values["dtype"] = torch_dtype
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        if not isinstance(rope, Mapping):
            raise ConfigError(f"rope_parameters is {rope!r}; expected an object with rope_theta.")
        rope = dict(rope)
        theta = rope.pop("rope_theta", None)
        for key, new in (("rope_theta", theta), ("rope_scaling", rope or None)):
            old = values.get(key)
            if old is not None and new is not None and not _same_rope(key, old, new):
                raise ConfigError(
                    f"{key} is {old!r} at the top level and {new!r} in rope_parameters. "
                    "Keep the one that the model was trained with."
                )
            if new is not None:
                values[key] = new
    for key in ("rope_theta", "rope_scaling", "head_dim"):
        if key in values and values[key] is None:
            del values[key]  # null means the default
    return values


def _same_rope(key: str, old: Any, new: Any) -> bool:
    if key == "rope_scaling" and isinstance(old, Mapping):
        kinds = {_rope_type(old), _rope_type(new)}
        return len(kinds) == 1 and old.get("factor") == new.get("factor")
    return bool(old == new)


def _rope_type(scaling: Mapping[str, Any] | None) -> str:
    if not scaling:
        return "default"
    return str(scaling.get("rope_type", scaling.get("type", "default")))


_INTS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings"
).split()
_FLOATS = "rms_norm_eps rope_theta".split()
_OPTIONAL_FLOATS = "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping".split()
_BOOLS = "attention_bias tie_word_embeddings use_qk_norm".split()


def _check_types(config: GemmaConfig) -> None:
    for name in _INTS:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1.")
    for name in _FLOATS:
        value = getattr(config, name)
        if type(value) not in (int, float) or not (0 < value < math.inf):
            raise ConfigError(f"{name} is {value!r}; expected a number above 0.")
    for name in _OPTIONAL_FLOATS:
        value = getattr(config, name)
        if value is not None and (type(value) not in (int, float) or not (0 < value < math.inf)):
            raise ConfigError(f"{name} is {value!r}; expected a number above 0, or null.")
    for name in _BOOLS:
        value = getattr(config, name)
        if type(value) is not bool:
            raise ConfigError(f"{name} is {value!r}; expected true or false.")
    for name in ("initializer_range", "attention_dropout", "rms_norm_offset"):
        value = getattr(config, name)
        if type(value) not in (int, float) or not (0 <= value < math.inf):
            raise ConfigError(f"{name} is {value!r}; expected a number of at least 0.")


def _check_values(config: GemmaConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}; "
            "the first must be a multiple of the second."
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim is {config.head_dim}; RoPE pairs need an even number.")
    if config.hidden_activation not in _TANH_GELU_NAMES:
        raise ConfigError(
            f"hidden_activation is {config.hidden_activation!r}; Gemma has {TANH_GELU!r} "
            f"(also written {', '.join(sorted(_TANH_GELU_NAMES - {TANH_GELU}))})."
        )
    if config.dtype is not None and config.dtype not in _DTYPES:
        raise ConfigError(f"dtype is {config.dtype!r}; expected one of {', '.join(_DTYPES)}.")
    if config.attention_dropout >= 1:
        raise ConfigError(
            f"attention_dropout is {config.attention_dropout}; expected 0 to below 1."
        )
    _check_rope_scaling(config.rope_scaling)
    _check_token_ids(config)
    _check_layer_types(config)


def _check_rope_scaling(scaling: Mapping[str, Any] | None) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling is {scaling!r}; expected an object or null.")
    kind = _rope_type(scaling)
    if kind not in _ROPE_TYPES:
        raise ConfigError(
            f"rope_scaling has the type {kind!r}; supported are {', '.join(_ROPE_TYPES)}."
        )
    factor = scaling.get("factor")
    if kind == "linear" and (type(factor) not in (int, float) or not (1 <= factor < math.inf)):
        raise ConfigError(f"rope_scaling has the factor {factor!r}; expected a number from 1 up.")


def _check_token_ids(config: GemmaConfig) -> None:
    ids = {"pad_token_id": config.pad_token_id, "bos_token_id": config.bos_token_id}
    eos = config.eos_token_id
    for i, value in enumerate(eos if isinstance(eos, tuple) else (eos,)):
        ids[f"eos_token_id[{i}]"] = value
    for name, value in ids.items():
        if value is not None and (type(value) is not int or not 0 <= value < config.vocab_size):
            raise ConfigError(
                f"{name} is {value!r}; expected an id from 0 to {config.vocab_size - 1}, or null."
            )


def _check_layer_types(config: GemmaConfig) -> None:
    types, window = config.layer_types, config.sliding_window
    if window is not None and (type(window) is not int or window < 1):
        raise ConfigError(f"sliding_window is {window!r}; expected an integer from 1 up, or null.")
    if types is None:
        return
    if not isinstance(types, tuple) or len(types) != config.num_hidden_layers:
        raise ConfigError(
            f"layer_types is {types!r}; expected one entry for each of the "
            f"{config.num_hidden_layers} layers."
        )
    for kind in types:
        if kind not in ATTENTION_TYPES:
            raise ConfigError(
                f"layer_types holds {kind!r}; expected one of {', '.join(ATTENTION_TYPES)}."
            )
    if "sliding_attention" in types and window is None:
        raise ConfigError("layer_types has sliding_attention layers; sliding_window must be set.")
