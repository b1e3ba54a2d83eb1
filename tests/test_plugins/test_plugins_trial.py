"""A plug-in that ends the process that imports it does not end a command whose status counts."""

import os
import subprocess
import sys

import pytest

from gemma_hub.plugins.trial import set_aside_what_kills

KILLERS = {
    "at import": ("import os\nos._exit(0)\n", "status 0"),
    "in a hook": (
        "import os\n@hookimpl\ndef gemma_hub_checkpoints():\n    os._exit(0)\n",
        "status 0",
    ),
    "says that all is well": ("import os\nos.write(1, b'alive?')\nos._exit(0)\n", "status 0"),
    "crashes": ("import os\nos.kill(os.getpid(), 11)\n", "SIGSEGV"),
}


@pytest.mark.parametrize(("code", "ending"), KILLERS.values(), ids=KILLERS)
def test_it_is_quarantined_and_the_others_are_not(environment, code, ending):
    environment.install("gemma-hub-bad", code)
    environment.install_backend("gemma-hub-good")
    registry = environment.registry()
    set_aside_what_kills(registry)
    states = {info.entry_point: info for info in registry.plugins()}
    assert states["good"].state == "ready"
    assert states["bad"].state == "quarantined"
    assert ending in states["bad"].problem


def test_one_that_hangs_beyond_rescue_is_quarantined(environment, monkeypatch):
    for module in ("trial", "doctor"):
        monkeypatch.setattr(f"gemma_hub.plugins.{module}._START_UP", 0.8)
        monkeypatch.setattr(f"gemma_hub.plugins.{module}._STEPS", 0)
    # PyDLL keeps the interpreter's lock, so that no thread and no signal handler gets a turn.
    environment.install("gemma-hub-bad", "import ctypes\nctypes.PyDLL(None).pause()\n")
    registry = environment.registry()
    set_aside_what_kills(registry)
    (info,) = registry.plugins()
    assert info.state == "quarantined"
    assert "hung" in info.problem


def test_what_only_fails_is_left_to_the_registry(environment, monkeypatch):
    environment.install("gemma-hub-bad", "1 / 0\n")
    environment.install("gemma-hub-loud", "print('hello')\nimport sys\nsys.exit(3)\n")
    registry = environment.registry()
    monkeypatch.setattr(registry, "quarantine", lambda *_: pytest.fail("nothing kills"))
    set_aside_what_kills(registry)
    assert {info.state for info in registry.plugins()} == {"quarantined"}


def test_nothing_is_tried_once_plugins_are_imported(environment, monkeypatch):
    environment.install_backend("gemma-hub-good")
    registry = environment.registry()
    registry.plugins()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("tried again"))
    set_aside_what_kills(registry)


def test_a_plugins_command_is_not_ended_by_another_plugin(environment):
    environment.install("gemma-hub-bad", "import os\nos._exit(0)\n")
    command = "@hookimpl\ndef gemma_hub_cli(app):\n    @app.command()\n    def verdict():\n"
    environment.install("gemma-hub-zz", command + "        raise SystemExit(7)\n")
    found = subprocess.run(
        [sys.executable, "-P", "-c", "from gemma_hub.cli.app import app; app()", "verdict"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, environment.folders))},
        capture_output=True,
        check=False,
    )
    assert found.returncode == 7, found.stderr.decode()
