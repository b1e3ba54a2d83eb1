"""Runs `gemma-hub` in this process, with plug-ins and models that need no framework."""

import importlib.metadata
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from gemma_hub.cli.app import app
from gemma_hub.outputs import Generation, TextPiece
from gemma_hub.plugins import registry as registry_module
from gemma_hub.plugins.registry import PluginRegistry

PIECES = ("A fox", " ran", " \u00fcber\n", "the hill.")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("GEMMA_HUB_BACKEND", "GEMMA_HUB_PLUGINS", "FORCE_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cli():
    """`cli("backends", "--json")` gives the result: exit_code, stdout, stderr."""

    def invoke(*arguments: str, **options: Any) -> Any:
        result = CliRunner().invoke(app, list(arguments), prog_name="gemma-hub", **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """`plugins(name="source of its module")` makes these the only installed plug-ins."""

    def install(**sources: str) -> PluginRegistry:
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        monkeypatch.syspath_prepend(str(folder))
        entry_points = []
        for name, source in sources.items():
            module = f"cli_test_plugin_{name}"
            monkeypatch.delitem(sys.modules, module, raising=False)
            (folder / f"{module}.py").write_text(source, encoding="utf-8")
            entry_points.append(importlib.metadata.EntryPoint(name, module, "gemma_hub"))
        registry = PluginRegistry(entry_points)
        monkeypatch.setattr(registry_module, "_REGISTRY", registry)
        return registry

    yield install
    for name in [name for name in sys.modules if name.startswith("cli_test_plugin_")]:
        del sys.modules[name]


class FakeLM:
    """A CausalLM that says the same whatever it is asked, and remembers what it was asked."""

    def __init__(self) -> None:
        self.backend = SimpleNamespace(name="fake", distribution="gemma-hub-fake", version="1.2")
        self.dtype, self.device = "float32", "fake:0"
        self.asked: list[dict[str, Any]] = []
        self.loaded: dict[str, Any] = {}
        self.sources: list[str] = []
        self.interrupt_after: int | None = None

    def generate(self, prompt: str, **settings: Any) -> Generation:
        self.asked.append({"prompt": prompt, **settings})
        ids = tuple(range(len(PIECES)))
        return Generation("".join(PIECES), ids, (2, 7), "length")

    def stream(self, prompt: str, **settings: Any):
        self.asked.append({"prompt": prompt, "stream": True, **settings})
        for i, piece in enumerate(PIECES):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            yield TextPiece(piece, i)
        yield TextPiece("", None, "length")


@pytest.fixture
def fake_lm(monkeypatch):
    from gemma_hub.gemma import Gemma

    lm = FakeLM()

    def load(source, **options):
        lm.loaded = {"source": source, **options}
        lm.sources.append(source)
        return lm

    monkeypatch.setattr(Gemma, "load", staticmethod(load))
    return lm
