"""A Keras preset's JSON files and a GemmaConfig: what each says of the other, and what it cannot.

`GemmaBackbone` is Gemma 1 and, with other arguments, Gemma 2. Its RoPE base is 10,000 and its norms
before attention and feed-forward have epsilon 1e-6 whatever its arguments say; token ids are the
vocabulary's. What has no argument goes to metadata.json, which Keras does not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_hub.config import ARCHITECTURES, GemmaConfig, read_json_object
from gemma_hub.errors import CheckpointError, ConfigError, first_ten, nearest
from gemma_hub.parameters import DTYPES, number_of_parameters

TASKS = ("causal_lm", "base")
"""What a preset can be for: its head is its embedding."""

_SIZES = {  # argument of GemmaBackbone: field of GemmaConfig
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_dim": "hidden_size",
    "head_dim": "head_dim",
}
_FEED_FORWARD = "intermediate_dim"  # twice the size: Keras counts the gate and the other half
_EPSILON = 1e-6
_ROPE_THETA = 10_000.0
_GEMMA_2 = (
    "use_post_ffw_norm", "use_post_attention_norm", "attention_logit_soft_cap",
    "final_logit_soft_cap", "use_sliding_window_attention",
)  # fmt: skip
_OTHERS = (
    "name", "trainable", "dtype", "layer_norm_epsilon", "dropout", "query_head_dim_normalize",
    "sliding_window_size",
)  # fmt: skip
_KNOWN = {*_SIZES, _FEED_FORWARD, *_GEMMA_2, *_OTHERS}
_OURS = "gemma_hub"  # the key of metadata.json
_SEQUENCE_LENGTH = 1024  # keras-hub's default
_MAX_LAYERS = 200  # so that a file stays below what `hdf5_file` takes in one


# -- what cannot be written ------------------------------------------------------------------------


def config_objections(config: GemmaConfig, task: str) -> tuple[str, ...]:
    """Why GemmaBackbone cannot be such a model, a sentence each."""
    c = config
    scalar = c.query_pre_attn_scalar
    caps = c.attn_logit_softcapping, c.final_logit_softcapping
    checks = {
        f"The task is {task!r}; a Gemma preset is for {' or '.join(TASKS)}.": task not in TASKS,
        f"rope_theta is {c.rope_theta:g}; in keras-hub's Gemma it is always {_ROPE_THETA:g}.": (
            c.rope_theta != _ROPE_THETA
        ),
        "rope_scaling is set; keras-hub's Gemma has none.": c.rope_factor != 1.0,
        f"rms_norm_eps is {c.rms_norm_eps:g}; keras-hub's Gemma has {_EPSILON:g} in its layers, "
        "whatever its layer_norm_epsilon.": c.rms_norm_eps != _EPSILON,
        f"rms_norm_offset is {c.rms_norm_offset:g}; keras-hub's Gemma adds 1.": (
            c.rms_norm_offset != 1.0
        ),
        "tie_word_embeddings is false; the head of keras-hub's Gemma is its embedding.": (
            not c.tie_word_embeddings
        ),
        "attention_bias is true; keras-hub's Gemma has no biases.": c.attention_bias,
        "use_qk_norm is true; keras-hub's Gemma has no such norms.": c.use_qk_norm,
        f"query_pre_attn_scalar is {scalar}; keras-hub's Gemma scales by head_dim, which is "
        f"{c.head_dim}.": scalar not in (None, c.head_dim),
        "Logits are capped; this version writes first-generation presets, without caps.": (
            caps != (None, None)
        ),
        "Layers have a sliding window; this version writes first-generation presets, without.": (
            any(layer.window is not None for layer in c.layers)
        ),
        f"attention_dropout is {c.attention_dropout:g}; keras-hub's dropout also drops from the "
        "attention's output, so training would differ. Set it to 0.": c.attention_dropout != 0,
        f"There are {c.num_hidden_layers} layers; at most {_MAX_LAYERS} are read and written.": (
            c.num_hidden_layers > _MAX_LAYERS
        ),
    }
    return tuple(sentence for sentence, applies in checks.items() if applies)


# -- reading ---------------------------------------------------------------------------------------


def read_config(folder: Path) -> tuple[GemmaConfig, str, tuple[str, ...]]:
    """The config and the task that a preset states, and notes on what it does not state.

    Raises:
        CheckpointError: config.json or metadata.json is missing, malformed or of another model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, which a Keras preset has. Get that file too, or pass "
            "the model's config."
        )
    try:
        return _read_config(folder, path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error} Get the file again.") from error


def _read_config(folder: Path, path: Path) -> tuple[GemmaConfig, str, tuple[str, ...]]:
    content = read_json_object(path, CheckpointError)
    kind, arguments = content.get("class_name"), content.get("config")
    if kind != "GemmaBackbone" or not isinstance(arguments, dict):
        raise CheckpointError(
            f"{path} is of the class {kind!r}; expected 'GemmaBackbone' and its arguments. This "
            "version reads presets of first-generation Gemma (Gemma 1, 1.1 and CodeGemma)."
        )
    _check_arguments(path, arguments)
    values = {field: arguments[key] for key, field in _SIZES.items()}
    values["intermediate_size"] = arguments[_FEED_FORWARD] // 2
    config = GemmaConfig(**values, dtype=_weight_dtype(path, arguments.get("dtype")))
    if config.num_hidden_layers > _MAX_LAYERS:
        raise CheckpointError(
            f"{path} has {config.num_hidden_layers} layers, expected at most {_MAX_LAYERS}."
        )
    notes = _dropout_note(arguments)
    ours = _read_ours(folder / "metadata.json", config)
    if ours is not None:
        return *ours, notes
    return config, "causal_lm", (*notes, _assumed(config))


def _check_arguments(path: Path, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are missing, unknown, or not those of a first-generation Gemma."""
    needed = (*_SIZES, _FEED_FORWARD)
    if missing := [key for key in needed if key not in arguments]:
        raise CheckpointError(f"{path} does not say {first_ten(missing)}. Get the file again.")
    stated = {key: value for key, value in arguments.items() if value or value == 0}
    stated = {key: value for key, value in stated.items() if value is not False}
    unknown = [key for key in stated if key not in _KNOWN]
    if unknown:
        hints = " ".join(filter(None, (nearest(key, _KNOWN) for key in sorted(unknown)[:10])))
        raise CheckpointError(
            f"{path} has arguments that gemma_hub does not know: {first_ten(unknown)}. "
            f"{hints}{' ' if hints else ''}If the model does not depend on them, remove them."
        )
    if later := [key for key in _GEMMA_2 if key in stated]:
        raise CheckpointError(
            f"{path} is of a Gemma 2: it sets {first_ten(later)}. This version reads presets of "
            "first-generation Gemma (Gemma 1, 1.1 and CodeGemma)."
        )
    width = arguments[_FEED_FORWARD]
    if type(width) is not int or width < 2 or width % 2:
        raise CheckpointError(
            f"{path} has the {_FEED_FORWARD} {width!r}; expected an even number, twice the size of "
            "the feed-forward layer."
        )
    _check_constants(path, arguments)


def _check_constants(path: Path, arguments: Mapping[str, Any]) -> None:
    rate = arguments.get("dropout", 0)
    if type(rate) not in (int, float) or not 0 <= rate < 1:
        raise CheckpointError(f"{path} has the dropout {rate!r}; expected a number from 0 to 1.")
    epsilon = arguments.get("layer_norm_epsilon", _EPSILON)
    if epsilon != _EPSILON:
        raise CheckpointError(
            f"{path} has the layer_norm_epsilon {epsilon!r}; expected {_EPSILON:g}. keras-hub uses "
            "any other in the last norm only, and there is no config for such a model."
        )
    if arguments.get("query_head_dim_normalize", True) is not True:
        heads, hidden = arguments["num_query_heads"], arguments["hidden_dim"]
        is_int = type(heads) is int and type(hidden) is int and heads > 0
        if not (is_int and hidden // heads == arguments["head_dim"]):
            raise CheckpointError(
                f"{path} has query_head_dim_normalize false, a scale of 1/sqrt(hidden_dim // "
                "num_query_heads), which no first-generation Gemma has and keras-hub itself "
                "ignores. Set it to true if the model was trained with keras-hub."
            )


def _weight_dtype(path: Path, policy: Any) -> str | None:
    """The type of the variables under a Keras dtype policy; None if none is stated."""
    name: Any = policy
    if isinstance(policy, Mapping):
        settings = policy.get("config")
        name = settings.get("name") if isinstance(settings, Mapping) else None
        if policy.get("class_name") not in ("DTypePolicy", "FloatDTypePolicy"):
            name = policy.get("class_name")
    if name is None and policy is None:
        return None
    if isinstance(name, str) and name in ("mixed_bfloat16", "mixed_float16"):
        return "float32"
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointError(
            f"{path} has the dtype policy {name!r}; expected a floating-point type "
            f"({', '.join(DTYPES)}). Quantized presets are not read; get the model in full."
        )
    return name


def _dropout_note(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    rate = arguments.get("dropout")
    if not rate:
        return ()
    return (
        f"The preset trains with dropout {rate!r}, on attention weights and outputs, which no "
        "GemmaConfig states; it is left out. Predictions are the same.",
    )


def _assumed(config: GemmaConfig) -> str:
    return (
        "A Keras preset does not state max_position_embeddings or token ids; assumed are "
        f"{config.max_position_embeddings} positions, and the released models' ids: padding "
        f"{config.pad_token_id}, end {config.eos_token_id}, begin {config.bos_token_id}."
    )


def _read_ours(path: Path, stated: GemmaConfig) -> tuple[GemmaConfig, str] | None:
    """The config and task that gemma_hub left in metadata.json; None if it did not write it."""
    if not path.is_file():
        return None
    ours = read_json_object(path, CheckpointError).get(_OURS)
    if ours is None:
        return None
    try:
        raw = ours["config"]
        config = GemmaConfig.from_dict(raw)
        tasks = [t for t in TASKS if raw.get("architectures") == [ARCHITECTURES[t]]]
        if not tasks:
            raise ConfigError(f"the architectures are {raw.get('architectures')!r}")
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has no config under {_OURS!r} that can be read ({error}). Remove that key, "
            "and what it states is assumed."
        ) from error
    wrong = [
        f"{field} is {getattr(config, field)} there."
        for field in (*_SIZES.values(), "intermediate_size")
        if getattr(config, field) != getattr(stated, field)
    ]
    if wrong := [*wrong, *config_objections(config, tasks[0])]:
        raise CheckpointError(
            f"{path} has a config under {_OURS!r} that does not fit config.json: "
            f"{' '.join(wrong)} Remove that key, and what it states is assumed."
        )
    return config, tasks[0]


# -- writing ---------------------------------------------------------------------------------------


def preset_files(
    config: GemmaConfig, task: str, dtype: str, *, has_tokenizer: bool
) -> dict[str, dict[str, Any]]:
    """{name: content} of a preset's JSON files, as keras-hub's `save_to_preset` writes them.

    Args:
        config: the model's.
        task: what it is for.
        dtype: of the variables.
        has_tokenizer: whether there is a vocabulary.
    """
    arguments: dict[str, Any] = {key: getattr(config, field) for key, field in _SIZES.items()}
    arguments |= {
        _FEED_FORWARD: 2 * config.intermediate_size,
        "layer_norm_epsilon": config.rms_norm_eps,
        "dropout": 0,
        "query_head_dim_normalize": True,
        "sliding_window_size": 4096,
        **dict.fromkeys(_GEMMA_2[:2], False),
        **dict.fromkeys(_GEMMA_2[2:4]),
        _GEMMA_2[4]: False,
    }
    backbone = _serialized("gemma_backbone", "GemmaBackbone", dtype, arguments)
    files = {
        "config.json": backbone,
        "metadata.json": {
            "parameter_count": number_of_parameters(config, task),
            "tasks": ["CausalLM"],
            _OURS: {"config": config.to_dict(task)},
        },
    }
    preprocessor = None
    if has_tokenizer:
        preprocessor = _preprocessor(config)
        files["preprocessor.json"] = preprocessor
        files["tokenizer.json"] = preprocessor["config"]["tokenizer"]
    if task == "causal_lm":
        files["task.json"] = {
            "module": "keras_hub.src.models.gemma.gemma_causal_lm",
            "class_name": "GemmaCausalLM",
            "config": {
                "backbone": backbone,
                "preprocessor": preprocessor,
                "name": "gemma_causal_lm",
            },
            "registered_name": "keras_hub>GemmaCausalLM",
        }
    return files


def _preprocessor(config: GemmaConfig) -> dict[str, Any]:
    arguments = {
        "tokenizer": _serialized("gemma_tokenizer", "GemmaTokenizer", "int32", _TOKENIZER),
        "config_file": "preprocessor.json",
        "sequence_length": min(_SEQUENCE_LENGTH, config.max_position_embeddings),
        "add_start_token": True,
        "add_end_token": True,
    }
    return _serialized(
        "gemma_causal_lm_preprocessor", "GemmaCausalLMPreprocessor", "float32", arguments
    )


_TOKENIZER = {
    "config_file": "tokenizer.json",
    "proto": None,  # the vocabulary is a file of its own
    "sequence_length": None,
    "add_bos": False,
    "add_eos": False,
}


def _serialized(name: str, kind: str, dtype: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An object of keras-hub as Keras serializes it."""
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype},
        "registered_name": None,
    }
    return {
        "module": f"keras_hub.src.models.gemma.{name}",
        "class_name": kind,
        "config": {"name": name, "trainable": True, "dtype": policy, **arguments},
        "registered_name": f"keras_hub>{kind}",
    }
