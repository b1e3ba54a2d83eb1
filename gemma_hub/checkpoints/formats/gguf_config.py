"""A config as the key-values of a GGUF: what they say, what they cannot, and how they are read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.checkpoints.formats.gguf_file import MAX_TENSORS, GgufFile, Value, shown
from gemma_hub.checkpoints.formats.interface import WriteOptions
from gemma_hub.config import GemmaConfig, parse_json_object
from gemma_hub.errors import CheckpointError, ConfigError, first_ten

ARCHITECTURE = "gemma"
CONFIG_KEY = "gemma_hub.config"
"""Its value is a JSON object: fields of the config that have no key of their own."""

_SIZES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
_EPSILON, _BASE = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_SCALING, _FACTOR, _OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
# Keys that say again what other keys, or the shapes, say.
_REPEATS = {
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
_KNOWN = {
    *_SIZES.values(), *_REPEATS, _EPSILON, _BASE, _SCALING, _FACTOR, _OLD_FACTOR,
}  # fmt: skip
_MAX_LAYERS = MAX_TENSORS // 10
_IDS = {"pad_token_id": "padding", "eos_token_id": "eos", "bos_token_id": "bos"}
_UNSAID = ("initializer_range", "attention_dropout", *_IDS)
_MAX_UNSAID = 1 << 20  # characters


# -- writing ---------------------------------------------------------------------------------------


def objections(config: GemmaConfig, task: str, options: WriteOptions) -> Iterator[str]:
    """What llama.cpp does not compute for Gemma 1, or a GGUF has no key for."""
    if task not in ("base", "causal_lm"):
        yield f"A GGUF of a Gemma holds no head, and this is a model for {task}."
    if not config.tie_word_embeddings:
        yield "llama.cpp takes Gemma's embedding for its head; this model has another."
    if config.attention_bias:
        yield "llama.cpp's Gemma has no biases in its attention."
    if config.use_qk_norm:
        yield "llama.cpp's Gemma does not normalise queries and keys."
    if config.rms_norm_offset != 1:
        yield f"A GGUF holds norms plus 1, and this model adds {config.rms_norm_offset:g} to them."
    if any(layer.window is not None for layer in config.layers):
        yield "llama.cpp's Gemma attends to all tokens; this model has a sliding window."
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is not None:
            yield f"llama.cpp's Gemma caps no logits; this model has {name}."
    if config.query_pre_attn_scalar not in (None, config.head_dim):
        yield (
            f"llama.cpp scales Gemma's attention by head_dim ({config.head_dim}), and this model "
            f"by query_pre_attn_scalar ({config.query_pre_attn_scalar:g})."
        )
    if options.pad_vocab_to is not None:
        yield "A GGUF has one row of the embedding for each piece of the vocabulary: no padding."
    if config.num_hidden_layers > _MAX_LAYERS:
        yield f"It has {config.num_hidden_layers} layers; of a GGUF, {_MAX_LAYERS} can be read."
    numbers = {
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "the factor of rope_scaling": config.rope_factor,
    }
    for name, value in numbers.items():
        if _shortest(value) != value:
            yield f"{name} is {value!r}; a GGUF holds it in float32, as {_shortest(value)!r}."
    for name in ("vocab_size", *_SIZES):
        if getattr(config, name) >= 2**32:
            yield f"{name} is {getattr(config, name)}; a GGUF holds it in 32 bits."


def add_config(writer: Any, config: GemmaConfig) -> None:
    """Add the key-values of a config that has no objections to a `gguf.GGUFWriter`."""
    for field, key in {**_SIZES, "vocab_size": "vocab_size"}.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", getattr(config, field))
    writer.add_uint32(f"{ARCHITECTURE}.attention.value_length", config.head_dim)
    writer.add_float32(f"{ARCHITECTURE}.{_EPSILON}", config.rms_norm_eps)
    writer.add_float32(f"{ARCHITECTURE}.{_BASE}", config.rope_theta)
    if config.rope_scaling is not None:
        writer.add_string(f"{ARCHITECTURE}.{_SCALING}", "linear")
        writer.add_float32(f"{ARCHITECTURE}.{_FACTOR}", config.rope_factor)
    for field, name in _IDS.items():
        first = _first(getattr(config, field))
        if first is not None:
            writer.add_uint32(_id_key(name), first)
    unsaid = {
        field: getattr(config, field)
        for field in _UNSAID
        if getattr(config, field) != GemmaConfig.__dataclass_fields__[field].default
        and not (field in _IDS and type(getattr(config, field)) is int)
    }
    if unsaid:
        writer.add_string(CONFIG_KEY, json.dumps(unsaid, sort_keys=True))


# -- reading ---------------------------------------------------------------------------------------


def check_architecture(path: Path, metadata: Mapping[str, Value]) -> None:
    """Raise a CheckpointError unless it is a whole first-generation Gemma."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name != ARCHITECTURE:
        raise CheckpointError(
            f"{path} holds a model of the architecture {shown(name)}; this version reads "
            f"{ARCHITECTURE!r} (first generation: Gemma 1, 1.1 and CodeGemma)."
        )
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count not in (0, 1):
        raise CheckpointError(
            f"{path} is one of {shown(count)} parts of a model. Make one file of them with "
            "llama.cpp's llama-gguf-split --merge FIRST_PART model.gguf, and open that."
        )


def config_from(file: GgufFile, embedding: str) -> tuple[GemmaConfig, tuple[str, ...]]:
    """The config that the key-values say, and notes on what they leave out.

    Args:
        file: the GGUF.
        embedding: name of the tensor whose rows are the vocabulary.

    Raises:
        CheckpointError: a key is missing, or has a value that no Gemma has.
    """
    notes: list[str] = []
    values: dict[str, Any] = {
        field: value
        for field, key in _SIZES.items()
        if (value := _stated(file, f"{ARCHITECTURE}.{key}")) is not None
    }
    if "num_attention_heads" in values and "num_key_value_heads" not in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
        notes.append("It does not state attention.head_count_kv; as many as query heads, then.")
    missing = [f"{ARCHITECTURE}.{key}" for field, key in _SIZES.items() if field not in values]
    if missing or embedding not in file.tensors:
        raise CheckpointError(
            f"{file.path} lacks {', '.join(missing) or embedding}. Get the file again, or pass "
            "the model's config if only its metadata is incomplete."
        )
    values["vocab_size"] = file.shape(embedding)[0]
    values["dtype"] = file.dtype(embedding)
    for field, key, usual in (("rms_norm_eps", _EPSILON, 1e-6), ("rope_theta", _BASE, 10_000.0)):
        stated = _stated(file, f"{ARCHITECTURE}.{key}")
        values[field] = usual if stated is None else _shortest(stated)
        if stated is None:
            notes.append(f"It does not state {key}; {usual:g} is taken, as for released models.")
    values["rope_scaling"] = _scaling(file)
    notes += _add_unsaid(values, file)
    try:
        config = GemmaConfig(**values)
    except ConfigError as error:
        raise CheckpointError(
            f"{file.path}: its metadata is no Gemma's: {error} Pass the model's config."
        ) from error
    _check_repeats(file, config)
    return config, (*notes, *_unknown_keys(file.metadata))


def _stated(file: GgufFile, key: str) -> str | int | float | bool | None:
    """The one value that a key has, which is short; None without the key."""
    value = file.metadata.get(key)
    if isinstance(value, np.ndarray | list) or (isinstance(value, str) and len(value) > 80):
        raise CheckpointError(
            f"{file.path} has {key} {shown(value)}; expected one value. Get the file again, or "
            "pass the model's config."
        )
    return value


def _scaling(file: GgufFile) -> dict[str, Any] | None:
    """The scaling of positions; as in llama.cpp, a factor of no stated type is a linear one."""
    kind = _stated(file, f"{ARCHITECTURE}.{_SCALING}")
    if kind not in (None, "linear", "none"):
        raise CheckpointError(
            f"{file.path} has {ARCHITECTURE}.{_SCALING} {kind!r}; expected 'linear' or 'none'."
        )
    factor = _stated(file, f"{ARCHITECTURE}.{_FACTOR}")
    if factor is None:
        factor = _stated(file, f"{ARCHITECTURE}.{_OLD_FACTOR}")
    if kind == "none" or not factor:
        return None
    return {"rope_type": "linear", "factor": _shortest(factor)}


def _add_unsaid(values: dict[str, Any], file: GgufFile) -> list[str]:
    """Put the ids into `values`, and what our own key says; returns notes."""
    notes = []
    stated = {field: _stated(file, _id_key(name)) for field, name in _IDS.items()}
    absent = [field for field, value in stated.items() if value is None]
    values |= {field: value for field, value in stated.items() if value is not None}
    # A tool may have changed an id since; the list that we noted is then of another model.
    ignored = []
    for field, value in _unsaid(file).items():
        if field not in _UNSAID or (field in _IDS and _first(value) != stated[field]):
            ignored.append(field[:80])
        else:
            values[field] = tuple(value) if isinstance(value, list) else value
    if ignored:
        notes.append(
            f"What {CONFIG_KEY} says of {first_ten(ignored)} was ignored: it does not belong here."
        )
    assumed = [field for field in absent if field not in values]
    if assumed:
        notes.append(
            f"It does not state {', '.join(assumed)}; those of the released models are taken."
        )
    return notes


def _unsaid(file: GgufFile) -> dict[str, Any]:
    """What our own key says."""
    content = file.metadata.get(CONFIG_KEY, "{}")
    if not isinstance(content, str) or len(content) > _MAX_UNSAID:
        raise CheckpointError(
            f"{file.path} has {CONFIG_KEY} {shown(content)}; expected a JSON object. Get the file "
            "again, or pass the model's config."
        )
    return parse_json_object(content.encode(), f"{CONFIG_KEY} of {file.path}", CheckpointError)


def _check_repeats(file: GgufFile, config: GemmaConfig) -> None:
    for key, field in _REPEATS.items():
        stated, expected = _stated(file, f"{ARCHITECTURE}.{key}"), getattr(config, field)
        if stated is not None and stated != expected:
            raise CheckpointError(
                f"{file.path} has {ARCHITECTURE}.{key} {stated!r}; expected {expected}, the "
                f"{field} that the rest of the file says."
            )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != config.vocab_size:
        raise CheckpointError(
            f"{file.path} has {len(tokens):,} pieces in its vocabulary and {config.vocab_size:,} "
            "rows in its embedding, which llama.cpp would not load either. Get the file again, or "
            "pass the model's config if only the vocabulary is incomplete."
        )


def _unknown_keys(metadata: Mapping[str, Value]) -> Iterator[str]:
    prefix = f"{ARCHITECTURE}."
    unknown = [
        key for key in metadata if key.startswith(prefix) and key.removeprefix(prefix) not in _KNOWN
    ]
    if unknown:
        names = first_ten(key[:80] for key in unknown)
        yield f"Nothing here knows its keys {names}; what they say was ignored."


def _shortest(value: Any) -> Any:
    """The number with the fewest digits that is this float32: 1e-06, not 9.99999997e-07."""
    if type(value) not in (int, float):
        return value  # which is reported with the name of its field
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _first(value: Any) -> Any:
    return (value[0] if value else None) if isinstance(value, tuple | list) else value


def _id_key(name: str) -> str:
    return f"tokenizer.ggml.{name}_token_id"
