"""Installed plug-ins that exist for one test: real metadata and modules in temporary folders."""

import importlib
import itertools
import sys
import textwrap
from importlib.metadata import distributions
from pathlib import Path

import pytest

from gemma_hub.plugins import discovery
from gemma_hub.plugins.registry import PluginRegistry

_COUNTER = itertools.count()

PREAMBLE = """
from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec, CheckpointSpec, FormatSpec
"""

BACKEND = """
class Fake:
    distribution = {distribution!r}

    def devices(self):
        return ("cpu",)

    def build(self, config, task, weights, options):
        raise NotImplementedError
"""


class Environment:
    """Folders on sys.path, like site-packages, that discovery takes for all there is."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.folders: list[Path] = []
        self.monkeypatch = monkeypatch
        self.add_folder("site")

    def add_folder(self, name: str) -> Path:
        """One more folder, at the front of sys.path."""
        folder = self.root / name
        folder.mkdir()
        self.folders.insert(0, folder)
        self.monkeypatch.syspath_prepend(str(folder))
        return folder

    def install(
        self,
        distribution: str,
        code: str,
        *,
        entry: str | None = None,
        version: str = "1.0",
        module: str | None = None,
        folder: Path | None = None,
        value: str | None = None,
    ) -> str:
        """Install a distribution with one entry point; returns its module's name.

        Module names are new for each call, since a module stays in sys.modules.
        """
        folder = folder or self.folders[0]
        module = module or f"fake_{distribution.replace('-', '_')}_{next(_COUNTER)}"
        entry = entry or distribution.removeprefix("gemma-hub-")
        path = folder / f"{module}.py"
        path.write_text(PREAMBLE + textwrap.dedent(code).replace("MODULE", module))
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[gemma_hub]\n{entry} = {value or module}\n")
        importlib.invalidate_caches()
        return module

    def install_backend(
        self, distribution: str, name: str | None = None, *, before: str = "", **options
    ) -> str:
        """Install a healthy plug-in with one backend; `before` is code to run at import."""
        fields = {
            "name": name or distribution.removeprefix("gemma-hub-"),
            "api_version": "1.0",
            "factory": "MODULE_backend:Fake",
        }
        fields |= options.pop("fields", {})
        arguments = ", ".join(f"{key}={value!r}" for key, value in fields.items())
        code = textwrap.dedent(before) + textwrap.dedent(
            f"""
            @hookimpl
            def gemma_hub_backends():
                return [BackendSpec({arguments})]
            """
        )
        factory = options.pop("factory", BACKEND.format(distribution=distribution))
        module = self.install(distribution, code, **options)
        folder = options.get("folder") or self.folders[0]
        (folder / f"{module}_backend.py").write_text(textwrap.dedent(factory))
        return module

    def registry(self) -> PluginRegistry:
        """A new registry that discovers what is installed here."""
        path = [str(folder) for folder in self.folders]
        self.monkeypatch.setattr(discovery, "distributions", lambda: distributions(path=path))
        return PluginRegistry()


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment with no plug-in, and no variable of ours set."""
    for variable in ("GEMMA_HUB_PLUGINS", "GEMMA_HUB_BACKEND", "GEMMA_HUB_PLUGIN_TIMEOUT"):
        monkeypatch.delenv(variable, raising=False)
    yield Environment(tmp_path, monkeypatch)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
