"""Damaged headers, indexes and JSON files give a GemmaHubError or what the files hold."""

import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gemma_hub.checkpoints import describe_checkpoint, open_checkpoint
from gemma_hub.errors import GemmaHubError
from gemma_hub.parameters import parameter_shapes

QUICK = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
INDEX = "model.safetensors.index.json"
ABSENT = """
    rope_parameters layer_types dtype num_labels id2label label2id problem_type classifier_dropout
    hidden_dropout
""".split()  # keys that the config.json of the fixture does not have
NUMBERS = st.integers(-2, 2**65) | st.floats() | st.booleans()
LEAVES = st.none() | NUMBERS | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def check(folder) -> bool:
    """Whether the folder opens; then it must read as the safetensors library reads it."""
    description = describe_checkpoint(folder)
    try:
        checkpoint = open_checkpoint(folder)
    except GemmaHubError:
        assert description.problems
        return False
    assert not description.problems
    stored = {
        k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()
    }
    for name, shape in parameter_shapes(checkpoint.config).items():
        array = checkpoint.weights.read(name)
        assert array.shape == shape
        assert array.dtype == stored[name].dtype
        assert array.tobytes() == stored[name].tobytes()
    return True


@pytest.fixture
def file(write, arrays):
    return write(arrays) / "model.safetensors"


@QUICK
@given(data=st.data())
def test_flipped_and_cut_bytes(file, data):
    content = bytearray(file.read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    # A new file each time: what is mapped must not be cut short under its reader.
    file.unlink()
    file.write_bytes(damaged)
    try:
        check(file.parent)
    finally:
        file.unlink()
        file.write_bytes(content)


@QUICK
@given(data=st.data())
def test_header_entries(file, data):
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    place = data.draw(st.sampled_from(["entry", "dtype", "shape", "data_offsets", "name"]))
    if place == "entry":
        header[name] = data.draw(JSON)
    elif place == "name":
        header[data.draw(st.text(max_size=8))] = header.pop(name)
    else:
        words = st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL"])
        header[name][place] = data.draw(words | st.lists(NUMBERS, max_size=3) | JSON)
    raw = json.dumps(header).encode()
    file.unlink()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])
    try:
        check(file.parent)
    finally:
        file.unlink()
        file.write_bytes(content)


@QUICK
@given(data=st.data())
def test_index_entries(sharded, data):
    path = sharded / INDEX
    content = path.read_text()
    index = json.loads(content)
    files = sorted({*index["weight_map"].values(), "../checkpoint/model.safetensors"})
    place = data.draw(st.sampled_from(["top", "map", "file", "swap", "drop"]))
    name = data.draw(st.sampled_from(sorted(index["weight_map"])))
    if place == "top":
        index = data.draw(JSON)
    elif place == "map":
        index["weight_map"] = data.draw(JSON)
    elif place == "file":
        index["weight_map"][name] = data.draw(JSON)
    elif place == "swap":
        index["weight_map"][name] = data.draw(st.sampled_from(files))
    else:
        del index["weight_map"][name]
    path.write_text(json.dumps(index))
    try:
        assert check(sharded) == (index == json.loads(content))
    finally:
        path.write_text(content)


@QUICK
@given(data=st.data())
def test_config_entries(file, data):
    path = file.with_name("config.json")
    content = path.read_text()
    config = json.loads(content)
    key = data.draw(st.sampled_from([*sorted(config), *ABSENT]))
    rope = st.fixed_dictionaries(
        {}, optional={"rope_theta": LEAVES, "factor": LEAVES, "type": LEAVES, "rope_type": LEAVES}
    )
    ids = st.sampled_from(["0", "1", "2", "x"]) | st.text(max_size=3)
    labels = st.dictionaries(ids, LEAVES) | st.dictionaries(st.text(max_size=3), st.integers(0, 3))
    config[key] = data.draw(JSON | rope | labels)
    path.write_text(json.dumps(config))
    try:
        if check(file.parent):
            checked = open_checkpoint(file.parent).config
            assert type(checked).from_dict(checked.to_dict()) == checked
            assert all(layer.rope_factor >= 1 for layer in checked.layers)
            assert np.isfinite([checked.attention_scale, checked.embedding_scale]).all()
    finally:
        path.write_text(content)


@QUICK
@given(content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_any_json_file(sharded, content):
    for name in ("config.json", "generation_config.json", INDEX):
        path = sharded / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        check(sharded)
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)
