"""The doctor sees what would harm this process, and says it in data."""

import importlib
import json
import platform
import sys

import pytest
import typer

from gemma_hub.plugins.doctor import IMPORT_BUDGET, diagnose

CRASHES = {
    "segmentation fault": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "SIGSEGV"),
    "abort": ("import os\nos.abort()\n", "SIGABRT"),
    "hard exit": ("import os\nos._exit(7)\n", "status 7"),
}


def of(diagnosis, entry_point):
    return next(one for one in diagnosis.plugins if one.plugin.entry_point == entry_point)


@pytest.mark.parametrize(("code", "ending"), CRASHES.values(), ids=CRASHES)
def test_plugin_that_kills_the_process(environment, code, ending):
    module = environment.install("gemma-hub-bad", code)
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()
    diagnosis = diagnose(registry)
    bad = of(diagnosis, "bad")
    assert bad.measured.seconds is None
    assert bad.plugin.state == "quarantined"
    assert f"ended the process with {ending}" in bad.plugin.problem
    assert module not in sys.modules  # this process would not be here otherwise
    assert [problem.distribution for problem in diagnosis.problems] == ["gemma-hub-bad"]
    assert registry.load("healthy").name == "healthy"


def test_hook_that_kills_the_process(environment):
    code = "import os\n@hookimpl\ndef gemma_hub_backends():\n    os._exit(9)\n"
    environment.install("gemma-hub-bad", code)
    diagnosis = diagnose(environment.registry())
    assert "status 9" in of(diagnosis, "bad").plugin.problem


def test_plugin_that_hangs(environment, monkeypatch):
    monkeypatch.setenv("GEMMA_HUB_PLUGIN_TIMEOUT", "1")
    environment.install("gemma-hub-bad", "import time\ntime.sleep(60)\n")
    environment.install_backend("gemma-hub-healthy")
    diagnosis = diagnose(environment.registry())
    bad = of(diagnosis, "bad")
    assert bad.measured.seconds >= 1
    assert "did not finish within 1 s" in bad.measured.error
    assert bad.plugin.state == "quarantined"
    assert of(diagnosis, "healthy").plugin.state == "ready"


def test_plugin_that_hangs_beyond_rescue(environment, monkeypatch):
    """In C code that keeps the interpreter's lock, no time limit in the process can help."""
    monkeypatch.setenv("GEMMA_HUB_PLUGIN_TIMEOUT", "0.5")
    monkeypatch.setattr("gemma_hub.plugins.doctor._START_UP", 3.0)
    code = "import ctypes\nctypes.PyDLL(None).sleep(60)\n"
    environment.install("gemma-hub-bad", code)
    diagnosis = diagnose(environment.registry())
    assert "had to be killed" in of(diagnosis, "bad").plugin.problem


@pytest.mark.parametrize("where", ["import", "hook"])
def test_array_framework_is_noticed(environment, where):
    (environment.folders[0] / "tensorflow.py").write_text("import time\ntime.sleep(0.2)\n")
    importlib.invalidate_caches()
    if where == "import":
        environment.install_backend("gemma-hub-heavy", before="import tensorflow")
    else:
        code = "@hookimpl\ndef gemma_hub_backends():\n    import tensorflow\n    return []\n"
        environment.install("gemma-hub-heavy", code)
    environment.install_backend("gemma-hub-healthy")
    diagnosis = diagnose(environment.registry())
    heavy = of(diagnosis, "heavy")
    assert heavy.measured.frameworks == ("tensorflow",)
    assert (heavy.measured.seconds > 0.2) == (where == "import")
    assert heavy.plugin.state == "ready"  # a breach of contract, and it works
    (problem,) = diagnosis.problems
    assert "its light module imports tensorflow" in problem.cause
    assert "GEMMA_HUB_PLUGINS=-gemma-hub-heavy" in problem.remedy
    assert not diagnosis.is_healthy


def test_disabled_plugin_is_not_imported_in_a_child_either(environment, monkeypatch, tmp_path):
    trace = tmp_path / "trace"
    environment.install_backend("gemma-hub-off", before=f"open({str(trace)!r}, 'w').close()")
    monkeypatch.setenv("GEMMA_HUB_PLUGINS", "-off")
    diagnosis = diagnose(environment.registry())
    assert of(diagnosis, "off").measured is None
    assert of(diagnosis, "off").plugin.state == "disabled"
    assert not trace.exists()


def test_healthy_installation(environment, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    ships = f"""
    print("a plug-in that talks")

    @hookimpl
    def gemma_hub_checkpoints():
        return [CheckpointSpec(name="small", path={str(tmp_path)!r}, summary="A small one")]
    """
    fields = {"requires": ("numpy>=1",), "features": frozenset({"export", "cache"})}
    environment.install_backend("gemma-hub-good", before=ships, fields=fields, version="1.7")
    diagnosis = diagnose(environment.registry())
    assert diagnosis.is_healthy
    assert diagnosis.problems == ()
    assert diagnosis.versions["python"] == platform.python_version()
    assert diagnosis.versions["plug-in API"] == "1.0"
    assert diagnosis.versions["gemma-hub-good"] == "1.7"
    assert diagnosis.versions["numpy"][0].isdigit()
    (checkpoint,) = diagnosis.checkpoints
    assert (checkpoint.name, checkpoint.is_there) == ("small", True)
    (plugin,) = diagnosis.plugins
    assert 0 < plugin.measured.seconds < 10 * IMPORT_BUDGET
    assert plugin.measured.frameworks == ()
    assert plugin.measured.error == ""


def test_checkpoint_whose_folder_is_gone(environment, tmp_path):
    ships = f"""
    @hookimpl
    def gemma_hub_checkpoints():
        return [CheckpointSpec(name="small", path={str(tmp_path / "gone")!r})]
    """
    environment.install_backend("gemma-hub-good", before=ships)
    diagnosis = diagnose(environment.registry())
    assert not diagnosis.is_healthy
    assert "'small' should be in" in diagnosis.problems[0].cause


def test_commands_are_tried_once_harm_is_set_aside(environment):
    environment.install("gemma-hub-bad", "import os\nos._exit(7)\n")
    environment.install("gemma-hub-half", "@hookimpl\ndef gemma_hub_cli(app):\n    1 / 0\n")
    registry = environment.registry()
    diagnosis = diagnose(registry, lambda: registry.extend_cli(typer.Typer()))
    causes = sorted(problem.cause for problem in diagnosis.problems)
    assert ["calling gemma_hub_cli failed" in causes[0], "status 7" in causes[1]] == [True, True]


def test_json(environment):
    environment.install("gemma-hub-bad", "1 / 0")
    fields = {"features": frozenset({"export", "cache"})}
    environment.install_backend("gemma-hub-good", fields=fields)
    raw = diagnose(environment.registry()).to_dict()
    assert json.loads(json.dumps(raw)) == raw
    assert raw["is_healthy"] is False
    assert raw["problems"][0]["distribution"] == "gemma-hub-bad"
    good = next(one for one in raw["backends"] if one["name"] == "good")
    assert good["spec"]["features"] == ["cache", "export"]
    assert set(raw) == {
        "versions", "plugins", "backends", "checkpoints", "formats", "problems", "is_healthy"
    }  # fmt: skip
