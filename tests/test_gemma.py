"""Gemma.load and the package's public names, over a backend that needs no framework."""

import dataclasses
import importlib.metadata
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gemma_hub
from gemma_hub import gemma, source, tokenizers
from gemma_hub.backend import FEATURES
from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import (
    BackendNotFoundError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    InputError,
    NewHeadWarning,
    PluginError,
    UnsupportedFeature,
)
from gemma_hub.parameters import ArrayWeights, parameter_shapes
from gemma_hub.plugins.registry import LoadedBackend
from gemma_hub.plugins.spec import BackendSpec, CheckpointSpec

FRAMEWORKS = ("torch", "jax", "jaxlib", "flax", "transformers", "pytest", "gemma_hub_torch")


class FakeBackend:
    """Keeps what it is asked to build, and gives the weights back."""

    def __init__(self, make):
        self.make, self.built = make, []

    def devices(self):
        return ("fake:0",)

    def build(self, config, task, weights, options):
        self.built.append((config, task, weights, options))
        model = self.make(config)
        if hasattr(model, "export"):
            model.export = lambda: weights
        return model


class FakeRegistry:
    """One backend and one installed checkpoint, "small"."""

    def __init__(self, spec, backend, path):
        self.spec, self.backend, self.path = spec, backend, path

    def load(self, name=None):
        if name not in (None, "fake", "fake-dist:fake"):
            raise BackendNotFoundError(f"There is no backend {name!r}.")
        return LoadedBackend(
            name="fake",
            spec=self.spec,
            distribution="fake-dist",
            version="1.2",
            backend=self.backend,
        )

    def checkpoint(self, name):
        if name != "small":
            raise CheckpointNotFoundError(f"There is no installed checkpoint {name!r}.")
        return CheckpointSpec(name="small", path=str(self.path))


@pytest.fixture
def checkpoint(tmp_path, fake_config, tokenizer, tokenizer_model):
    """A whole checkpoint folder in bfloat16, with a vocabulary and stop ids of its own."""
    config = dataclasses.replace(fake_config, vocab_size=tokenizer.vocab_size, eos_token_id=1)
    draw = np.random.default_rng(0).normal
    arrays = {
        name: draw(size=shape).astype(gemma.DTYPES["bfloat16"])
        for name, shape in parameter_shapes(config).items()
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(tokenizer_model)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    (source / "notes.txt").write_text("not the checkpoint's")
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, config, ArrayWeights(arrays), files=sorted(source.glob("*.*o*")))
    return folder


@pytest.fixture
def install(monkeypatch, checkpoint, fake_model):
    """Make one backend the only one installed: install(make=..., features=..., dtypes=...)."""

    def install(make=lambda config: type(fake_model)(config), **spec):
        spec = {
            "features": frozenset({"cache", "export"}),
            "dtypes": ("float32", "bfloat16"),
        } | spec
        backend = FakeBackend(make)
        registry = FakeRegistry(
            BackendSpec(name="fake", api_version="1.0", factory="fake:Fake", **spec),
            backend,
            checkpoint,
        )
        for module in (gemma, source):
            monkeypatch.setattr(module, "plugin_registry", lambda: registry)
        return backend

    return install


@pytest.fixture
def backend(install):
    return install()


# -- loading ---------------------------------------------------------------------------------------


def test_a_folder_becomes_a_model_that_generates(backend, checkpoint, tokenizer):
    lm = gemma_hub.Gemma.load(checkpoint)
    assert (lm.backend.name, lm.dtype, lm.device) == ("fake", "bfloat16", "fake:0")
    assert lm.config == GemmaConfig.from_pretrained(checkpoint)
    assert lm.eos_token_ids == (1, 7, tokenizer.token_to_id("<end_of_turn>"))
    assert lm.tokenizer.vocab_size == tokenizer.vocab_size
    assert lm.generate("the king", max_new_tokens=4).text
    ((config, task, weights, options),) = backend.built
    assert (config, task.name) == (lm.config, "causal_lm")
    assert set(weights.names()) == set(parameter_shapes(config))
    assert (options.dtype, options.device, dict(options.extra)) == ("bfloat16", "auto", {})


@pytest.mark.parametrize("kind", ["path", "text", "relative", "installed"])
def test_every_way_to_name_a_checkpoint(backend, checkpoint, monkeypatch, kind):
    monkeypatch.chdir(checkpoint.parent)
    source = {
        "path": checkpoint,
        "text": str(checkpoint),
        "relative": "checkpoint",
        "installed": "small",
    }[kind]
    assert gemma_hub.Gemma.load(source).config.vocab_size == 300


def test_the_home_folder_is_expanded(backend, checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert gemma_hub.Gemma.load("~/checkpoint").config.vocab_size == 300


def test_a_folder_goes_before_an_installed_name(backend, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="empty folder"):
        gemma_hub.Gemma.load("small")


def test_options_reach_the_backend(backend, checkpoint):
    lm = gemma_hub.Gemma.load(checkpoint, "fake-dist:fake", dtype="float32", device="fake:0")
    options = backend.built[0][3]
    assert (options.dtype, options.device, lm.dtype) == ("float32", "fake:0", "float32")
    assert options.extra == {}


def test_options_of_the_backend_s_own_reach_it(backend, checkpoint):
    own = {"native": True}
    gemma_hub.Gemma.load(checkpoint, backend_options=own)
    own["native"] = False
    assert backend.built[0][3].extra == {"native": True}


@pytest.mark.parametrize("own", [["native"], "native", True, {1: True}])
def test_options_of_the_backend_s_own_have_names(backend, checkpoint, own):
    with pytest.raises(InputError, match="expected names with values"):
        gemma_hub.Gemma.load(checkpoint, backend_options=own)
    assert backend.built == []


def test_unknown_config_keys_can_be_allowed(backend, checkpoint):
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace("{", '{"flux": 3,', 1))
    with pytest.raises(ConfigError, match="flux"):
        gemma_hub.Gemma.load(checkpoint)
    gemma_hub.Gemma.load(checkpoint, allow_unknown=["flux"])


def test_a_checkpoint_without_a_vocabulary_has_no_tokenizer(backend, checkpoint):
    (checkpoint / "tokenizer.model").unlink()
    lm = gemma_hub.Gemma.load(checkpoint)
    assert lm.tokenizer is None
    assert lm.eos_token_ids == (1, 7)
    assert lm.generate(input_ids=[[2, 5]], max_new_tokens=2)[0].text == ""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("smal", "no installed checkpoint 'smal'.*no folder of that name either"),
        ("google/gemma-2b", r"no file or folder 'google/gemma-2b'.*pip install 'gemma-hub\[hub\]'"),
        ("./nothing", "no checkpoint folder at nothing"),
        ("a/b/c", "no checkpoint folder at a/b/c"),
        ("~/nothing-here", "no checkpoint folder at /.*nothing-here"),
    ],
)
def test_a_checkpoint_that_is_not_there(backend, tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # this test asks no other machine
    with pytest.raises(CheckpointNotFoundError, match=words):
        gemma_hub.Gemma.load(source)
    assert backend.built == []


def test_a_path_is_never_a_name(backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint folder"):
        gemma_hub.Gemma.load(Path("small"))


def test_a_file_is_no_checkpoint(backend, checkpoint):
    with pytest.raises(CheckpointError, match="is a file"):
        gemma_hub.Gemma.load(checkpoint / "config.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "causal-lm"}, "no task 'causal-lm'. Did you mean 'causal_lm'.*Known: causal_lm"),
        ({"task": ["causal_lm"]}, "no task .'causal_lm'."),
        ({"dtype": "bfloat"}, "no dtype 'bfloat'. Did you mean 'bfloat16'.*Known: auto, float64"),
    ],
)
def test_a_name_that_is_not_known_is_an_input_error(backend, checkpoint, arguments, words):
    with pytest.raises(InputError, match=words):
        gemma_hub.Gemma.load(checkpoint, **arguments)


def test_the_registrys_error_for_a_backend_comes_through(backend, checkpoint):
    with pytest.raises(BackendNotFoundError, match="'tensorflow'"):
        gemma_hub.Gemma.load(checkpoint, backend="tensorflow")


# -- what a backend cannot do, and what it promised ------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_dtype_that_the_backend_lacks(install, checkpoint, dtype):
    install(dtypes=("float64", "float32"))
    with pytest.raises(
        UnsupportedFeature, match=r"'fake'.*'dtype:bfloat16'. Pass dtype= one of float64, float32"
    ):
        gemma_hub.Gemma.load(checkpoint, dtype=dtype)


def test_a_feature_that_the_backend_lacks(install, checkpoint, tmp_path):
    opened = open_checkpoint(checkpoint)
    config = dataclasses.replace(opened.config, attn_logit_softcapping=50.0)
    save_checkpoint(tmp_path / "capped", config, opened.weights)
    backend = install()
    with pytest.raises(UnsupportedFeature, match="'fake' does not support 'softcap'") as caught:
        gemma_hub.Gemma.load(tmp_path / "capped")
    assert caught.value.feature in FEATURES
    assert backend.built == []
    install(features=frozenset({"softcap"}))
    gemma_hub.Gemma.load(tmp_path / "capped")


@pytest.mark.parametrize(
    ("model", "features", "words"),
    [
        (SimpleNamespace(native=1, device="x", to_numpy=id), (), "lacks forward"),
        (SimpleNamespace(forward=id), (), "lacks device, native, to_numpy"),
        ("uncached", {"cache"}, "lacks extend, init_cache, which 'cache' needs"),
        ("uncached", {"export"}, "lacks export, which 'export' needs"),
        ("uncached", {"gradients"}, "lacks loss_and_gradients, which 'gradients' needs"),
    ],
)
def test_a_model_that_breaks_its_promise_is_its_distributions_fault(
    install, checkpoint, uncached_model, model, features, words
):
    made = uncached_model if model == "uncached" else model
    install(make=lambda config: made, features=frozenset(features))
    with pytest.raises(PluginError, match=rf"'fake' \(from fake-dist 1.2\).*{words}"):
        gemma_hub.Gemma.load(checkpoint)


def test_a_backend_with_forward_alone_is_enough(install, checkpoint, uncached_model):
    install(make=type(uncached_model), features=frozenset())
    assert gemma_hub.Gemma.load(checkpoint).generate("the king", max_new_tokens=3).token_ids


# -- tasks -----------------------------------------------------------------------------------------

EVERY_TASK = ("causal_lm", "base", "sequence_classification", "token_classification")


@pytest.mark.parametrize("task", EVERY_TASK)
def test_every_task_has_a_class_of_its_own(install, checkpoint, task):
    backend = install(tasks=EVERY_TASK)
    options = {"num_labels": 3} if task.endswith("classification") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewHeadWarning)
        model = gemma_hub.Gemma.load(checkpoint, task=task, **options)
    assert type(model) is gemma.TASKS[task]
    assert model.task == task
    ((config, spec, weights, _),) = backend.built
    assert (spec.name, config) == (task, model.config)
    assert weights.names() == tuple(parameter_shapes(config, task))


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_task_that_the_backend_lacks(install, checkpoint, task):
    backend = install(tasks=tuple(other for other in EVERY_TASK if other != task))
    options = {"num_labels": 3} if task.endswith("classification") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewHeadWarning)
        with pytest.raises(UnsupportedFeature, match=f"'fake' does not support 'task:{task}'"):
            gemma_hub.Gemma.load(checkpoint, task=task, **options)
    assert backend.built == []


def test_a_new_head_is_announced_where_it_was_asked_for(install, checkpoint, tmp_path):
    backend = install(tasks=EVERY_TASK)
    names = {0: "yes", 1: "no", 2: "perhaps"}
    with pytest.warns(NewHeadWarning, match="num_labels=3") as said:
        model = gemma_hub.Gemma.load(
            checkpoint, task="sequence_classification", id2label=names, seed=5
        )
    assert [warning.filename for warning in said] == [__file__]
    assert model.config.id2label == names
    head = backend.built[0][2].read("score.weight")
    with pytest.warns(NewHeadWarning):
        expected = open_checkpoint(checkpoint, "sequence_classification", num_labels=3, seed=5)
    assert head.tobytes() == expected.weights.read("score.weight").tobytes()
    model.save(tmp_path / "saved")
    again = gemma_hub.Gemma.load(tmp_path / "saved", task="sequence_classification")
    assert again.config.id2label == names
    assert backend.built[1][2].read("score.weight").tobytes() == head.tobytes()
    other = {0: "a", 1: "b", 2: "c"}
    renamed = gemma_hub.Gemma.load(
        tmp_path / "saved", task="sequence_classification", id2label=other
    )
    assert renamed.config.id2label == other


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, CheckpointError, "Pass num_labels"),
        ({"num_labels": 2, "id2label": {0: "a", 1: "b", 2: "c"}}, InputError, "names 3 labels"),
        ({"id2label": {1: "a"}}, InputError, "id2label has the id 1"),
        ({"num_labels": -1}, InputError, "num_labels is -1"),
        ({"task": "base", "id2label": {0: "a"}}, InputError, "task 'base' has no labels"),
        ({"task": "causal_lm", "num_labels": 2}, InputError, "'causal_lm' has no labels"),
    ],
)
def test_labels_that_are_missing_or_wrong(install, checkpoint, options, error, words):
    backend = install(tasks=EVERY_TASK)
    with pytest.raises(error, match=words):
        gemma_hub.Gemma.load(checkpoint, **({"task": "token_classification"} | options))
    assert backend.built == []


# -- saving ----------------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_loaded(backend, checkpoint, tmp_path):
    lm = gemma_hub.Gemma.load(checkpoint)
    lm.save(tmp_path / "saved")
    first, second = open_checkpoint(checkpoint), open_checkpoint(tmp_path / "saved")
    assert (first.config, first.eos_token_ids) == (second.config, second.eos_token_ids)
    for name in first.weights.names():
        assert first.weights.dtype(name) == second.weights.dtype(name) == "bfloat16"
        one, other = first.weights.read(name), second.weights.read(name)
        np.testing.assert_array_equal(one.view(np.uint16), other.view(np.uint16))
    again = gemma_hub.Gemma.load(tmp_path / "saved")
    assert again.generate("the king", max_new_tokens=5) == lm.generate("the king", max_new_tokens=5)
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (tmp_path / "saved" / "notes.txt").exists()


def test_saving_over_something_has_to_be_asked_for(backend, checkpoint, tmp_path):
    lm = gemma_hub.Gemma.load(checkpoint)
    lm.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        lm.save(tmp_path / "saved")
    lm.save(tmp_path / "saved", overwrite=True)
    lm.save(checkpoint, overwrite=True)  # the files that are mapped now
    assert gemma_hub.Gemma.load(checkpoint).tokenizer is not None


# -- with the reference backend --------------------------------------------------------------------


def test_the_reference_backend_end_to_end(checkpoint, tmp_path):
    pytest.importorskip("gemma_hub_numpy")
    lm = gemma_hub.Gemma.load(checkpoint, backend="numpy", dtype="float64")
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 4, "eos_token_id": ()}
    batch = lm.generate(["the king and the queen", "a"], **settings)
    assert lm.generate("the king and the queen", **settings) == batch[0]
    assert "".join(p.text for p in lm.stream("the king and the queen", **settings)) == batch[0].text
    assert lm.forward([[2, 5, 6]]).to_numpy().logits.shape == (1, 3, 300)
    lm.save(tmp_path / "wide")
    assert open_checkpoint(tmp_path / "wide").dtype == "float64"


# -- the package -----------------------------------------------------------------------------------


def test_public_names():
    assert gemma_hub.__all__ == sorted(gemma_hub.__all__)
    assert set(gemma_hub.__all__) <= set(dir(gemma_hub))
    assert gemma_hub.GemmaConfig is GemmaConfig
    assert gemma_hub.Gemma is gemma.Gemma
    assert gemma_hub.GemmaTokenizer is tokenizers.GemmaTokenizer
    assert gemma_hub.GemmaTokenizerFast is tokenizers.GemmaTokenizerFast
    assert gemma_hub.__version__ == importlib.metadata.version("gemma-hub")
    with pytest.raises(AttributeError, match="no attribute 'GemmaTokeniser'"):
        gemma_hub.GemmaTokeniser  # noqa: B018


def test_parity_can_be_called_however_it_was_imported():
    code = "import gemma_hub{0}; from gemma_hub import parity; assert callable(gemma_hub.parity)"
    for submodule in ("", ".parity", ".parity.compare"):
        subprocess.run([sys.executable, "-c", code.format(submodule)], check=True)


@pytest.mark.parametrize("use", ["", "gemma_hub.Gemma, gemma_hub.GemmaTokenizer, gemma_hub.parity"])
def test_importing_is_light(use):
    code = f"""
import sys, time
start = time.process_time()
import gemma_hub
seconds = time.process_time() - start
{use}
loaded = sorted(set(sys.modules) & set({FRAMEWORKS!r}))
assert not loaded, loaded
assert seconds < 0.3, seconds
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
