"""Building: whose memory the parameters are in, what is made anew, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.errors import InputError, PluginError, UnsupportedFeature
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub_transformers import module
from gemma_hub_transformers.backend import TransformersBackend

TASKS = {
    "base": transformers.GemmaModel,
    "causal_lm": transformers.GemmaForCausalLM,
    "sequence_classification": transformers.GemmaForSequenceClassification,
    "token_classification": transformers.GemmaForTokenClassification,
}


@pytest.mark.parametrize("task", TASKS)
def test_parameters_are_those_of_the_weights_and_none_is_copied(task, build, config, weights):
    given = weights(config(), task)
    model = build(task=task, weights=given)
    assert type(model.native) is TASKS[task]
    assert not model.native.training
    prefix = "model." if task == "base" else ""
    parameters = {prefix + name: p for name, p in model.native.named_parameters()}
    assert set(parameters) == set(parameter_shapes(config(), task))
    for name, parameter in parameters.items():
        assert parameter.data_ptr() == given.read(name).ctypes.data, name
        assert parameter.requires_grad


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(build, config):
    tied = build().native
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = build(config=config(tie_word_embeddings=False)).native
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.5}])
def test_values_that_no_checkpoint_has_are_those_of_a_model_made_whole(scaling, build, config):
    changed = config(rope_scaling=scaling)
    found = dict(build(config=changed).native.named_buffers())
    whole = transformers.GemmaForCausalLM(
        module.transformers_config(changed, "causal_lm", "float32")
    )
    expected = dict(whole.named_buffers())
    assert found.keys() == expected.keys()
    assert any("inv_freq" in name for name in found)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert "inv_freq" not in str(list(build().native.state_dict()))


def test_the_config_that_was_given_stays_as_it_is(build, config):
    given = config(rope_scaling={"rope_type": "linear", "factor": 2.5})
    build(config=given)
    assert given == config(rope_scaling={"rope_type": "linear", "factor": 2.5})
    assert given.rope_scaling == {"rope_type": "linear", "factor": 2.5}


def test_a_value_that_is_not_made_is_a_typed_error(build, monkeypatch):
    monkeypatch.setattr(module, "_without_layers", lambda config: torch.nn.Module())
    with pytest.raises(PluginError, match=r"does not make.*inv_freq.*Install an older"):
        build()


def test_building_leaves_the_random_numbers_alone(build):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("task", TASKS)
def test_export_is_bit_equal(task, dtype, build, config, weights):
    given = weights(config(), task, dtype)
    exported = build(task=task, dtype=dtype, weights=given).export()
    assert exported.names() == tuple(parameter_shapes(config(), task))
    for name in exported.names():
        assert exported.dtype(name) == dtype
        assert exported.read(name).tobytes() == given.read(name).tobytes()


def test_other_types_are_rounded_once(build, config, weights):
    model = build(dtype="bfloat16", weights=weights(config()))
    assert {p.dtype for p in model.native.parameters()} == {torch.bfloat16}
    rounded = torch.tensor(weights(config()).read("model.norm.weight")).to(torch.bfloat16)
    assert torch.equal(model.native.model.norm.weight.data, rounded)


def test_weights_that_may_not_be_written_to_are_copied(build, config, weights):
    arrays = {name: weights(config()).read(name) for name in parameter_shapes(config())}
    arrays["model.norm.weight"].setflags(write=False)
    model = build(weights=ArrayWeights(arrays))
    with torch.no_grad():
        model.native.model.norm.weight.fill_(7.0)
    assert not np.any(arrays["model.norm.weight"] == 7.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_offset": 0.0}, "'rms_norm_offset'. Transformers adds 1"),
        ({"query_pre_attn_scalar": 20.0}, r"'query_pre_attn_scalar'.*head_dim \*\* -0.5"),
        ({"final_logit_softcapping": 30.0}, "'softcap'. It runs first-generation Gemma"),
    ],
)
def test_what_transformers_would_ignore_is_refused(changes, message, build, config):
    with pytest.raises(UnsupportedFeature, match=message):
        build(config=config(**changes))


def test_a_scale_that_is_the_default_is_not_refused(build, config):
    build(config=config(query_pre_attn_scalar=8.0))


@pytest.mark.parametrize(
    ("task", "options", "error", "message"),
    [
        ("tagging", {}, UnsupportedFeature, "'task:tagging'. It has base, causal_lm"),
        ("base", {"dtype": "float64"}, InputError, "dtype is 'float64'.*has float32, bfloat16"),
        ("base", {"device": "abacus"}, InputError, "device is 'abacus'; this machine has .*cpu"),
        ("base", {"extra": {"sdpa": 1}}, InputError, "has no options; got sdpa"),
    ],
)
def test_wrong_requests(task, options, error, message, config, weights):
    with pytest.raises(error, match=message):
        TransformersBackend().build(
            config(),
            TaskSpec(task),
            weights(config()),
            BuildOptions(**{"dtype": "float32"} | options),
        )


def test_the_entry_point_is_light():
    code = (
        "import sys; from gemma_hub_transformers import plugin; "
        "(spec,) = plugin.gemma_hub_backends(); assert spec.name == 'transformers'; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
