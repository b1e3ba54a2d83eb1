"""Keras presets: which configs they can have and state, and which folders are refused."""

import dataclasses
import json
import shutil

import pytest

from gemma_hub.checkpoints.formats.interface import WriteOptions
from gemma_hub.checkpoints.formats.keras import KerasPreset
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError

h5py = pytest.importorskip("h5py", reason="presets are written with it")

KERAS = KerasPreset()
PLAIN = WriteOptions()
INDEX = "model.weights.json"
FIELDS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim
""".split()


def written(opened, folder, options=PLAIN):
    folder.mkdir()
    KERAS.write(folder, opened, options)
    return folder


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def preset(make_opened, tmp_path):
    return written(make_opened(), tmp_path / "preset")


@pytest.fixture
def sharded(make_opened, tmp_path):
    return written(make_opened(), tmp_path / "preset", WriteOptions(max_shard_bytes=6000))


# -- configs ---------------------------------------------------------------------------------------

OBJECTIONS = {
    "rope_theta is 500000": {"rope_theta": 5e5},
    "rope_scaling is set": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rms_norm_eps is 1e-05": {"rms_norm_eps": 1e-5},
    "rms_norm_offset is 0": {"rms_norm_offset": 0.0},
    "tie_word_embeddings is false": {"tie_word_embeddings": False},
    "attention_bias is true": {"attention_bias": True},
    "use_qk_norm is true": {"use_qk_norm": True},
    "query_pre_attn_scalar is 24": {"query_pre_attn_scalar": 24.0},
    "Logits are capped": {"final_logit_softcapping": 30.0},
    "sliding window": {"layer_types": ("sliding_attention",) * 3, "sliding_window": 4},
    "attention_dropout is 0.1": {"attention_dropout": 0.1},
    "There are 201 layers": {"num_hidden_layers": 201},
}


@pytest.mark.parametrize("reason", OBJECTIONS)
def test_objections(make_opened, reason, tmp_path):
    opened = make_opened()
    for task in ("causal_lm", "base"):
        assert KERAS.objections(opened.config, task, PLAIN) == ()
    config = dataclasses.replace(opened.config, **OBJECTIONS[reason])
    (sentence,) = KERAS.objections(config, "base", PLAIN)
    assert reason in sentence
    with pytest.raises(CheckpointError, match=reason):
        written(dataclasses.replace(opened, config=config), tmp_path / "preset")
    assert not list((tmp_path / "preset").iterdir())


def test_objections_to_tasks_and_options(make_opened):
    config = make_opened().config
    for task in ("sequence_classification", "token_classification"):
        assert any(task in text for text in KERAS.objections(config, task, PLAIN))
    for options in (WriteOptions(pad_vocab_to=64), WriteOptions(layout="flat")):
        (sentence,) = KERAS.objections(config, "base", options)
        assert "Leave that out" in sentence


def quantized(name):
    return {"class_name": "DTypePolicyMap", "config": {"default_policy": name}}


ARGUMENTS = {
    "does not say vocabulary_size": {"vocabulary_size": ...},
    "does not say head_dim, num_layers": {"head_dim": ..., "num_layers": ...},
    "vocab_size is -1": {"vocabulary_size": -1},
    "num_attention_heads is '4'": {"num_query_heads": "4"},
    "intermediate_dim 73": {"intermediate_dim": 73},
    "intermediate_dim '72'": {"intermediate_dim": "72"},
    "201 layers": {"num_layers": 201},
    "num_hidden_layers is 1000000000": {"num_layers": 10**9},
    "Gemma 2: it sets attention_logit_soft_cap": {"attention_logit_soft_cap": 50},
    "Gemma 2: it sets final_logit_soft_cap": {"final_logit_soft_cap": 30.0},
    "Gemma 2: it sets use_post_ffw_norm": {"use_post_ffw_norm": True},
    "Gemma 2: it sets use_post_attention_norm": {"use_post_attention_norm": True},
    "Gemma 2: it sets use_sliding_window_attention": {"use_sliding_window_attention": True},
    "layer_norm_epsilon 1e-05": {"layer_norm_epsilon": 1e-5},
    "dropout 'x'": {"dropout": "x"},
    "does not know: num_experts": {"num_experts": 8},
    "Did you mean 'head_dim'": {"heads_dim": 8},
    "policy 'DTypePolicyMap'": {"dtype": quantized(None)},
    "policy 'int8_from_float32'": {"dtype": "int8_from_float32"},
    "policy 7": {"dtype": 7},
}


@pytest.mark.parametrize("reason", ARGUMENTS)
def test_arguments_that_no_first_generation_gemma_has(preset, reason):
    def change(content):
        content["config"] |= ARGUMENTS[reason]
        content["config"] = {k: v for k, v in content["config"].items() if v is not ...}

    (preset / "metadata.json").unlink()
    change_json(preset / "config.json", change)
    with pytest.raises(CheckpointError, match=f"config.json.*{reason}"):
        KERAS.open(preset)


def test_another_scale_is_refused_and_the_same_one_is_not(make_opened, tmp_path):
    """Keras's other scale is that of hidden_dim // num_query_heads."""
    for shape in ("gqa", "narrow"):
        folder = written(make_opened(shape), tmp_path / shape)
        change_json(
            folder / "config.json", lambda c: c["config"].update(query_head_dim_normalize=False)
        )
    KERAS.open(tmp_path / "gqa")
    with pytest.raises(CheckpointError, match=r"config\.json has query_head_dim_normalize false"):
        KERAS.open(tmp_path / "narrow")


def test_dtype_policies(preset):
    (preset / "metadata.json").unlink()
    policies = {
        "float16": "float16", "mixed_bfloat16": "float32", None: None,
    }  # fmt: skip
    for policy, dtype in policies.items():
        for stated in (policy, {"class_name": "DTypePolicy", "config": {"name": policy}}):
            if policy is None and stated is not None:
                continue
            change_json(
                preset / "config.json", lambda c, stated=stated: c["config"].update(dtype=stated)
            )
            assert KERAS.open(preset).config.dtype == dtype


def test_older_presets_say_less(preset, assert_same, make_opened):
    """Keras NLP had another module, no later arguments and no metadata."""

    def change(content):
        kept = ["name", "vocabulary_size", "num_layers", "num_query_heads", "num_key_value_heads"]
        kept += ["hidden_dim", "intermediate_dim", "head_dim", "layer_norm_epsilon", "dropout"]
        content["config"] = {key: content["config"][key] for key in kept}
        content["module"] = "keras_nlp.src.models.gemma.gemma_backbone"
        content["registered_name"] = "keras_nlp>GemmaBackbone"

    (preset / "metadata.json").unlink()
    change_json(preset / "config.json", change)
    opened = KERAS.open(preset)
    assert opened.config == GemmaConfig(
        **{field: getattr(make_opened().config, field) for field in FIELDS}
    )
    assert_same(opened.weights, make_opened().weights)


def test_dropout_is_noted(preset):
    (preset / "metadata.json").unlink()
    change_json(preset / "config.json", lambda c: c["config"].update(dropout=0.1))
    note, _ = KERAS.open(preset).notes
    assert "dropout 0.1" in note


@pytest.mark.parametrize("content", ["[]", "{}", '{"class_name": "Gemma3Backbone"}', "{", ""])
def test_configs_of_something_else(preset, content):
    (preset / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        KERAS.open(preset)


def test_a_config_is_needed(preset, make_opened, assert_same):
    (preset / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json.*pass the model's config"):
        KERAS.open(preset)
    assert_same(KERAS.open(preset, make_opened().config).weights, make_opened().weights)


OURS = {
    "model_type is 'gemma2'": lambda ours: ours.update(config={"model_type": "gemma2"}),
    "can be read .'config'": lambda ours: ours.clear(),
    "head_dim is 8 there": lambda ours: ours["config"].update(head_dim=8),
    "rope_theta is 5": lambda ours: ours["config"].update(rope_theta=5),
    "the architectures are": lambda ours: ours["config"].update(architectures=["GemmaForX"]),
}


@pytest.mark.parametrize("reason", OURS)
def test_what_we_left_in_the_metadata_has_to_fit(preset, reason):
    change_json(preset / "metadata.json", lambda content: OURS[reason](content["gemma_hub"]))
    with pytest.raises(CheckpointError, match=rf"metadata\.json has.*{reason}.*Remove that key"):
        KERAS.open(preset)


def test_tensors_that_do_not_fit_are_named(preset):
    (preset / "metadata.json").unlink()
    change_json(preset / "config.json", lambda c: c["config"].update(intermediate_dim=96))
    with pytest.raises(
        CheckpointError, match=r"gating_ffw/vars/0 is \(24, 40\), expected \(24, 48"
    ):
        KERAS.open(preset)


def test_a_head_s_weights_are_not_left_alone(preset):
    shutil.copy(preset / "model.weights.h5", preset / "task.weights.h5")
    with pytest.raises(CheckpointError, match=r"task\.weights\.h5"):
        KERAS.open(preset)


# -- the folder ------------------------------------------------------------------------------------

NORM = "/layers/rms_normalization/vars"
INDEXES = {
    "plain": lambda places: places.update({NORM: "../model_00000.weights.h5"}),
    "'/model_00000": lambda places: places.update({NORM: "/model_00000.weights.h5"}),
    "in 7": lambda places: places.update({NORM: 7}),
    r"in \[\]": lambda places: places.update({NORM: []}),
    "in 'x.weights.h5'": lambda places: places.update({NORM: "x.weights.h5"}),
    r"Missing \(1\): model_00099": lambda places: places.update({NORM: "model_00099.weights.h5"}),
    "In no file": lambda places: places.update({"/layers/x/vars": places[NORM]}),
    "Not where the index says.*vars/0": lambda places: places.pop(NORM),
    "Not where the index says.*rms": lambda places: places.update({NORM: "model_00000.weights.h5"}),
    "no weight_map": lambda places: places.clear(),
}


@pytest.mark.parametrize("reason", INDEXES)
def test_wrong_indexes(sharded, reason):
    change_json(sharded / INDEX, lambda index: INDEXES[reason](index["weight_map"]))
    reason = "expected a name such as" if reason == "plain" else reason
    with pytest.raises(CheckpointError, match=f"(?s){INDEX}.*{reason}"):
        KERAS.open(sharded)


def test_a_list_of_files_is_read(sharded, make_opened, assert_same):
    """Keras writes one for a layer whose variables are in two files."""

    def change(index):
        for group, name in index["weight_map"].items():
            index["weight_map"][group] = [name, "model_00000.weights.h5"]

    change_json(sharded / INDEX, change)
    assert_same(KERAS.open(sharded).weights, make_opened().weights)


def test_a_shard_is_missing_or_left_over(sharded):
    shard = sharded / "model_00001.weights.h5"
    extra = sharded / "model_00077.weights.h5"
    shutil.copy(shard, extra)
    with pytest.raises(CheckpointError, match=r"not in the index \(1\): model_00077"):
        KERAS.open(sharded)
    extra.rename(sharded / "model.weights.h5")
    with pytest.raises(CheckpointError, match=r"has both model\.weights\.h5 and model"):
        KERAS.open(sharded)
    (sharded / "model.weights.h5").unlink()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"Missing \(1\): model_00001"):
        KERAS.open(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointNotFoundError, match="has neither"):
        KERAS.open(sharded)


def test_a_variable_in_two_files(sharded):
    places = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(name for name in places.values() if name != places[NORM])
    with h5py.File(sharded / places[NORM]) as one, h5py.File(sharded / other, "a") as two:
        two[f"{NORM}/0"] = one[f"{NORM}/0"][()]

    def change(index):
        index["weight_map"][NORM] = [places[NORM], other]

    change_json(sharded / INDEX, change)
    with pytest.raises(CheckpointError, match=r"In more than one file \(1\): layers/rms"):
        KERAS.open(sharded)


def test_links_into_a_cache_are_read(make_opened, sharded, assert_same):
    for file in list(sharded.glob("*.h5")):
        blob = sharded.parent / f"blob-{file.name}"
        file.rename(blob)
        file.symlink_to(blob)
    assert_same(KERAS.open(sharded).weights, make_opened().weights)


def test_other_paths_are_refused(preset):
    with pytest.raises(CheckpointNotFoundError, match="no Keras preset at"):
        KERAS.open(preset / "nothing")
    with pytest.raises(CheckpointError, match="is a file; a Keras preset is a folder"):
        KERAS.open(preset / "model.weights.h5")
