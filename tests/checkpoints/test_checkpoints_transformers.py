"""Transformers reads what we write, and we read what it writes, bit by bit."""

import json
import warnings

import numpy as np
import pytest

from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import ArrayWeights, parameter_shapes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
SHAPES = {
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mha": {"num_attention_heads": 3, "num_key_value_heads": 3},
}


def transformers_model(dtype="float32", **changes):
    sizes = {
        "vocab_size": 23,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        **SHAPES["gqa"],
    }
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**{**sizes, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.to(TORCH_DTYPES[dtype])


def bits(array) -> bytes:
    tensor = array if torch.is_tensor(array) else torch.from_numpy(array.view(f"u{array.itemsize}"))
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same(weights, model) -> None:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    assert set(weights.names()) == set(state)
    for name, tensor in state.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert bits(weights.read(name)) == bits(tensor)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_single_file_by_transformers(tmp_path, dtype, shape):
    model = transformers_model(dtype, **SHAPES[shape])
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint.weights, model)
    assert checkpoint.dtype == dtype == checkpoint.config.dtype
    assert checkpoint.eos_token_ids == (1,)


def test_shards_by_transformers(tmp_path):
    model = transformers_model("bfloat16")
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(open_checkpoint(tmp_path).weights, model)


def test_biases_and_a_head_of_its_own(tmp_path):
    model = transformers_model(attention_bias=True, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.attention_bias
    assert_same(checkpoint.weights, model)


def test_base_model_without_the_prefix(tmp_path):
    model = transformers_model()
    model.model.save_pretrained(tmp_path)
    assert_same(open_checkpoint(tmp_path).weights, model)


def test_config_by_transformers(tmp_path):
    raw = transformers.GemmaConfig(
        vocab_size=500,
        rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
        rms_norm_eps=3e-6,
        eos_token_id=[1, 107],
        bos_token_id=None,
        hidden_act="gelu_pytorch_tanh",
        num_labels=5,
        use_cache=False,
    )
    for use_diff in (True, False):
        raw.to_json_file(tmp_path / "config.json", use_diff=use_diff)
        config = GemmaConfig.from_pretrained(tmp_path)
        assert config == GemmaConfig(
            vocab_size=500,
            rope_theta=5e5,
            rope_scaling={"rope_type": "linear", "factor": 4.0},
            rms_norm_eps=3e-6,
            eos_token_id=(1, 107),
            bos_token_id=None,
            num_labels=5,
        )


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 2000])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_transformers_reads_what_we_write(tmp_path, dtype, max_shard_bytes):
    model = transformers_model(dtype)
    model.save_pretrained(tmp_path / "theirs")
    theirs = open_checkpoint(tmp_path / "theirs")
    save_checkpoint(
        tmp_path / "ours", theirs.config, theirs.weights, max_shard_bytes=max_shard_bytes
    )
    again, info = transformers.GemmaForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values())
    assert again.dtype == TORCH_DTYPES[dtype]
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(bits(tensor) == bits(state[name]) for name, tensor in again.state_dict().items())
    ids = torch.tensor([[2, 5, 9]])
    # Not `model`: its rotary constants were rounded by `to`, those of a loaded model are not.
    loaded = transformers.GemmaForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_transformers_reads_our_config(tmp_path):
    config = GemmaConfig(
        vocab_size=500,
        hidden_size=96,
        rope_theta=5e5,
        rope_scaling={"type": "linear", "factor": 4},
        rms_norm_eps=3e-6,
        eos_token_id=(1, 107),
        pad_token_id=None,
        attention_dropout=0,
        dtype="float16",
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.GemmaConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters == {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    assert theirs.hidden_act == "gelu_pytorch_tanh"
    assert theirs.eos_token_id == [1, 107]
    assert theirs.pad_token_id is None
    assert theirs.dtype == torch.float16
    theirs.to_json_file(tmp_path / "config.json")
    assert GemmaConfig.from_pretrained(tmp_path) == config


def test_weights_become_tensors_without_a_copy_or_a_warning(tmp_path):
    config = GemmaConfig(
        vocab_size=11,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
    )
    shapes = parameter_shapes(config)
    arrays = {name: np.full(shape, 2, np.float32) for name, shape in shapes.items()}
    save_checkpoint(tmp_path / "out", config, ArrayWeights(arrays))
    array = open_checkpoint(tmp_path / "out").weights.read("model.embed_tokens.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = torch.from_numpy(array)
    assert tensor.data_ptr() == array.ctypes.data
    tensor[0, 0] = 7
    assert array[0, 0] == 7
    assert open_checkpoint(tmp_path / "out").weights.read("model.embed_tokens.weight")[0, 0] == 2


def test_generation_config_survives_both_ways(tmp_path):
    model = transformers_model("bfloat16")
    model.generation_config.eos_token_id = [1, 7]
    model.generation_config.do_sample, model.generation_config.top_k = True, 64
    model.save_pretrained(tmp_path / "theirs")
    theirs = open_checkpoint(tmp_path / "theirs")
    assert theirs.config.eos_token_ids == (1,)
    assert theirs.eos_token_ids == (1, 7)
    save_checkpoint(
        tmp_path / "ours",
        theirs.config,
        theirs.weights,
        files=[tmp_path / "theirs" / "generation_config.json"],
    )
    again = transformers.GemmaForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.generation_config.eos_token_id == [1, 7]
    assert again.generation_config.top_k == 64
