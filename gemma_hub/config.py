"""GemmaConfig: what a Gemma model is, with every legacy spelling resolved once.

Field names are those of `config.json`. Backends read the resolved values and decide nothing.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

from gemma_hub.config_checks import (
    NOT_NEGATIVE,
    OPTIONAL_POSITIVE,
    POSITIVE,
    TANH_GELU,
    agreed,
    check_activation,
    check_label2id,
    check_problem_type,
    check_types,
    check_values,
    linear_factor,
    resolved_labels,
)
from gemma_hub.errors import (
    CheckpointNotFoundError,
    ConfigError,
    GemmaHubError,
    first_ten,
    nearest,
)
from gemma_hub.hub import fetched, repository

ARCHITECTURES = {
    "base": "GemmaModel",
    "causal_lm": "GemmaForCausalLM",
    "sequence_classification": "GemmaForSequenceClassification",
    "token_classification": "GemmaForTokenClassification",
}
"""{task: the class of Transformers that has its head}; the keys are the names of all tasks."""
CLASSIFICATIONS = ("sequence_classification", "token_classification")
"""The tasks whose head is a `score` matrix over labels."""
DEFAULT_DROPOUT = 0.1

# Keys that Transformers writes and that do not change what the model computes at inference.
# fmt: off
_BOOKKEEPING = frozenset([
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "architectures", "attn_implementation", "auto_map", "cache_implementation",
    "chunk_size_feed_forward", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "finetuning_task", "gradient_checkpointing",
    "hidden_dropout_prob", "is_decoder", "length_penalty", "license", "max_length", "min_length",
    "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "repetition_penalty", "return_dict",
    "task_specific_params", "temperature",
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
    # The classification heads; a causal LM has no use for them. Where a value is None, it is
    # filled in: with the number of names, generic names, and what Transformers takes.
    num_labels: int = None  # type: ignore[assignment]  # becomes that of id2label, or 2
    id2label: Mapping[int, str] = field(default=None, hash=False)  # type: ignore[arg-type]
    problem_type: str | None = None  # None: inferred from the labels of each call
    classifier_dropout: float = None  # type: ignore[assignment]  # of the token classifier; 0.1

    def __post_init__(self) -> None:
        for name in _TUPLES:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        check_types(vars(self))
        check_values(vars(self))
        for name in (*POSITIVE, *OPTIONAL_POSITIVE, *NOT_NEGATIVE):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        object.__setattr__(self, "hidden_activation", TANH_GELU)
        factor = linear_factor("rope_scaling", self.rope_scaling)
        scaling = None if factor is None else {"rope_type": "linear", "factor": factor}
        object.__setattr__(self, "rope_scaling", scaling)
        labels = resolved_labels(self.num_labels, self.id2label)
        object.__setattr__(self, "id2label", labels)
        object.__setattr__(self, "num_labels", len(labels))
        check_problem_type(self.problem_type, self.num_labels)
        dropout = vars(self)["classifier_dropout"]
        dropout = DEFAULT_DROPOUT if dropout is None else float(dropout)
        object.__setattr__(self, "classifier_dropout", dropout)

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
    def label2id(self) -> dict[str, int]:
        """{name: id} of every label."""
        return {name: i for i, name in self.id2label.items()}

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the causal LM; a tied head counts once."""
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
        """The config of a checkpoint folder, of a `config.json` file, or of a repository.

        Args:
            source: the path; or a repository of the Hugging Face hub, `owner/name` or
                `owner/name@revision`, of which this one file is fetched.
            allow_unknown: keys to ignore although nothing here knows them.

        Raises:
            CheckpointNotFoundError: there is no such file.
            ConfigError: the file is not a JSON object, or holds a wrong value.
        """
        path = Path(source).expanduser()
        if isinstance(source, str) and not path.exists() and (wanted := repository(source)):
            path = fetched(wanted, "config")
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

    def with_labels(
        self, num_labels: int | None = None, id2label: Mapping[int, str] | None = None
    ) -> Self:
        """The same config with other labels, named by `id2label` or else "LABEL_0", "LABEL_1", ...

        Raises:
            ConfigError: the two contradict one another.
        """
        changes: dict[str, Any] = {"num_labels": num_labels, "id2label": id2label}
        return dataclasses.replace(self, **changes)

    def to_dict(self, task: str = "causal_lm") -> dict[str, Any]:
        """The content of a `config.json` that Transformers 4 and 5 read as the same model.

        Args:
            task: a key of `ARCHITECTURES`. Labels that are not the default are written for every
                task, the others with a classification head only.
        """
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _LATER or getattr(self, field.name) != field.default
        }
        del values["num_labels"]  # follows from id2label; Transformers does not write it either
        if values["classifier_dropout"] == DEFAULT_DROPOUT:
            del values["classifier_dropout"]
        if task in CLASSIFICATIONS or values["id2label"] != resolved_labels(None, None):
            values["label2id"] = self.label2id
            # JSON has texts as keys; written as such, the file's order is the same everywhere.
            values["id2label"] = {str(i): name for i, name in self.id2label.items()}
        else:
            del values["id2label"]
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = dict(values["rope_scaling"])
        values["hidden_act"] = self.hidden_activation
        values["torch_dtype"] = values.pop("dtype")
        for name in _TUPLES:
            if isinstance(values.get(name), tuple):
                values[name] = list(values[name])
        return {"architectures": [ARCHITECTURES[task]], "model_type": "gemma", **values}


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

_LEGACY = frozenset({"hidden_act", "label2id", "rope_parameters", "torch_dtype"})
_TUPLES = ("eos_token_id", "layer_types")


def _states_nothing(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _resolve_legacy(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the older and newer spellings of Transformers turned into this class's fields."""
    values = dict(raw)
    for key in ("hidden_act", "hidden_activation"):
        check_activation(key, values.pop(key, None))
    dtypes = {key: values.pop(key, None) for key in ("dtype", "torch_dtype")}
    values["dtype"] = agreed(
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
            factors[f"the scaling of {key}"] = linear_factor(key, rope) or 1.0
    theta, factor = agreed(thetas), agreed(factors)
    if theta is not None:
        values["rope_theta"] = theta
    if factor is not None and factor != 1.0:
        values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if values.get("head_dim", 0) is None:
        del values["head_dim"]  # null means the default
    dropout = values.pop("hidden_dropout", None)  # what Transformers takes in its stead
    if values.get("classifier_dropout") is None:
        values["classifier_dropout"] = dropout
    _resolve_labels(values)
    return values


def _resolve_labels(values: dict[str, Any]) -> None:
    """Turn label2id into id2label where that is not there, and check it where it is."""
    if _states_nothing(values.get("id2label")):
        values["id2label"] = None
    label2id = values.pop("label2id", None)
    if _states_nothing(label2id):
        return
    if not isinstance(label2id, Mapping) or any(type(i) is not int for i in label2id.values()):
        raise ConfigError(f"label2id is {label2id!r}; expected an object {{name: id}}, or null.")
    if values["id2label"] is None:
        values["id2label"] = {i: name for name, i in label2id.items()}
    check_label2id(label2id, resolved_labels(values.get("num_labels"), values["id2label"]))


# Written to config.json only where a model has them: first-generation readers do not know them.
_LATER = frozenset({"rms_norm_offset", "layer_types", "sliding_window", "use_qk_norm"}) | {
    *OPTIONAL_POSITIVE,
    "problem_type",
}
