"""GemmaConfig: what a Gemma model is, with every legacy spelling resolved once.

Field names are those of `config.json`. Backends read the resolved values and decide nothing.
"""

import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

from gemma_hub.errors import (
    CheckpointNotFoundError,
    ConfigError,
    GemmaHubError,
    first_ten,
    nearest,
)

TANH_GELU = "gelu_pytorch_tanh"
# Every released Gemma 1 means the tanh form, also those whose config.json says "gelu";
# "gelu_new" and "gelu_fast" are two more names that Transformers has for the same formula.
_TANH_GELU_NAMES = frozenset({TANH_GELU, "gelu", "gelu_new", "gelu_fast"})
_ROPE_TYPES = ("default", "linear")
_DTYPES = ("bfloat16", "float16", "float32", "float64")
ATTENTION_TYPES = ("full_attention", "sliding_attention")

# A deeper model would be a damaged file; the limit keeps such a file from filling the memory.
_MAX_LAYERS = 10_000
# Keys that Transformers writes and that do not change what the model computes at inference.
# fmt: off
_BOOKKEEPING = frozenset([
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "architectures", "attn_implementation", "auto_map", "cache_implementation",
    "chunk_size_feed_forward", "classifier_dropout", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "finetuning_task", "gradient_checkpointing",
    "hidden_dropout", "hidden_dropout_prob", "id2label", "is_decoder", "label2id", "length_penalty",
    "license", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "problem_type", "repetition_penalty", "return_dict", "task_specific_params", "temperature",
    "token_classification_bias", "tokenizer_class", "top_k", "top_p", "transformers_version",
    "typical_p", "unsloth_fixed", "unsloth_version", "use_cache", "use_return_dict",
])
# fmt: on


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
    # None, or {"rope_type": "linear", "factor": float}
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2
    dtype: str | None = None  # the checkpoint's own statement; None where it makes none
    rms_norm_offset: float = 1.0  # the norm multiplies by (offset + weight)
    query_pre_attn_scalar: float | None = None  # its -0.5 power scales q·k; head_dim if None
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
        for name in (*_POSITIVE, *_OPTIONAL_POSITIVE, *_NOT_NEGATIVE):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        object.__setattr__(self, "hidden_activation", TANH_GELU)
        factor = _linear_factor("rope_scaling", self.rope_scaling)
        scaling = None if factor is None else {"rope_type": "linear", "factor": factor}
        object.__setattr__(self, "rope_scaling", scaling)

    # -- resolved values that backends read ----------------------------------------------------

    @property
    def attention_scale(self) -> float:
        """Factor on q·k."""
        return math.pow(self.query_pre_attn_scalar or self.head_dim, -0.5)

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
            "sliding_window": any(layer.window is not None for layer in self.layers),
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
        qk_norm = 2 * H if self.use_qk_norm else 0
        embeddings = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return (
            embeddings
            + self.num_hidden_layers * (attention + bias + qk_norm + 3 * D * F + 2 * D)
            + D
        )

    # -- reading and writing -------------------------------------------------------------------

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], allow_unknown: Sequence[str] = ()) -> Self:
        """A config from the content of a `config.json`, old or new.

        Args:
            raw: the parsed JSON object.
            allow_unknown: keys to ignore although nothing here knows them.

        Raises:
            ConfigError: for a wrong value, or a key that is not known and states something (is
                not null, false or empty).
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
            if key not in known and key not in allow_unknown and not _states_nothing(value)
        ]
        if unknown:
            hints = (nearest(key, fields | _LEGACY) for key in sorted(unknown)[:10])
            raise ConfigError(
                f"config.json has keys that gemma_hub does not know: {first_ten(unknown)}. "
                + "".join(f"{hint} " for hint in hints if hint)
                + "If the model does not depend on them, remove them from the file or pass their "
                "names as allow_unknown."
            )
        return cls(**{key: value for key, value in values.items() if key in fields})

    @classmethod
    def from_pretrained(cls, source: str | Path, allow_unknown: Sequence[str] = ()) -> Self:
        """The config of a checkpoint folder, or of a `config.json` file.

        Raises:
            CheckpointNotFoundError: there is no such file.
            ConfigError: the file is not a JSON object, or holds a wrong value.
        """
        path = Path(source).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"There is no config.json at {path}. A checkpoint is a folder with config.json, "
                "the weights as *.safetensors and tokenizer.model."
            )
        raw = read_json_object(path, ConfigError)
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
        for name in _TUPLES:
            if isinstance(values.get(name), tuple):
                values[name] = list(values[name])
        return {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **values}


def read_json_object(path: Path, error: type[GemmaHubError]) -> dict[str, Any]:
    """The object in a JSON file; an `error` if there is none."""
    if not path.is_file():
        raise error(f"{path} is not a file; expected JSON. Get the file again.")
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}.") from cause
    return parse_json_object(content, str(path), error)


def parse_json_object(content: bytes, what: str, error: type[GemmaHubError]) -> dict[str, Any]:
    """The object that `content` spells; an `error` for anything else, or for a key given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = first_ten(key for key, count in counts.items() if count > 1)
            raise error(f"{what} gives a key twice: {twice}. Keep one of each.")
        return table

    try:
        value = json.loads(content, object_pairs_hook=unique)
    except GemmaHubError:
        raise
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} is not valid JSON: {cause}. Get the file again.") from cause
    if not isinstance(value, dict):
        raise error(f"{what} holds a JSON {type(value).__name__}; expected an object.")
    return value


# -- older and newer spellings ---------------------------------------------------------------------

_LEGACY = frozenset({"hidden_act", "rope_parameters", "torch_dtype"})
_TUPLES = ("eos_token_id", "layer_types")


def _states_nothing(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _resolve_legacy(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the older and newer spellings of Transformers turned into this class's fields."""
    values = dict(raw)
    for key in ("hidden_act", "hidden_activation"):
        _check_activation(key, values.pop(key, None))
    dtypes = {key: values.pop(key, None) for key in ("dtype", "torch_dtype")}
    values["dtype"] = _agreed(
        {k: v.removeprefix("torch.") if isinstance(v, str) else v for k, v in dtypes.items()}
    )
    thetas, factors = {"rope_theta": values.pop("rope_theta", None)}, {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.pop(key, None)
        if isinstance(rope, Mapping):
            thetas[f"{key}.rope_theta"] = rope.get("rope_theta")
            rope = {name: value for name, value in rope.items() if name != "rope_theta"}
        if not _states_nothing(rope):
            # 1.0 is "no scaling", said aloud: it must not be taken for a key that says nothing.
            factors[f"the scaling of {key}"] = _linear_factor(key, rope) or 1.0
    theta, factor = _agreed(thetas), _agreed(factors)
    if theta is not None:
        values["rope_theta"] = theta
    if factor is not None and factor != 1.0:
        values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if values.get("head_dim", 0) is None:
        del values["head_dim"]  # null means the default
    return values


def _agreed(stated: Mapping[str, Any]) -> Any:
    """The one value that the keys of `stated` have; None where none has any."""
    given = {key: value for key, value in stated.items() if value is not None}
    keys = list(given)
    for key in keys[1:]:
        if given[key] != given[keys[0]]:
            raise ConfigError(
                f"{keys[0]} is {given[keys[0]]!r} and {key} is {given[key]!r}, two spellings of "
                "one thing. Keep the one that the model was trained with."
            )
    return given[keys[0]] if keys else None


# -- checks ----------------------------------------------------------------------------------------

_INTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_POSITIVE = ("rms_norm_eps", "rope_theta")
_OPTIONAL_POSITIVE = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_NOT_NEGATIVE = ("initializer_range", "attention_dropout", "rms_norm_offset")
_BOOLS = ("attention_bias", "tie_word_embeddings", "use_qk_norm")
# Written to config.json only where a model has them: first-generation readers do not know them.
_LATER = frozenset({"rms_norm_offset", "layer_types", "sliding_window", "use_qk_norm"}) | {
    *_OPTIONAL_POSITIVE
}


def _is_number(value: Any) -> bool:
    """Whether `value` is a finite number from 0 up that a float can hold."""
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _check_types(config: GemmaConfig) -> None:
    for name in _INTS:
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value < 2**63:
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1.")
    for name in (*_POSITIVE, *_OPTIONAL_POSITIVE):
        value = getattr(config, name)
        may_be_null = name in _OPTIONAL_POSITIVE
        if not (_is_number(value) and value > 0) and not (may_be_null and value is None):
            expected = "a number above 0" + (", or null" if may_be_null else "")
            raise ConfigError(f"{name} is {value!r}; expected {expected}.")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if not _is_number(value):
            raise ConfigError(f"{name} is {value!r}; expected a number of at least 0.")
    for name in _BOOLS:
        value = getattr(config, name)
        if type(value) is not bool:
            raise ConfigError(f"{name} is {value!r}; expected true or false.")


def _check_values(config: GemmaConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}; "
            "the first must be a multiple of the second."
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim is {config.head_dim}; RoPE pairs need an even number.")
    if config.num_hidden_layers > _MAX_LAYERS:
        raise ConfigError(
            f"num_hidden_layers is {config.num_hidden_layers}; expected at most {_MAX_LAYERS}."
        )
    _check_activation("hidden_activation", config.hidden_activation)
    if config.dtype is not None and config.dtype not in _DTYPES:
        raise ConfigError(f"dtype is {config.dtype!r}; expected one of {', '.join(_DTYPES)}.")
    if config.attention_dropout >= 1:
        raise ConfigError(
            f"attention_dropout is {config.attention_dropout}; expected 0 to below 1."
        )
    _check_token_ids(config)
    _check_layer_types(config.layer_types, config.sliding_window, config.num_hidden_layers)


def _check_activation(key: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value in _TANH_GELU_NAMES):
        raise ConfigError(
            f"{key} is {value!r}; Gemma has {TANH_GELU!r} "
            f"(also written {', '.join(sorted(_TANH_GELU_NAMES - {TANH_GELU}))})."
        )


def _linear_factor(key: str, scaling: Any) -> float | None:
    """The factor of linear RoPE scaling, None for no scaling; anything else is an error."""
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{key} is {scaling!r}; expected an object or null.")
    stated = {name: value for name, value in scaling.items() if value is not None}
    kind = _agreed({f"{key}.{name}": stated.pop(name, None) for name in ("rope_type", "type")})
    factor = stated.pop("factor", None)
    if kind not in (None, *_ROPE_TYPES):
        raise ConfigError(f"{key} has the type {kind!r}; expected {' or '.join(_ROPE_TYPES)}.")
    if stated:
        raise ConfigError(
            f"{key} has keys that gemma_hub does not know: {first_ten(stated)}; "
            "expected rope_type, factor and, in rope_parameters, rope_theta."
        )
    if kind == "linear":
        if not (_is_number(factor) and factor >= 1):
            raise ConfigError(f"{key} has the factor {factor!r}; expected a number from 1 up.")
        return float(factor)
    if factor is not None and factor != 1:
        raise ConfigError(f"{key} has the factor {factor!r} and not the type 'linear'; add it.")
    return None


def _check_token_ids(config: GemmaConfig) -> None:
    ids: dict[str, Any] = {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
    }
    eos = config.eos_token_id
    if isinstance(eos, tuple):
        ids |= {f"eos_token_id[{i}]": value for i, value in enumerate(eos)}
        if None in eos:
            raise ConfigError(f"eos_token_id is {list(eos)!r}; expected ids only in a list.")
    else:
        ids["eos_token_id"] = eos
    for name, value in ids.items():
        if value is not None and (type(value) is not int or not 0 <= value < config.vocab_size):
            raise ConfigError(
                f"{name} is {value!r}; expected an id from 0 to {config.vocab_size - 1}, or null."
            )


def _check_layer_types(types: Any, window: Any, num_layers: int) -> None:
    if window is not None and (type(window) is not int or window < 1):
        raise ConfigError(f"sliding_window is {window!r}; expected an integer from 1 up, or null.")
    if types is None:
        if window is not None:
            raise ConfigError(
                f"sliding_window is {window} and layer_types does not say which layers slide; "
                "set both, or neither."
            )
        return
    if not isinstance(types, tuple) or len(types) != num_layers:
        raise ConfigError(
            f"layer_types is {types!r}; expected one entry for each of the {num_layers} layers."
        )
    for kind in types:
        if kind not in ATTENTION_TYPES:
            raise ConfigError(
                f"layer_types holds {kind!r}; expected one of {', '.join(ATTENTION_TYPES)}."
            )
    if "sliding_attention" in types and window is None:
        raise ConfigError("layer_types has sliding_attention layers; sliding_window must be set.")
