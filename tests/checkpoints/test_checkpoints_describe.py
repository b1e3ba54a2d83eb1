"""describe_checkpoint shows what is there and what is wrong, and never raises."""

import dataclasses
import json

import numpy as np
from safetensors.numpy import save_file

from gemma_hub.checkpoints import FileDescription, TensorDescription, describe_checkpoint

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def test_sound_checkpoint(write, arrays, config):
    folder = write(arrays | {"lm_head.weight": arrays[EMBEDDING]})
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    description = describe_checkpoint(folder)
    assert description.problems == ()
    assert description.path == str(folder)
    assert description.config == config.to_dict()
    assert description.num_parameters == config.num_parameters
    assert description.dtype == "bfloat16"
    assert description.eos_token_ids == (1, 7)
    assert [tensor.name for tensor in description.tensors] == sorted([*arrays, "lm_head.weight"])
    assert description.tensors[-1] == TensorDescription(
        NORM, (12,), "bfloat16", 24, "model.safetensors"
    )
    size = (folder / "model.safetensors").stat().st_size
    assert FileDescription("model.safetensors", size) in description.files
    assert [file.name for file in description.files] == sorted(p.name for p in folder.iterdir())


def test_description_is_json(sharded):
    description = describe_checkpoint(sharded)
    table = json.loads(json.dumps(description.to_dict()))
    assert table["tensors"][0]["shape"] == [23, 12]
    assert table["tensors"][0]["file"] == "model-00001-of-00003.safetensors"
    assert table.keys() == {field.name for field in dataclasses.fields(description)}


def test_every_problem_is_a_line(sharded, arrays):
    (sharded / "config.json").write_text("{")
    (sharded / "model-00002-of-00003.safetensors").write_bytes(b"cut")
    description = describe_checkpoint(sharded)
    assert len(description.problems) == 2
    assert "config.json is not valid JSON" in description.problems[0]
    assert "00002-of-00003.safetensors is not a complete" in description.problems[1]
    assert description.config is None
    assert {tensor.file for tensor in description.tensors} == {
        "model-00001-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    }


def test_damaged_index_leaves_the_tensors_visible(sharded, arrays):
    (sharded / "model.safetensors.index.json").write_text("[]")
    description = describe_checkpoint(sharded)
    assert len(description.problems) == 1
    assert len(description.tensors) == len(arrays)
    assert description.config is not None


def test_tensors_that_do_not_fit(write, arrays):
    del arrays[NORM]
    arrays["extra"] = np.ones(3, np.int64)
    description = describe_checkpoint(write(arrays))
    assert len(description.problems) == 1
    assert "Missing (1): model.norm.weight" in description.problems[0]
    assert "Unexpected (1): extra" in description.problems[0]
    assert ("extra", "I64") in {(tensor.name, tensor.dtype) for tensor in description.tensors}


def test_prefix_conflict_and_stale_index(sharded, arrays):
    save_file(
        {NORM: arrays[NORM], "norm.weight": arrays[NORM]},
        sharded / "model-00003-of-00003.safetensors",
    )
    description = describe_checkpoint(sharded)
    assert "Not in the index (1): norm.weight" in description.problems[0]
    assert "without its prefix" in description.problems[1]


def test_nothing_there(tmp_path):
    description = describe_checkpoint(tmp_path / "nothing")
    assert "no checkpoint folder" in description.problems[0]
    description = describe_checkpoint(tmp_path)
    assert "is an empty folder" in description.problems[0]
    assert "no config.json" in description.problems[1]
    assert (description.dtype, description.num_parameters, description.tensors) == (None, 0, ())


def test_malformed_generation_config(write, arrays):
    folder = write(arrays)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    description = describe_checkpoint(folder)
    assert "eos_token_id is 'x'" in description.problems[0]
    assert description.eos_token_ids == ()
