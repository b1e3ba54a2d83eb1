"""What a GemmaConfig's values may be: the checks behind its constructor.

They read fields by name from a mapping, so that nothing here depends on the class.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from gemma_hub.errors import ConfigError, first_ten

TANH_GELU = "gelu_pytorch_tanh"
# Every released Gemma 1 means the tanh form, also those whose config.json says "gelu";
# "gelu_new" and "gelu_fast" are two more names that Transformers has for the same formula.
_TANH_GELU_NAMES = frozenset({TANH_GELU, "gelu", "gelu_new", "gelu_fast"})
_ROPE_TYPES = ("default", "linear")
_DTYPES = ("bfloat16", "float16", "float32", "float64")
ATTENTION_TYPES = ("full_attention", "sliding_attention")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# More would be a damaged file; the limits keep such a file from filling the memory.
_MAX_LAYERS = 10_000
_MAX_LABELS = 1_000_000

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
POSITIVE = ("rms_norm_eps", "rope_theta")
OPTIONAL_POSITIVE = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
NOT_NEGATIVE = ("initializer_range", "attention_dropout", "rms_norm_offset")
_BOOLS = ("attention_bias", "tie_word_embeddings", "use_qk_norm")


def _is_number(value: Any) -> bool:
    """Whether `value` is a finite number from 0 up that a float can hold."""
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def check_types(values: Mapping[str, Any]) -> None:
    """Numbers are numbers, whole where they should be, and booleans are booleans."""
    for name in _INTS:
        value = values[name]
        if type(value) is not int or not 1 <= value < 2**63:
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1.")
    for name in (*POSITIVE, *OPTIONAL_POSITIVE):
        value = values[name]
        may_be_null = name in OPTIONAL_POSITIVE
        if not (_is_number(value) and value > 0) and not (may_be_null and value is None):
            expected = "a number above 0" + (", or null" if may_be_null else "")
            raise ConfigError(f"{name} is {value!r}; expected {expected}.")
    for name in NOT_NEGATIVE:
        value = values[name]
        if not _is_number(value):
            raise ConfigError(f"{name} is {value!r}; expected a number of at least 0.")
    for name in _BOOLS:
        value = values[name]
        if type(value) is not bool:
            raise ConfigError(f"{name} is {value!r}; expected true or false.")


def check_values(values: Mapping[str, Any]) -> None:
    """The values fit one another; `check_types` comes first."""
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}; "
            "the first must be a multiple of the second."
        )
    if values["head_dim"] % 2:
        raise ConfigError(f"head_dim is {values['head_dim']}; RoPE pairs need an even number.")
    if values["num_hidden_layers"] > _MAX_LAYERS:
        raise ConfigError(
            f"num_hidden_layers is {values['num_hidden_layers']}; expected at most {_MAX_LAYERS}."
        )
    check_activation("hidden_activation", values["hidden_activation"])
    if values["dtype"] is not None and values["dtype"] not in _DTYPES:
        raise ConfigError(f"dtype is {values['dtype']!r}; expected one of {', '.join(_DTYPES)}.")
    if values["attention_dropout"] >= 1:
        raise ConfigError(
            f"attention_dropout is {values['attention_dropout']}; expected 0 to below 1."
        )
    dropout = values["classifier_dropout"]
    if dropout is not None and not (_is_number(dropout) and dropout < 1):
        raise ConfigError(
            f"classifier_dropout is {dropout!r}; expected a number from 0 to below 1, or null."
        )
    _check_token_ids(values)
    _check_layer_types(values["layer_types"], values["sliding_window"], values["num_hidden_layers"])


def check_activation(key: str, value: Any) -> None:
    """`value` names the tanh form of GELU, or is None."""
    if value is not None and not (isinstance(value, str) and value in _TANH_GELU_NAMES):
        raise ConfigError(
            f"{key} is {value!r}; Gemma has {TANH_GELU!r} "
            f"(also written {', '.join(sorted(_TANH_GELU_NAMES - {TANH_GELU}))})."
        )


def linear_factor(key: str, scaling: Any) -> float | None:
    """The factor of linear RoPE scaling, None for no scaling; anything else is an error."""
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{key} is {scaling!r}; expected an object or null.")
    stated = {name: value for name, value in scaling.items() if value is not None}
    kind = agreed({f"{key}.{name}": stated.pop(name, None) for name in ("rope_type", "type")})
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


def _check_token_ids(values: Mapping[str, Any]) -> None:
    ids: dict[str, Any] = {
        "pad_token_id": values["pad_token_id"],
        "bos_token_id": values["bos_token_id"],
    }
    eos = values["eos_token_id"]
    if isinstance(eos, tuple):
        ids |= {f"eos_token_id[{i}]": value for i, value in enumerate(eos)}
        if None in eos:
            raise ConfigError(f"eos_token_id is {list(eos)!r}; expected ids only in a list.")
    else:
        ids["eos_token_id"] = eos
    for name, value in ids.items():
        if value is not None and (type(value) is not int or not 0 <= value < values["vocab_size"]):
            last = values["vocab_size"] - 1
            raise ConfigError(f"{name} is {value!r}; expected an id from 0 to {last}, or null.")


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


def agreed(stated: Mapping[str, Any]) -> Any:
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


# -- the labels of a classification head -----------------------------------------------------------


def resolved_labels(num_labels: Any, id2label: Any) -> dict[int, str]:
    """{id: name} of every label, in the order of the ids.

    Args:
        num_labels: how many there are; None for as many as `id2label` names, or 2.
        id2label: their names, the ids as integers or (in JSON) as texts; None for "LABEL_0",
            "LABEL_1", ... Names of that form count as none, so they never contradict `num_labels`.

    Raises:
        ConfigError: a wrong value, or two that contradict one another.
    """
    if num_labels is not None and (
        type(num_labels) is not int or not 1 <= num_labels <= _MAX_LABELS
    ):
        raise ConfigError(
            f"num_labels is {num_labels!r}; expected an integer from 1 to {_MAX_LABELS}."
        )
    names = None if id2label is None else _label_names(id2label)
    if names is None or names == _generic_labels(len(names)):
        return _generic_labels(num_labels or (2 if names is None else len(names)))
    if num_labels not in (None, len(names)):
        raise ConfigError(
            f"num_labels is {num_labels} and id2label names {len(names)} labels; set both to the "
            "same number, or leave num_labels out."
        )
    return names


def _generic_labels(count: int) -> dict[int, str]:
    """The names that Transformers gives to labels without names."""
    return {i: f"LABEL_{i}" for i in range(count)}


def _label_names(id2label: Any) -> dict[int, str]:
    if not isinstance(id2label, Mapping) or not id2label:
        raise ConfigError(f"id2label is {id2label!r}; expected an object {{id: name}}, or null.")
    names: dict[int, str] = {}
    for key, name in id2label.items():
        # Python refuses to read a number of thousands of digits.
        is_id = type(key) is int or (isinstance(key, str) and key.isdecimal() and len(key) < 20)
        if not is_id or int(key) in names or not 0 <= int(key) < len(id2label):
            raise ConfigError(
                f"id2label has the id {key!r}; expected each of 0 to {len(id2label) - 1} once."
            )
        if not isinstance(name, str):
            raise ConfigError(f"id2label names {key} {name!r}; expected a text.")
        names[int(key)] = name
    counts = Counter(names.values())
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ConfigError(f"id2label gives a name to two ids: {first_ten(twice)}. Rename one.")
    return dict(sorted(names.items()))


def check_label2id(label2id: Any, names: Mapping[int, str]) -> None:
    """`label2id` is the inverse of `names`.

    Raises:
        ConfigError: it is not.
    """
    if label2id != {name: i for i, name in names.items()}:
        raise ConfigError(
            f"label2id is {label2id!r} and is not the inverse of id2label {dict(names)!r}. Remove "
            "one of the two: each follows from the other."
        )


def check_problem_type(problem_type: Any, num_labels: int) -> None:
    """`problem_type` is None or one of `PROBLEM_TYPES` that `num_labels` allows.

    Raises:
        ConfigError: it is not.
    """
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        known = ", ".join(PROBLEM_TYPES)
        raise ConfigError(f"problem_type is {problem_type!r}; expected one of {known}, or null.")
    if problem_type == "single_label_classification" and num_labels == 1:
        raise ConfigError(
            "problem_type is 'single_label_classification' and num_labels 1; a choice needs two "
            "labels. Set num_labels to 2, or problem_type to 'regression'."
        )
