"""open_checkpoint reads what is right, bit by bit, and names everything that is wrong."""

import dataclasses
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_hub.checkpoints import open_checkpoint
from gemma_hub.errors import CheckpointError, ConfigError
from gemma_hub.parameters import DTYPES, parameter_shapes

EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


def same(checkpoint, arrays) -> bool:
    """Whether the weights are `arrays`, bit for bit."""
    read = {name: checkpoint.weights.read(name) for name in checkpoint.weights.names()}
    return read.keys() == arrays.keys() and all(
        read[name].dtype == array.dtype and read[name].tobytes() == array.tobytes()
        for name, array in arrays.items()
    )


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_file_is_read_bit_by_bit(write, make_arrays, dtype):
    arrays = make_arrays(dtype)
    checkpoint = open_checkpoint(write(arrays))
    assert same(checkpoint, arrays)
    assert checkpoint.dtype == dtype
    assert {checkpoint.weights.dtype(name) for name in arrays} == {dtype}


def test_shards_are_read_bit_by_bit(sharded, arrays, config):
    checkpoint = open_checkpoint(str(sharded))
    assert same(checkpoint, arrays)
    assert checkpoint.config == config
    assert checkpoint.weights.names() == tuple(parameter_shapes(config))
    assert checkpoint.weights.shape(Q_PROJ) == (32, 12)


def test_slices_are_read(sharded, arrays):
    weights = open_checkpoint(sharded).weights
    for index in (slice(3, 17, 4), (slice(None), slice(2, 5)), (5, slice(None)), 7, (0, 1)):
        part = weights.read(Q_PROJ, index)
        assert isinstance(part, np.ndarray)
        assert part.tobytes() == arrays[Q_PROJ][index].tobytes()


def test_arrays_are_views_of_the_file(write, arrays):
    weights = open_checkpoint(write(arrays)).weights
    assert np.shares_memory(weights.read(Q_PROJ), weights.read(Q_PROJ, slice(3, 4)))


def test_arrays_are_writable_and_the_file_does_not_change(write, arrays):
    folder = write(arrays)
    before = (folder / "model.safetensors").read_bytes()
    array = open_checkpoint(folder).weights.read(Q_PROJ)
    array[:] = 0
    assert not array.any()
    assert (folder / "model.safetensors").read_bytes() == before
    assert same(open_checkpoint(folder), arrays)


def test_arrays_outlive_the_file_and_the_checkpoint(write, arrays):
    folder = write(arrays)
    array = open_checkpoint(folder).weights.read(Q_PROJ)
    (folder / "model.safetensors").unlink()
    assert array.tobytes() == arrays[Q_PROJ].tobytes()


def test_tensor_off_its_alignment_is_read(write, make_arrays):
    arrays = make_arrays("float32")
    folder = write(arrays)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length] + b" " * (-length % 8 + 3)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    checkpoint = open_checkpoint(folder)
    assert same(checkpoint, arrays)
    part = checkpoint.weights.read(Q_PROJ, slice(1, 3))
    assert part.flags.aligned
    assert part.tobytes() == arrays[Q_PROJ][1:3].tobytes()


def test_names_without_the_model_prefix(write, arrays):
    bare = {name.removeprefix("model."): array for name, array in arrays.items()}
    assert same(open_checkpoint(write(bare)), arrays)


def test_one_tensor_under_both_names_is_refused(write, arrays):
    both = arrays | {"norm.weight": arrays["model.norm.weight"]}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*Keep one of them"):
        open_checkpoint(write(both))


def test_stored_constants_are_ignored(write, arrays):
    constants = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.embed_tokens.embed_scale": np.ones((), np.float32),
    }
    assert same(open_checkpoint(write(arrays | constants)), arrays)


def test_float32_norms_beside_bfloat16_matrices(write, arrays):
    mixed = {n: a.astype(np.float32) if "norm" in n else a for n, a in arrays.items()}
    checkpoint = open_checkpoint(write(mixed))
    assert same(checkpoint, mixed)
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.weights.dtype("model.norm.weight") == "float32"


def test_links_to_the_files_are_followed(sharded, arrays):
    """The Hub's cache is folders of links."""
    linked = sharded.with_name("linked")
    linked.mkdir()
    for file in sharded.iterdir():
        (linked / file.name).symlink_to(file)
    assert same(open_checkpoint(linked), arrays)


def test_index_may_name_a_single_file(write, arrays):
    folder = write(arrays)
    places = dict.fromkeys(arrays, "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    assert same(open_checkpoint(folder), arrays)


def test_unknown_name_in_the_weights(write, arrays):
    weights = open_checkpoint(write(arrays)).weights
    for read in (weights.read, weights.shape, weights.dtype):
        with pytest.raises(
            CheckpointError, match=r"no parameter 'model\.norm'.*'model\.norm\.weight'"
        ):
            read("model.norm")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps_rollup")
def test_opening_takes_no_private_memory(write, make_arrays, config):
    big = dataclasses.replace(config, vocab_size=50_000, hidden_size=1024)
    shapes = parameter_shapes(big)
    folder = write(
        {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}, config=big
    )
    assert (folder / "model.safetensors").stat().st_size > 200_000_000

    def private() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("Anonymous:"))

    before = private()
    weights = open_checkpoint(folder).weights
    assert private() - before < 20_000_000
    assert all((weights.read(name) == 0.5).all() for name in weights.names())
    assert private() - before < 20_000_000
    copies = [weights.read(name).copy() for name in weights.names()]  # what the test must see
    assert private() - before > 200_000_000
    assert len(copies) == len(shapes)


# -- tied head -------------------------------------------------------------------------------------


def test_stored_head_equal_to_the_embedding(write, arrays):
    assert same(open_checkpoint(write(arrays | {"lm_head.weight": arrays[EMBEDDING]})), arrays)


def test_stored_head_that_differs_in_one_bit(write, arrays):
    head = arrays[EMBEDDING].copy()
    head.view(np.uint16)[-1, -1] ^= 1
    with pytest.raises(
        CheckpointError, match=r"Not equal to the embedding.*\n.*tie_word_embeddings"
    ):
        open_checkpoint(write(arrays | {"lm_head.weight": head}))


def test_stored_head_of_another_shape(write, arrays):
    head = arrays[EMBEDDING][:-1].copy()
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight is \(22, 12\), expected \(23, 12\)"
    ):
        open_checkpoint(write(arrays | {"lm_head.weight": head}))


def test_stored_head_of_another_type(write, arrays):
    head = arrays[EMBEDDING].astype(np.float32)
    with pytest.raises(CheckpointError, match="Not equal to the embedding"):
        open_checkpoint(write(arrays | {"lm_head.weight": head}))


def test_tied_array_stored_as_the_head_only(write, arrays):
    stored = {n.replace(EMBEDDING, "lm_head.weight"): a for n, a in arrays.items()}
    assert same(open_checkpoint(write(stored)), arrays)


def test_head_of_its_own(write, make_arrays, config):
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    arrays = make_arrays("float16", untied)
    assert arrays["lm_head.weight"].tobytes() != arrays[EMBEDDING].tobytes()
    assert same(open_checkpoint(write(arrays, config=untied)), arrays)


def test_missing_head_of_its_own(write, arrays, config):
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    with pytest.raises(
        CheckpointError, match=r"Missing \(1\): lm_head.*\n.*tie_word_embeddings to true"
    ):
        open_checkpoint(write(arrays, config=untied))


# -- tensors that do not fit the config ------------------------------------------------------------


def test_missing_unexpected_and_misshapen_are_listed_apart(write, arrays):
    del arrays["model.norm.weight"]
    arrays["model.layers.1.mlp.gate.weight"] = np.ones((2, 2), np.float32)
    arrays[Q_PROJ] = arrays[Q_PROJ][:8].copy()
    arrays["model.layers.1.mlp.up_proj.weight"] = np.ones((20, 12), np.int8)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(arrays))
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  Missing (1): model.norm.weight.",
        "  Unexpected (1): model.layers.1.mlp.gate.weight.",
        f"  Misshapen (1): {Q_PROJ} is (8, 12), expected (32, 12) from num_attention_heads=4, "
        "head_dim=8, hidden_size=12.",
        "  Not of a type that is read (BF16, F16, F32, F64) (1): "
        "model.layers.1.mlp.up_proj.weight is I8.",
        "  Check that config.json and the weights belong to the same model.",
    ]


def test_first_ten_and_a_count(write, arrays, config):
    deeper = dataclasses.replace(config, num_hidden_layers=4)
    with pytest.raises(
        CheckpointError, match=r"Missing \(18\): model\.layers\.2\.inp.* and 8 more\."
    ):
        open_checkpoint(write(arrays, config=deeper))


def test_unknown_tensors_and_keys_can_be_allowed(write, arrays, config):
    extra = arrays | {"value.weight": np.ones((3, 12), np.float32)}
    folder = write(extra, config=config.to_dict() | {"new_key": 7})
    with pytest.raises(ConfigError, match="new_key"):
        open_checkpoint(folder)
    with pytest.raises(
        CheckpointError, match=r"Unexpected \(1\): value\.weight.*\n.*allow_unknown"
    ):
        open_checkpoint(folder, allow_unknown=["new_key"])
    assert same(open_checkpoint(folder, allow_unknown=["new_key", "value.weight"]), arrays)


def test_transposed_matrix_is_misshapen(write, arrays):
    arrays[Q_PROJ] = np.ascontiguousarray(arrays[Q_PROJ].T)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \(12, 32\), expected \(32, 12\)"):
        open_checkpoint(write(arrays))


# -- generation_config.json ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"eos_token_id": 7}', (7,)),
        ('{"eos_token_id": [1, 7]}', (1, 7)),
        ('{"eos_token_id": null}', (1,)),
        ('{"eos_token_id": []}', (1,)),
        ("{}", (1,)),
        (None, (1,)),
    ],
)
def test_eos_token_ids(write, arrays, content, expected):
    folder = write(arrays)
    if content is not None:
        (folder / "generation_config.json").write_text(content)
    assert open_checkpoint(folder).eos_token_ids == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": "1"}', "eos_token_id is '1'; expected an id from 0 to 22"),
        ('{"eos_token_id": [1, 23]}', r"eos_token_id is \[1, 23\]"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
        ('{"eos_token_id": -1}', "eos_token_id is -1"),
        ("{", "generation_config.json is not valid JSON"),
        ("[]", "holds a JSON list"),
    ],
)
def test_malformed_generation_config(write, arrays, content, message):
    folder = write(arrays)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
