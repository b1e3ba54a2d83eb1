"""A plug-in that fails in any way costs itself alone, and says why to whoever asks for it."""

import re
import sys
import threading
import time

import pytest

from gemma_hub.errors import PluginError
from gemma_hub.plugins.guard import call_guarded
from gemma_hub.plugins.problems import PluginFailure

SPEC = 'BackendSpec(name="bad", api_version="1.0", factory="MODULE_backend:Fake")'


def returning(value: str, hook: str = "gemma_hub_backends") -> str:
    return f"@hookimpl\ndef {hook}():\n    return {value}\n"


def with_field(**fields: object) -> str:
    arguments = {"name": "bad", "api_version": "1.0", "factory": "MODULE_backend:Fake"} | fields
    text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return returning(f"[BackendSpec({text})]")


BAD = {
    "import error": ("import no_such_module", "import", "ModuleNotFoundError.*no_such_module"),
    "exit at import": ("raise SystemExit(3)", "import", "SystemExit: 3"),
    "syntax error": ("def", "import", "SyntaxError"),
    "exception that has no text": (
        "class E(Exception):\n    def __str__(self): 1/0\nraise E",
        "import",
        "failed: E$",
    ),
    "hook with an unknown argument": (
        "@hookimpl\ndef gemma_hub_backends(config):\n    return []\n",
        "hooks",
        "Argument.*config.*not be found",
    ),
    "misspelt hook": (
        returning("[]", "gemma_hub_backend"),
        "hooks",
        "unknown hook 'gemma_hub_backend'.*Did you mean 'gemma_hub_backends'",
    ),
    "unmarked hook": (
        "def gemma_hub_backends():\n    return []\n" + returning("[]", "gemma_hub_checkpoints"),
        "hooks",
        "gemma_hub_backends is not marked with @hookimpl",
    ),
    "no hook": ("x = 1", "hooks", "implements none of gemma_hub_backends"),
    "argument with a default": (
        "@hookimpl\ndef gemma_hub_cli(app=None):\n    pass\n",
        "hooks",
        "gemma_hub_cli gives a default to app",
    ),
    "hook that raises": (
        returning("1 / 0"),
        "hooks",
        "gemma_hub_backends failed: ZeroDivisionError",
    ),
    "hook that exits": (returning("exit(2)"), "hooks", "SystemExit: 2"),
    "hook that returns nothing": (returning("None"), "specs", "returned None; expected a list"),
    "hook that returns a number": (returning("3"), "specs", r"returned 3 \(int\); expected a list"),
    "hook that returns a bare spec": (returning(SPEC), "specs", "bare BackendSpec"),
    "hook that returns dictionaries": (
        returning("[{'name': 'bad'}]"),
        "specs",
        "expected BackendSpec",
    ),
    "checkpoints hook that raises": (
        returning("[].pop()", "gemma_hub_checkpoints"),
        "hooks",
        "gemma_hub_checkpoints failed: IndexError",
    ),
    "checkpoint without a path": (
        returning('[CheckpointSpec(name="bad", path=None)]', "gemma_hub_checkpoints"),
        "specs",
        "path None.*expected a string",
    ),
    "checkpoint with a slash in its name": (
        returning('[CheckpointSpec(name="a/b", path="x")]', "gemma_hub_checkpoints"),
        "specs",
        "'a/b' is no valid name",
    ),
    "name with capitals": (with_field(name="Bad"), "specs", "'Bad' is no valid name"),
    "name that is no string": (with_field(name=7), "specs", "7 is no valid name"),
    "factory without a class": (with_field(factory="bad"), "specs", "expected 'module:Class'"),
    "unknown feature": (
        with_field(features=frozenset({"cahce"})),
        "specs",
        "'cahce' among its features. Did you mean 'cache'",
    ),
    "an unknown task": (
        with_field(tasks=("causal_lm", "sequence_classifcation")),
        "specs",
        "'sequence_classifcation' among its tasks. Did you mean 'sequence_classification'",
    ),
    "no tasks": (with_field(tasks=()), "specs", "has no tasks; expected at least one of base"),
    "tasks as one string": (with_field(tasks="base"), "specs", "tasks 'base'.*tuple or set"),
    "features as one string": (
        with_field(features="cache"),
        "specs",
        "features 'cache'.*tuple or set",
    ),
    "unknown dtype": (with_field(dtypes=("float8",)), "specs", "'float8' among its dtypes"),
    "no dtypes": (with_field(dtypes=()), "specs", "no dtypes"),
    "api version in words": (with_field(api_version="new"), "specs", "expected 'major.minor'"),
    "requirement that is none": (with_field(requires=(">>1",)), "specs", "PEP 508"),
    "options without what they do": (
        with_field(options=("fast",)),
        "specs",
        r"options \('fast',\) \(tuple\); expected a dictionary",
    ),
    "an option with a value": (with_field(options={"fast": True}), "specs", "'fast'.* with True"),
    "one name twice": (returning(f"[{SPEC}, {SPEC}]"), "specs", "names 'bad' twice"),
}


@pytest.mark.parametrize(("code", "phase", "cause"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("bad_name", ["gemma-hub-bad", "zz-gemma-hub-bad"])
def test_bad_plugin_costs_itself_alone(environment, code, phase, cause, bad_name):
    environment.install(bad_name, code, entry="bad", version="2.5")
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()

    assert registry.load("healthy").backend.devices() == ("cpu",)
    (problem,) = registry.problems()
    assert (problem.distribution, problem.version) == (bad_name, "2.5")
    assert (problem.entry_point, problem.phase) == ("bad", phase)
    assert f"pip uninstall {bad_name}" in problem.remedy
    assert f"GEMMA_HUB_PLUGINS=-{bad_name}" in problem.remedy
    assert re.search(cause, problem.cause), problem.cause
    assert [info.state for info in registry.plugins()].count("quarantined") == 1
    message = rf"'bad' of {bad_name} 2\.5 .*\({phase}\): {re.escape(problem.cause)}"
    with pytest.raises(PluginError, match=message):
        registry.load("bad")


def test_error_chains_the_original(environment):
    environment.install("gemma-hub-bad", "raise KeyError('deep')")
    registry = environment.registry()
    with pytest.raises(PluginError, match="KeyError: 'deep'") as caught:
        registry.load("bad")
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, ImportError)


def test_hang_at_import_is_left_behind(environment, monkeypatch):
    monkeypatch.setenv("GEMMA_HUB_PLUGIN_TIMEOUT", "1")
    module = environment.install("gemma-hub-bad", "import time\ntime.sleep(60)\n")
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()
    start = time.monotonic()
    assert registry.load("healthy").name == "healthy"
    assert 1 <= time.monotonic() - start < 10
    (problem,) = registry.problems()
    assert problem.phase == "import"
    assert "did not finish within 1 s" in problem.cause
    assert f"{module}.py:" in problem.cause  # where it hangs


def test_hook_that_hangs_is_left_behind(environment, monkeypatch):
    monkeypatch.setenv("GEMMA_HUB_PLUGIN_TIMEOUT", "1")
    environment.install("gemma-hub-bad", "import time\n" + returning("time.sleep(60)"))
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()
    assert registry.load("healthy").name == "healthy"
    assert registry.problems()[0].phase == "hooks"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_wrong_timeout_is_a_problem_and_the_default_holds(environment, monkeypatch, text):
    monkeypatch.setenv("GEMMA_HUB_PLUGIN_TIMEOUT", text)
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()
    assert registry.load("healthy").name == "healthy"
    (problem,) = registry.problems()
    assert "GEMMA_HUB_PLUGIN_TIMEOUT" in problem.cause
    assert "5 s is used" in problem.remedy


def test_keyboard_interrupt_is_not_caught():
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_guarded(interrupt, "import", "it", 1.0)


def test_guard_names_the_phase_and_the_step():
    with pytest.raises(PluginFailure, match="the step failed: ZeroDivisionError") as caught:
        call_guarded(lambda: 1 / 0, "hooks", "the step", 1.0)
    assert caught.value.phase == "hooks"


@pytest.mark.parametrize("version", ["1.1", "2.0", "0.9", "1.999999"])
def test_other_api_version_is_incompatible(environment, version):
    # A later contract may have features that this one does not know.
    fields = {"api_version": version, "features": frozenset({"telepathy"})}
    environment.install_backend("gemma-hub-later", fields=fields)
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()
    assert registry.load("healthy").name == "healthy"
    later = next(info for info in registry.backends() if info.name == "later")
    assert later.state == "incompatible"
    what = "gemma-hub-later" if version == "0.9" else "gemma-hub"
    assert f"pip install --upgrade {what}'" in later.remedy
    with pytest.raises(PluginError, match=rf"\(api version\): .*API {version}.*speaks 1\.0"):
        registry.load("later")


def test_earlier_minor_api_is_accepted(environment, monkeypatch):
    monkeypatch.setattr("gemma_hub.plugins.checks.API_VERSION", (1, 3))
    for minor in range(5):
        environment.install_backend(f"gemma-hub-b{minor}", fields={"api_version": f"1.{minor}"})
    states = {info.name: info.state for info in environment.registry().backends()}
    assert states == dict.fromkeys(("b0", "b1", "b2", "b3"), "ready") | {"b4": "incompatible"}


@pytest.mark.parametrize(
    ("requires", "line"),
    [
        ("no-such-distribution>=2", 'pip install "no-such-distribution>=2"'),
        ("numpy>=999", 'pip install "numpy>=999"'),
        ('no-such-distribution; python_version > "3"', 'pip install "no-such-distribution"'),
    ],
)
def test_missing_requirement_is_unavailable(environment, requires, line):
    module = environment.install_backend("gemma-hub-lacking", fields={"requires": (requires,)})
    environment.install_backend("gemma-hub-healthy", fields={"requires": ("numpy>=1",)})
    registry = environment.registry()
    assert registry.load("healthy").name == "healthy"
    lacking = next(info for info in registry.backends() if info.name == "lacking")
    assert lacking.state == "unavailable"
    assert line in lacking.remedy
    with pytest.raises(PluginError, match=r"\(requires\): it needs"):
        registry.load("lacking")
    assert f"{module}_backend" not in sys.modules


def test_requirement_of_another_platform_is_not_missing(environment):
    requires = ('no-such-distribution; python_version < "3"',)
    environment.install_backend("gemma-hub-healthy", fields={"requires": requires})
    assert environment.registry().load("healthy").name == "healthy"


def test_development_version_meets_a_requirement(environment):
    environment.install("some-framework", "", entry="unused", version="2.5.dev3")
    (environment.folders[0] / "some_framework-2.5.dev3.dist-info" / "entry_points.txt").unlink()
    environment.install_backend("gemma-hub-new", fields={"requires": ("some-framework>=2",)})
    assert environment.registry().backends()[0].state == "ready"


FACTORIES = {
    "import error": ("import no_such_framework", "ModuleNotFoundError.*no_such_framework"),
    "exit": ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "no class": ("x = 1", "AttributeError.*Fake"),
    "constructor that raises": (
        "class Fake:\n    def __init__(self): raise RuntimeError('no device')",
        "RuntimeError: no device",
    ),
    "not a backend": ("class Fake: pass", "made a Fake, which lacks"),
}


@pytest.mark.parametrize(("factory", "cause"), FACTORIES.values(), ids=FACTORIES)
def test_factory_that_fails(environment, factory, cause):
    environment.install_backend("gemma-hub-bad", factory=factory, version="3.1")
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()
    assert registry.problems() == ()  # nobody asked yet
    for _ in range(2):
        with pytest.raises(
            PluginError, match=rf"'bad' of gemma-hub-bad 3\.1.*\(factory\).*{cause}"
        ):
            registry.load("bad")
    assert [problem.phase for problem in registry.problems()] == ["factory"]
    assert registry.load("healthy").name == "healthy"
    states = {info.name: info.state for info in registry.backends()}
    assert states == {"bad": "quarantined", "healthy": "ready"}


def test_factory_is_imported_on_load_alone_and_once(environment, monkeypatch):
    monkeypatch.setattr(sys, "fake_count", [], raising=False)
    factory = "import sys, time\nsys.fake_count.append(1)\ntime.sleep(0.05)\n"
    factory += "class Fake:\n    def __init__(self): sys.fake_count.append(2)\n"
    factory += "    def devices(self): return ()\n    def build(self, *args): pass\n"
    environment.install_backend("gemma-hub-healthy", factory=factory)
    registry = environment.registry()
    assert registry.backends()[0].state == "ready"
    assert sys.fake_count == []
    loaded = []
    threads = [
        threading.Thread(target=lambda: loaded.append(registry.load("healthy"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.fake_count == [1, 2]
    assert len(loaded) == 8
    assert all(one is loaded[0] for one in loaded)


def test_plugins_are_imported_at_the_first_question(environment):
    module = environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()
    assert [candidate.name for candidate in registry.candidates()] == ["healthy"]
    assert module not in sys.modules
    registry.backends()
    assert module in sys.modules
