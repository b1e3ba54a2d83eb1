"""Distributions that are installed for one test: their folder on sys.path, with metadata beside."""

import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gemma_hub.plugins import registry as registry_module
from gemma_hub.plugins.registry import PluginRegistry


class Site:
    """A folder on sys.path that has the metadata of what is installed in this test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.packages: list[str] = []
        folder.mkdir()
        monkeypatch.syspath_prepend(str(folder))
        # A file that is edited twice within a second would be taken for its compiled form.
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def install(self, distribution: Path) -> PluginRegistry:
        """Do what an editable install of the folder `distribution` does; what is there now."""
        project = tomllib.loads((distribution / "pyproject.toml").read_text("utf-8"))["project"]
        name, version = project["name"], project["version"]
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        entry_points = project["entry-points"]["gemma_hub"]
        lines = [f"{entry} = {value}" for entry, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[gemma_hub]", *lines, ""]))
        self.monkeypatch.syspath_prepend(str(distribution))
        self.packages += [value.partition(".")[0] for value in entry_points.values()]
        return self.restart()

    def restart(self) -> PluginRegistry:
        """What a new process would find: modules as they are on disk now."""
        self.forget()
        importlib.invalidate_caches()
        registry = PluginRegistry()
        self.monkeypatch.setattr(registry_module, "_REGISTRY", registry)
        return registry

    def forget(self) -> None:
        """Drop the modules of what was installed."""
        for module in [name for name in sys.modules if name.partition(".")[0] in self.packages]:
            del sys.modules[module]


@pytest.fixture
def site(tmp_path, monkeypatch):
    for variable in ("GEMMA_HUB_PLUGINS", "GEMMA_HUB_BACKEND", "GEMMA_HUB_PLUGIN_TIMEOUT"):
        monkeypatch.delenv(variable, raising=False)
    site = Site(tmp_path / "site", monkeypatch)
    yield site
    site.forget()


@pytest.fixture
def check_code(tmp_path):
    """`check_code(distribution)` fails unless ruff and mypy, as it sets them, are content."""
    tools = [
        ("ruff", "check", "--no-cache", "."),
        ("ruff", "format", "--no-cache", "--check", "--diff", "."),
        ("mypy", "--cache-dir", str(tmp_path / "mypy")),
    ]

    def check(distribution: Path, count: int = 3) -> None:
        for tool, *options in tools[:count]:
            assert importlib.util.find_spec(tool), f"{tool} is in the extra 'lint'"
            done = subprocess.run(
                [sys.executable, "-m", tool, *options],
                cwd=distribution,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{tool}: {done.stdout}{done.stderr}"

    return check
