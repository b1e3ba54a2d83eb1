"""docs/reference/plugins.md says what the code does, and its plug-in is one."""

import dataclasses
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from gemma_hub.backend import BuildOptions, Model, TaskSpec
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes
from gemma_hub.plugins import hookspecs
from gemma_hub.plugins.discovery import SWITCHES_VARIABLE
from gemma_hub.plugins.doctor import IMPORT_BUDGET, diagnose
from gemma_hub.plugins.guard import DEFAULT_TIMEOUT, TIMEOUT_VARIABLE
from gemma_hub.plugins.info import BackendState, PluginState
from gemma_hub.plugins.problems import Phase
from gemma_hub.plugins.registry import BACKEND_VARIABLE
from gemma_hub.plugins.spec import API_VERSION, BackendSpec, CheckpointSpec, FormatSpec

PAGE = Path(__file__).parents[2] / "docs/reference/plugins.md"

if not PAGE.exists():
    pytest.skip("the documentation is not part of this copy", allow_module_level=True)

TEXT = PAGE.read_text("utf-8")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]


def in_words(hook):
    """`name(arguments) -> Result`, as a heading of the page has it."""
    signature = inspect.signature(hook)
    result = str(signature.return_annotation).replace("collections.abc.", "")
    result = result.replace("gemma_hub.plugins.spec.", "")
    return f"{hook.__name__}({', '.join(signature.parameters)}) -> {result}"


def test_every_hook_has_a_heading_with_its_arguments():
    hooks = [
        hook for name, hook in vars(hookspecs).items() if hasattr(hook, "gemma_hub_spec")
    ]  # what pluggy's marker leaves on a function
    assert len(hooks) >= 3
    assert re.findall(r"^### `(.*)`$", section("Hooks"), re.M) == [in_words(hook) for hook in hooks]


def test_every_field_is_listed():
    fields = re.findall(r"^\| `(\w+)` \|", section("Hooks"), re.M)
    assert fields == [field.name for field in dataclasses.fields(BackendSpec)]
    for field in dataclasses.fields(CheckpointSpec):
        assert f"`{field.name}`" in section("Hooks").partition("### `gemma_hub_checkpoints")[2]
    for field in dataclasses.fields(FormatSpec):
        about = section("Hooks").partition("### `gemma_hub_checkpoint_formats")[2]
        assert f"`{field.name}`" in about
    for dtype in DTYPES:
        assert f"`{dtype}`" in section("Hooks")


def test_states_and_phases_are_listed():
    states = section("States")
    assert re.findall(r"^\| `(\w+)` \|", states, re.M) == list(get_args(BackendState))
    listed = re.search(r"A plug-in as a whole is (.*?)\. ", states, re.S)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(get_args(PluginState))
    phases = re.search(r"The phases: (.*?)\.\n", states, re.S)[1]
    assert re.findall(r"`([\w ]+)`", phases) == list(get_args(Phase))


def test_variables_and_numbers():
    variables = section("Environment variables")
    for variable in (BACKEND_VARIABLE, SWITCHES_VARIABLE, TIMEOUT_VARIABLE):
        assert f"| `{variable}` |" in variables
    assert f"seconds, `{DEFAULT_TIMEOUT:g}` if unset" in variables
    assert f"loads in under {1000 * IMPORT_BUDGET:g} ms" in TEXT
    assert f"speaks version {API_VERSION[0]}.{API_VERSION[1]} of" in TEXT


def installed(environment, title, expected):
    """The registry of an environment in which the plug-in of a section is installed."""
    files = re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", section(title), re.M | re.S)
    assert [name for name, _ in files] == expected
    for name, content in files:
        path = environment.folders[0] / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    project = tomllib.loads(files[0][1])["project"]
    ((entry, value),) = project["entry-points"]["gemma_hub"].items()
    environment.install(project["name"], "", entry=entry, value=value, version=project["version"])
    importlib.invalidate_caches()
    return environment.registry()


@pytest.fixture
def echo(environment):
    files = ["pyproject.toml", "gemma_hub_echo/plugin.py", "gemma_hub_echo/backend.py"]
    return installed(environment, "A complete plug-in", files)


@pytest.fixture
def npy(environment):
    files = ["pyproject.toml", "gemma_hub_npy/plugin.py", "gemma_hub_npy/folder.py"]
    return installed(environment, "A complete format", files)


@pytest.fixture
def config():
    return GemmaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )


@pytest.fixture
def weights(config):
    draw = np.random.default_rng(0).normal
    shapes = parameter_shapes(config).items()
    return ArrayWeights({name: draw(size=shape).astype(np.float32) for name, shape in shapes})


def test_the_plugin_of_the_page_is_healthy(echo):
    diagnosis = diagnose(echo)
    assert diagnosis.problems == ()
    assert diagnosis.is_healthy
    assert [info.name for info in diagnosis.backends] == ["echo"]


def test_the_plugin_of_the_page_runs(echo, config, weights):
    backend = echo.load("echo").backend
    model = backend.build(config, TaskSpec(), weights, BuildOptions(dtype="float32"))
    assert isinstance(model, Model)
    inputs = ModelInputs.prepare(config, [[2, 5, 7], [2, 9, 4]], logits_to_keep=2)
    logits = model.to_numpy(model.forward(inputs).logits)
    assert logits.shape == (2, 2, 12)
    assert logits.dtype == np.float32
    embeddings = weights.read("model.embed_tokens.weight")
    np.testing.assert_allclose(logits[1, 0], embeddings @ embeddings[9], rtol=1e-5)
    with pytest.raises(UnsupportedFeature, match="sequence_classification"):
        backend.build(
            config, TaskSpec("sequence_classification"), weights, BuildOptions(dtype="float32")
        )


def test_the_format_of_the_page_is_listed(npy):
    diagnosis = diagnose(npy)
    assert diagnosis.problems == ()
    assert [info.name for info in diagnosis.formats][-1] == "npy"


def test_the_format_of_the_page_brings_back_what_it_wrote(npy, config, weights, tmp_path):
    npy_format = npy.load_format("npy")
    folder = tmp_path / "written"
    folder.mkdir()
    (tmp_path / "tokenizer.model").write_bytes(b"v")
    files = {"tokenizer.model": tmp_path / "tokenizer.model"}
    source = Opened(path=tmp_path, config=config, task="causal_lm", weights=weights, files=files)
    said = []
    assert not npy_format.detect(folder)
    npy_format.write(folder, source, WriteOptions(), lambda *numbers: said.append(numbers))
    assert npy_format.detect(folder)
    assert said[-1][0] == said[-1][1]
    assert (folder / "tokenizer.model").read_bytes() == b"v"
    opened = npy_format.open(folder)
    assert opened.config.hidden_size == config.hidden_size
    assert opened.weights.names() == weights.names()
    for name in weights.names():
        np.testing.assert_array_equal(opened.weights.read(name), weights.read(name))


def test_the_format_of_the_page_refuses(npy, config, weights, tmp_path):
    npy_format = npy.load_format("npy")
    source = Opened(path=tmp_path, config=config, task="causal_lm", weights=weights)
    with pytest.raises(CheckpointError, match="no padded rows"):
        npy_format.write(tmp_path, source, WriteOptions(pad_vocab_to=64))
    npy_format.write(tmp_path, source, WriteOptions())
    np.save(tmp_path / "model.norm.weight.npy", np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match=r"holds \(3,\); the config calls for \(8,\)"):
        npy_format.open(tmp_path)
    (tmp_path / "model.norm.weight.npy").write_bytes(b"no array")
    with pytest.raises(CheckpointError, match="cannot be read"):
        npy_format.open(tmp_path)
    np.save(tmp_path / "extra.npy", np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match="extra"):
        npy_format.open(tmp_path)
