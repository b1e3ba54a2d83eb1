"""GemmaConfig: presets, every spelling of config.json, and every wrong value by name."""

import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_hub.config import GemmaConfig, LayerSpec
from gemma_hub.config_checks import TANH_GELU
from gemma_hub.errors import CheckpointNotFoundError, ConfigError
from gemma_hub.parameters import parameter_shapes

SMALL = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def config(**changes) -> GemmaConfig:
    return GemmaConfig(**(SMALL | changes))


def read(**changes) -> GemmaConfig:
    return GemmaConfig.from_dict(SMALL | changes)


# -- presets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "eos"),
    [
        ("gemma-2b", 2_506_172_416, (1,)),
        ("gemma-2b-it", 2_506_172_416, (1, 107)),
        ("gemma-1.1-2b-it", 2_506_172_416, (1, 107)),
        ("codegemma-2b", 2_506_172_416, (1,)),
        ("codegemma-1.1-2b", 2_506_172_416, (1,)),
        ("gemma-7b", 8_537_680_896, (1,)),
        ("gemma-7b-it", 8_537_680_896, (1, 107)),
        ("gemma-1.1-7b-it", 8_537_680_896, (1, 107)),
        ("codegemma-7b", 8_537_680_896, (1,)),
        ("codegemma-7b-it", 8_537_680_896, (1, 107)),
        ("codegemma-1.1-7b-it", 8_537_680_896, (1, 107)),
    ],
)
def test_preset_has_the_published_number_of_parameters(name, parameters, eos):
    preset = GemmaConfig.preset(name)
    assert preset.num_parameters == parameters
    assert preset.eos_token_ids == eos
    assert preset.dtype == "bfloat16"


def test_presets_have_the_published_shapes():
    small, large = GemmaConfig.preset("gemma-2b"), GemmaConfig.preset("gemma-7b")
    assert (small.hidden_size, small.intermediate_size, small.num_hidden_layers) == (
        2048,
        16384,
        18,
    )
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (8, 1, 256)
    assert (large.hidden_size, large.intermediate_size, large.num_hidden_layers) == (
        3072,
        24576,
        28,
    )
    assert (large.num_attention_heads, large.num_key_value_heads, large.head_dim) == (16, 16, 256)
    for preset in (small, large):
        assert (preset.vocab_size, preset.max_position_embeddings) == (256_000, 8192)
        assert (preset.rope_theta, preset.rms_norm_eps) == (10_000.0, 1e-6)
    assert dataclasses.replace(large, dtype=None) == GemmaConfig()


def test_unknown_preset_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"no preset 'gemma-2b-instruct'.*'gemma-2b-it'.*Presets: "
    ):
        GemmaConfig.preset("gemma-2b-instruct")


# -- resolved values -------------------------------------------------------------------------------


def test_resolved_values():
    resolved = config(rope_theta=5e5, rope_scaling=LINEAR)
    assert resolved.attention_scale == 6**-0.5
    assert resolved.embedding_scale == 12**0.5
    assert resolved.rope_factor == 4.0
    assert resolved.layers == (LayerSpec(window=None, rope_theta=5e5, rope_factor=4.0),) * 3
    assert resolved.required_features == ()
    assert config(query_pre_attn_scalar=25).attention_scale == 0.2
    assert config().rope_factor == 1.0


def test_windows_are_per_layer():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    windowed = config(layer_types=types, sliding_window=5)
    assert [layer.window for layer in windowed.layers] == [5, None, 5]


@pytest.mark.parametrize(
    ("changes", "features"),
    [
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 4}, ("sliding_window",)),
        ({"layer_types": ["full_attention"] * 3, "sliding_window": 4}, ()),
        ({"attn_logit_softcapping": 50.0}, ("softcap",)),
        ({"final_logit_softcapping": 30.0}, ("softcap",)),
        ({"use_qk_norm": True}, ("qk_norm",)),
    ],
)
def test_later_generations_ask_for_features(changes, features):
    assert config(**changes).required_features == features


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (3, (3,)), ([1, 7], (1, 7)), ((1,), (1,))])
def test_eos_token_ids(eos, ids):
    assert config(eos_token_id=eos).eos_token_ids == ids


def test_config_is_a_value():
    one, other = config(rope_scaling=LINEAR), config(rope_scaling={"type": "linear", "factor": 4})
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.vocab_size = 3


CONFIGS = st.builds(
    GemmaConfig,
    vocab_size=st.integers(3, 99),
    hidden_size=st.integers(1, 30),
    intermediate_size=st.integers(1, 30),
    num_hidden_layers=st.integers(1, 4),
    num_attention_heads=st.sampled_from([4, 8]),
    num_key_value_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 6, 8]),
    rope_theta=st.floats(1, 1e6) | st.integers(1, 1000),
    rope_scaling=st.sampled_from([None, {"type": "linear", "factor": 3}, {"type": "default"}]),
    attention_bias=st.booleans(),
    tie_word_embeddings=st.booleans(),
    eos_token_id=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=3),
    dtype=st.sampled_from([None, "bfloat16", "float32"]),
    query_pre_attn_scalar=st.none() | st.integers(1, 300),
    use_qk_norm=st.booleans(),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(CONFIGS)
def test_number_of_parameters_is_that_of_the_tree(any_config):
    sizes = []
    for shape in parameter_shapes(any_config).values():
        size = 1
        for axis in shape:
            size *= axis
        sizes.append(size)
    assert any_config.num_parameters == sum(sizes)


@settings(max_examples=100, deadline=None)
@given(CONFIGS)
def test_written_config_is_read_as_the_same(any_config):
    assert GemmaConfig.from_dict(json.loads(json.dumps(any_config.to_dict()))) == any_config


# -- spellings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu", "hidden_activation": None},
        {"hidden_act": TANH_GELU},
        {"hidden_activation": TANH_GELU},
        {"hidden_act": "gelu", "hidden_activation": TANH_GELU},
        {"hidden_act": "gelu_new"},
    ],
)
def test_every_released_spelling_means_the_tanh_form(spelling):
    assert read(**spelling).hidden_activation == TANH_GELU


@pytest.mark.parametrize("key", ["hidden_act", "hidden_activation"])
@pytest.mark.parametrize("value", ["relu", "silu", 3, ["gelu"], ""])
def test_other_activations_are_refused(key, value):
    other = {"hidden_act": TANH_GELU, "hidden_activation": TANH_GELU}
    with pytest.raises(ConfigError, match=f"{key} is .*; Gemma has 'gelu_pytorch_tanh'"):
        read(**(other | {key: value}))


@pytest.mark.parametrize(
    ("spelling", "theta", "scaling"),
    [
        ({}, 10_000.0, None),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, 10_000.0, None),
        ({"rope_theta": 500_000}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, 5e5, LINEAR),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 10_000.0, LINEAR),
        ({"rope_scaling": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, **LINEAR}}, 5e5, LINEAR),
        ({"rope_parameters": LINEAR, "rope_theta": 5e5}, 5e5, LINEAR),
        ({"rope_parameters": {"rope_theta": 5e5, **LINEAR}, "rope_theta": 5e5,
          "rope_scaling": {"type": "linear", "factor": 4}}, 5e5, LINEAR),
        ({"rope_parameters": {"rope_theta": 5e5, **LINEAR}, "rope_scaling": None}, 5e5, LINEAR),
        ({"rope_parameters": {"rope_type": "default", "factor": None}}, 10_000.0, None),
    ],
)  # fmt: skip
def test_every_spelling_of_rope(spelling, theta, scaling):
    resolved = read(**spelling)
    assert resolved.rope_theta == theta
    assert resolved.rope_scaling == scaling


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
         r"rope_theta is 10000\.0 and rope_parameters\.rope_theta is 500000\.0"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "two spellings"),
        ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 8.0}}, "two spellings"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2}}, "two sp"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"},
         "dtype is 'float32' and torch_dtype is 'bfloat16'"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(spelling, message):
    with pytest.raises(ConfigError, match=message):
        read(**spelling)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "has the type 'dynamic'; expected default or linear",
        ),
        ({"rope_type": "linear"}, "has the factor None; expected a number from 1 up"),
        ({"rope_type": "linear", "factor": 0.5}, "has the factor 0.5"),
        ({"rope_type": "linear", "factor": "2"}, "has the factor '2'"),
        ({"rope_type": "linear", "factor": True}, "has the factor True"),
        ({"factor": 2.0}, "has the factor 2.0 and not the type 'linear'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "not know: partial_rotary_factor"),
        ("linear", "is 'linear'; expected an object or null"),
        ([1], r"is \[1\]; expected an object"),
        ({"full_attention": {"rope_theta": 1e6}}, "not know: full_attention"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_not_supported(key, rope, message):
    with pytest.raises(ConfigError, match=f"{key} .*{message}|{key} {message}"):
        read(**{key: rope})


@pytest.mark.parametrize(
    "spelling",
    [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"},
     {"dtype": "bfloat16", "torch_dtype": "bfloat16"}],
)  # fmt: skip
def test_every_spelling_of_dtype(spelling):
    assert read(**spelling).dtype == "bfloat16"


# -- keys ------------------------------------------------------------------------------------------


def test_unknown_keys_name_the_nearest():
    with pytest.raises(ConfigError) as caught:
        read(num_atention_heads=8, mystery=1)
    message = str(caught.value)
    assert "does not know: mystery, num_atention_heads." in message
    assert "Did you mean 'num_attention_heads'?" in message
    assert "allow_unknown" in message


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_unknown_keys_that_state_nothing_are_ignored(value):
    assert read(use_bidirectional_attention=value, pruned_heads=value) == config()


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "x", [0]])
def test_unknown_keys_that_state_something_are_refused(value):
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        read(use_bidirectional_attention=value)
    allowed = GemmaConfig.from_dict(
        SMALL | {"use_bidirectional_attention": value}, ["use_bidirectional_attention"]
    )
    assert allowed == config()


def test_config_of_gemma_1_0_on_the_hub():
    """The content of the first release's file, written by Transformers 4.38."""
    raw = {
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.1",
        "use_cache": True,
        "vocab_size": 256000,
    }
    assert GemmaConfig.from_dict(raw) == GemmaConfig.preset("gemma-2b")


@pytest.mark.parametrize("model_type", ["gemma2", "llama", None, ["gemma"], 1])
def test_other_architectures_are_refused(model_type):
    with pytest.raises(ConfigError, match=r"model_type is .*reads 'gemma'"):
        read(model_type=model_type)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 3.0, "3", None, True, 2**63, [3]])
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is .*; expected an integer of at least 1"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, "1", None, True, float("nan"), float("inf"), 10**400])
def test_positive_numbers(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is .*; expected a number above 0\\.$"):
        config(**{name: value})


@pytest.mark.parametrize(
    "name", ["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]
)
@pytest.mark.parametrize("value", [0, -1.0, "1", True, float("nan"), float("inf")])
def test_optional_positive_numbers(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is .*; expected a number above 0, or null"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["initializer_range", "attention_dropout", "rms_norm_offset"])
@pytest.mark.parametrize("value", [-0.1, "1", None, True, float("nan"), float("inf")])
def test_numbers_from_zero_up(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is .*; expected a number of at least 0"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["attention_bias", "tie_word_embeddings", "use_qk_norm"])
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_truth_values(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is .*; expected true or false"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 50, 1.0, "1", True])
def test_token_ids_are_in_the_vocabulary(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is .*; expected an id from 0 to 49, or null"):
        config(**{name: value})


@pytest.mark.parametrize("value", [[1, 50], [1, "2"], [None]])
def test_token_ids_in_a_list(value):
    with pytest.raises(ConfigError, match=r"^eos_token_id"):
        config(eos_token_id=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "must be a multiple"),
        ({"head_dim": 7}, "head_dim is 7; RoPE pairs need an even number"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers is 10001; expected at most 10000"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of bfloat16, float16"),
        ({"dtype": {"text": "float32"}}, "dtype is {"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0; expected 0 to below 1"),
        ({"sliding_window": 0, "layer_types": ["sliding_attention"] * 3}, "sliding_window is 0"),
        ({"sliding_window": 4}, "sliding_window is 4 and layer_types does not say"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window must be set"),
        ({"layer_types": ["full_attention"] * 2}, "one entry for each of the 3 layers"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; expected one entry"),
        (
            {"layer_types": ["full_attention", "global", 3]},
            "layer_types holds 'global'; expected one",
        ),
    ],
)
def test_values_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


# -- files -----------------------------------------------------------------------------------------


def test_from_pretrained_takes_a_folder_or_a_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL))
    assert GemmaConfig.from_pretrained(tmp_path) == config()
    assert GemmaConfig.from_pretrained(str(file)) == config()
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(SMALL).encode())  # as Windows editors save it
    assert GemmaConfig.from_pretrained(file) == config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "holds a JSON list; expected an object"),
        (b'{"head_dim": 2, "head_dim": 4}', "gives a key twice: head_dim"),
        (b'{"head_dim": 3}', "config.json: head_dim is 3"),
        (b'{"rms_norm_eps": NaN}', "rms_norm_eps is nan"),
    ],
)
def test_malformed_file(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        GemmaConfig.from_pretrained(tmp_path)


def test_missing_file(tmp_path):
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "nothing"):
        with pytest.raises(CheckpointNotFoundError, match=r"no config\.json at"):
            GemmaConfig.from_pretrained(path)


def test_errors_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="head_dim"):
        config(head_dim=3)
    with pytest.raises(FileNotFoundError):
        GemmaConfig.from_pretrained(tmp_path)


def test_what_to_dict_gives_away_is_a_copy():
    scaled = config(rope_scaling=LINEAR)
    scaled.to_dict()["rope_scaling"]["factor"] = 1e6
    assert scaled.rope_factor == LINEAR["factor"]
