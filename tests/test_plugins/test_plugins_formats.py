"""Checkpoint formats of plug-ins: checked, claimed, made when asked for; a bad one alone fails."""

import re
import subprocess
import sys
import threading
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from gemma_hub.checkpoints.formats.interface import CheckpointFormat
from gemma_hub.cli import doctor
from gemma_hub.errors import CheckpointError, InputError, PluginError
from gemma_hub.plugins import built_in, checks
from gemma_hub.plugins.doctor import diagnose

BUILT_IN = [
    "huggingface", "pytorch_bin", "gemma_pytorch", "orbax", "keras", "gguf", "flax_msgpack"
]  # fmt: skip
ORDERS = [("gemma-hub-a", "other-b"), ("other-b", "gemma-hub-a")]

# Nothing but what the protocol asks for.
FORMAT = """
class Fake:
    name = {name!r}
    file_name = None
    layouts = ()
    distribution = {distribution!r}

    def detect(self, path): return False
    def open(self, path, config=None): ...
    def objections(self, config, task, options): return ()
    def tensors(self, opened, options): ...
    def write(self, folder, opened, options, progress=None): ...
"""


def returning(value: str) -> str:
    return f"@hookimpl\ndef gemma_hub_checkpoint_formats():\n    return {value}\n"


def spec(**fields: object) -> str:
    arguments = {"name": "bad", "api_version": "1.0", "factory": "MODULE_format:Fake"} | fields
    return f"FormatSpec({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def install(environment, distribution, name, *, factory=None, fields=None, **options):
    """Install a plug-in with one format; returns its module's name."""
    code = returning(f"[{spec(name=name, **(fields or {}))}]")
    module = environment.install(distribution, code, **options)
    folder = options.get("folder") or environment.folders[0]
    text = FORMAT.format(name=name, distribution=distribution) if factory is None else factory
    (folder / f"{module}_format.py").write_text(text)
    return module


# -- what is there ---------------------------------------------------------------------------------


def test_built_in_formats(environment):
    registry = environment.registry()
    infos = registry.formats()
    assert list(infos) == BUILT_IN  # the order in which a path is tried
    assert [info.name for info in infos.values()] == BUILT_IN
    assert {info.distribution for info in infos.values()} == {"gemma-hub"}
    assert {info.version for info in infos.values()} == {metadata.version("gemma-hub")}
    assert all(info.summary and not info.problem for info in infos.values())
    assert registry.problems() == ()
    # They pass what a plug-in's have to pass.
    assert checks.checked_formats([built_in.FORMATS]) == built_in.FORMATS


def test_built_in_formats_require_what_the_extras_install():
    path = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(path.read_text("utf-8"))["project"]["optional-dependencies"]
    required = {one.name: list(one.requires) for one in built_in.FORMATS if one.requires}
    assert required == {name: extras[name] for name in ("orbax", "keras", "gguf")}


def test_format_of_a_plugin(environment):
    install(environment, "gemma-hub-npz", "npz", fields={"summary": "Arrays"}, version="1.7")
    registry = environment.registry()
    infos = registry.formats()
    assert list(infos) == [*BUILT_IN, "npz"]
    info = infos["npz"]
    assert (info.name, info.distribution, info.version) == ("npz", "gemma-hub-npz", "1.7")
    assert (info.summary, info.missing, info.problem) == ("Arrays", "", "")
    made = registry.load_format("npz")
    assert isinstance(made, CheckpointFormat)
    assert registry.load_format("npz") is made
    assert registry.load_format("Gemma_Hub.npz:npz") is made
    assert registry.problems() == ()


def test_requirement_is_shown_and_stops_nothing(environment):
    fields = {"requires": ("no-such-reader>=2", "numpy>=1")}
    install(environment, "gemma-hub-npz", "npz", fields=fields)
    registry = environment.registry()
    assert 'pip install "no-such-reader>=2"' in registry.formats()["npz"].missing
    assert "numpy" not in registry.formats()["npz"].missing
    assert registry.load_format("npz").name == "npz"
    assert registry.problems() == ()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("ggfu", "'ggfu'. Did you mean 'gguf'.*Known: huggingface, .*gguf.*npz"),
        ("nothing-like-it", "'nothing-like-it'. Known: huggingface"),
        ("gemma-hub-z:npz", "Known: huggingface"),
        ("gemma-hub:npz", "There is no checkpoint format 'gemma-hub:npz'"),
    ],
)
def test_unknown_name(environment, asked, message):
    install(environment, "gemma-hub-npz", "npz")
    with pytest.raises(CheckpointError, match=message):
        environment.registry().load_format(asked)


def test_name_that_is_no_string(environment):
    with pytest.raises(InputError, match=r"format is 7; expected a name such as 'gguf'"):
        environment.registry().load_format(7)


def test_switched_off(environment, monkeypatch):
    install(environment, "gemma-hub-npz", "npz")
    monkeypatch.setenv("GEMMA_HUB_PLUGINS", "none")
    assert list(environment.registry().formats()) == BUILT_IN


# -- specs that are wrong --------------------------------------------------------------------------

BAD = {
    "hook that raises": (returning("1 / 0"), "hooks", "checkpoint_formats failed: ZeroDivision"),
    "hook with an argument": (
        "@hookimpl\ndef gemma_hub_checkpoint_formats(path):\n    return []\n",
        "hooks",
        "Argument.*path.*not be found",
    ),
    "misspelt hook": (
        "@hookimpl\ndef gemma_hub_checkpoint_format():\n    return []\n",
        "hooks",
        "Did you mean 'gemma_hub_checkpoint_formats'",
    ),
    "nothing": (returning("None"), "specs", "returned None; expected a list"),
    "a number": (returning("3"), "specs", r"returned 3 \(int\); expected a list of FormatSpec"),
    "a bare spec": (returning(spec()), "specs", "bare FormatSpec"),
    "a spec of something else": (
        returning('[CheckpointSpec(name="bad", path="x")]'),
        "specs",
        "expected FormatSpec",
    ),
    "name with capitals": (returning(f"[{spec(name='Bad')}]"), "specs", "'Bad' is no valid name"),
    "name with a colon": (returning(f"[{spec(name='a:b')}]"), "specs", "'a:b' is no valid name"),
    "name that is no string": (returning(f"[{spec(name=7)}]"), "specs", "7 is no valid name"),
    "factory without a class": (
        returning(f"[{spec(factory='bad')}]"),
        "specs",
        "'bad'; expected 'module:Class'",
    ),
    "api version in words": (
        returning(f"[{spec(api_version='new')}]"),
        "specs",
        "expected 'major.minor'",
    ),
    "requires as one string": (
        returning(f"[{spec(requires='numpy')}]"),
        "specs",
        "requires 'numpy'.*tuple or set",
    ),
    "requirement that is none": (returning(f"[{spec(requires=('>>1',))}]"), "specs", "PEP 508"),
    "summary that is no string": (returning(f"[{spec(summary=None)}]"), "specs", "summary None"),
    "one name twice": (returning(f"[{spec()}, {spec()}]"), "specs", "names 'bad' twice"),
}


@pytest.mark.parametrize(("code", "phase", "cause"), BAD.values(), ids=BAD)
def test_bad_plugin_costs_itself_alone(environment, code, phase, cause):
    environment.install("gemma-hub-bad", code, version="2.5")
    install(environment, "gemma-hub-npz", "npz")
    registry = environment.registry()
    assert list(registry.formats()) == [*BUILT_IN, "npz"]
    (problem,) = registry.problems()
    assert (problem.distribution, problem.version) == ("gemma-hub-bad", "2.5")
    assert problem.phase == phase
    assert re.search(cause, problem.cause), problem.cause
    message = rf"no checkpoint format 'bad'.*gemma-hub-bad 2\.5 failed \({phase}\).*Known: .*npz"
    with pytest.raises(CheckpointError, match=message):
        registry.load_format("bad")


@pytest.mark.parametrize("version", ["1.1", "2.0", "0.9"])
def test_other_api_version(environment, version):
    # A later contract may have requirements in a form that this one does not know.
    fields = {"api_version": version, "requires": ("??",)}
    install(environment, "gemma-hub-later", "later", fields=fields)
    registry = environment.registry()
    assert f"plug-in API {version}" in registry.formats()["later"].problem
    assert registry.formats()["later"].missing == ""
    assert [problem.phase for problem in registry.problems()] == ["api version"]
    with pytest.raises(PluginError, match=rf"'later'.*\(api version\).*API {version}"):
        registry.load_format("later")


# -- names that several claim ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_neither_wins_in_either_order(environment, order):
    for number, distribution in enumerate(order):
        folder = environment.add_folder(f"path{number}")
        install(environment, distribution, "npz", folder=folder)
    registry = environment.registry()
    assert list(registry.formats()) == [*BUILT_IN, "gemma-hub-a:npz", "other-b:npz"]
    assert [problem.phase for problem in registry.problems()] == ["names", "names"]
    assert "gemma-hub-a and other-b all claim the format name 'npz'" in registry.problems()[0].cause
    with pytest.raises(CheckpointError, match=r"gemma-hub-a:npz, other-b:npz\. Name one so"):
        registry.load_format("npz")
    for distribution in order:
        assert registry.load_format(f"{distribution}:npz").distribution == distribution


@pytest.mark.parametrize("rivals", [["gemma-hub-a"], ["gemma-hub-a", "other-b"]])
def test_built_in_format_keeps_its_name(environment, rivals):
    for distribution in rivals:
        install(environment, distribution, "gguf")
    registry = environment.registry()
    assert list(registry.formats()) == [*BUILT_IN, *(f"{rival}:gguf" for rival in rivals)]
    assert registry.formats()["gguf"].distribution == "gemma-hub"
    for distribution, problem in zip(rivals, registry.problems(), strict=True):
        assert (problem.distribution, problem.phase) == (distribution, "names")
        assert "'gguf', which gemma-hub keeps for its own format" in problem.cause
        assert f'Choose the plug-in\'s as "{distribution}:gguf"' in problem.remedy
        assert f"pip uninstall {distribution}" in problem.remedy
        assert registry.load_format(f"{distribution}:gguf").distribution == distribution


def test_two_entry_points_of_one_distribution(environment):
    module = install(environment, "gemma-hub-a", "npz")
    entry_points = next(environment.folders[0].glob("*.dist-info")) / "entry_points.txt"
    entry_points.write_text(f"[gemma_hub]\na = {module}\nb = {module}\n")
    registry = environment.registry()
    assert list(registry.formats()) == [*BUILT_IN, "npz"]  # the same spec twice is no conflict
    assert registry.problems() == ()


@pytest.mark.parametrize("name", ["npz", "gguf"])
def test_two_specs_of_one_distribution(environment, name):
    module = install(environment, "gemma-hub-a", name)
    (environment.folders[0] / f"{module}_second.py").write_text(
        (environment.folders[0] / f"{module}.py").read_text().replace("_format:", "_other:")
    )
    entry_points = next(environment.folders[0].glob("*.dist-info")) / "entry_points.txt"
    entry_points.write_text(f"[gemma_hub]\na = {module}\nb = {module}_second\n")
    registry = environment.registry()
    assert list(registry.formats()) == BUILT_IN
    assert "two entry points of gemma-hub-a (a and b)" in registry.problems()[0].cause


# -- making them -----------------------------------------------------------------------------------

NPZ = FORMAT.format(name="npz", distribution="")
FACTORIES = {
    "import error": ("import no_such_reader", "ModuleNotFoundError.*no_such_reader"),
    "exit": ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "no class": ("x = 1", "AttributeError.*Fake"),
    "constructor that takes arguments": (
        NPZ + "\n    def __init__(self, path): pass\n",
        "TypeError.*path",
    ),
    "no members": (
        "class Fake: pass",
        "made a Fake, which lacks detect, file_name, layouts, name, objections, open, tensors, "
        "write; expected a CheckpointFormat",
    ),
    "one member missing": (NPZ.replace("def detect", "def detects"), "lacks detect; expected"),
    "a member that fails": (
        NPZ.replace("layouts = ()", "layouts = property(lambda self: 1 / 0)"),
        "ZeroDivisionError",
    ),
    "another name": (NPZ.replace("'npz'", "'zip'"), "calls itself 'zip'; expected 'npz'"),
}


@pytest.mark.parametrize(("factory", "cause"), FACTORIES.values(), ids=FACTORIES)
def test_factory_that_fails(environment, factory, cause):
    install(environment, "gemma-hub-bad", "npz", factory=factory, version="3.1")
    install(environment, "gemma-hub-good", "good")
    registry = environment.registry()
    assert registry.formats()["npz"].problem == ""  # nobody asked yet
    assert registry.problems() == ()
    for _ in range(2):
        with pytest.raises(
            PluginError, match=rf"'npz' of gemma-hub-bad 3\.1.*\(factory\).*{cause}"
        ) as caught:
            registry.load_format("npz")
        assert caught.value.__cause__ is not None
    (problem,) = registry.problems()
    assert problem.phase == "factory"
    assert "GEMMA_HUB_PLUGINS=-gemma-hub-bad" in problem.remedy
    assert re.search(cause, registry.formats()["npz"].problem)
    assert registry.load_format("good").name == "good"


def test_factory_that_hangs_is_left_behind(environment, monkeypatch):
    monkeypatch.setenv("GEMMA_HUB_PLUGIN_TIMEOUT", "1")
    module = install(environment, "gemma-hub-bad", "npz", factory="import time\ntime.sleep(60)\n")
    install(environment, "gemma-hub-good", "good")
    registry = environment.registry()
    start = time.monotonic()
    with pytest.raises(PluginError, match="did not finish within 1 s") as caught:
        registry.load_format("npz")
    assert 1 <= time.monotonic() - start < 10
    assert f"{module}_format.py:" in str(caught.value)  # where it hangs
    assert registry.load_format("good").name == "good"


def test_built_in_format_that_fails_is_not_to_be_uninstalled(environment, monkeypatch):
    (environment.folders[0] / "damaged_format.py").write_text("import no_such_module\n")
    damaged = built_in.FormatSpec(
        name="damaged", api_version="1.0", factory="damaged_format:Fake", summary="Damaged"
    )
    monkeypatch.setattr("gemma_hub.plugins.formats.FORMATS", (*built_in.FORMATS, damaged))
    registry = environment.registry()
    with pytest.raises(PluginError, match=r"no_such_module.*pip install --force-reinstall gemma"):
        registry.load_format("damaged")
    (problem,) = registry.problems()
    assert "uninstall" not in problem.remedy


def test_factory_may_ask_for_another_format(environment, monkeypatch):
    """As one that wraps it does: the registry must not wait for itself."""
    install(environment, "gemma-hub-inner", "inner")
    factory = FORMAT.format(name="outer", distribution="") + (
        "\n    def __init__(self):\n        import sys\n"
        "        self.inner = sys.fake_registry.load_format('inner')\n"
    )
    install(environment, "gemma-hub-outer", "outer", factory=factory)
    registry = environment.registry()
    monkeypatch.setattr(sys, "fake_registry", registry, raising=False)
    assert registry.load_format("outer").inner is registry.load_format("inner")


def test_factory_is_imported_when_asked_for_and_once(environment, monkeypatch):
    monkeypatch.setattr(sys, "fake_count", [], raising=False)
    factory = "import sys, time\nsys.fake_count.append(1)\ntime.sleep(0.05)\n" + NPZ
    install(environment, "gemma-hub-npz", "npz", factory=factory)
    registry = environment.registry()
    assert "npz" in registry.formats()
    assert sys.fake_count == []
    loaded = []
    threads = [
        threading.Thread(target=lambda: loaded.append(registry.load_format("npz")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.fake_count == [1]
    assert len(loaded) == 8
    assert all(one is loaded[0] for one in loaded)


def test_listing_formats_imports_no_checkpoint_code():
    code = (
        "import sys\nfrom gemma_hub.plugins.registry import PluginRegistry\n"
        "assert PluginRegistry([]).formats()\n"
        "assert not [name for name in sys.modules if name.startswith('gemma_hub.checkpoints')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- doctor ----------------------------------------------------------------------------------------


def test_doctor_lists_formats(environment):
    environment.install_backend("gemma-hub-healthy")
    install(environment, "gemma-hub-npz", "npz", fields={"requires": ("no-such-reader",)})
    diagnosis = diagnose(environment.registry())
    assert diagnosis.is_healthy  # a reader that is not installed is nothing wrong
    assert [info.name for info in diagnosis.formats] == [*BUILT_IN, "npz"]
    raw = diagnosis.to_dict()["formats"][-1]
    assert raw["name"] == "npz"
    assert "no-such-reader" in raw["missing"]


def test_doctor_reports_a_taken_name(environment):
    environment.install_backend("gemma-hub-healthy")
    install(environment, "gemma-hub-a", "gguf")
    diagnosis = diagnose(environment.registry())
    assert not diagnosis.is_healthy
    assert [problem.phase for problem in diagnosis.problems] == ["names"]


def test_doctor_sets_aside_a_hook_that_kills_the_process(environment):
    environment.install("gemma-hub-bad", "import os\n" + returning("os._exit(9)"))
    diagnosis = diagnose(environment.registry())
    assert "status 9" in diagnosis.problems[0].cause
    assert [info.name for info in diagnosis.formats] == BUILT_IN


def test_doctor_prints_formats(environment, capsys):
    install(environment, "gemma-hub-npz", "npz", fields={"api_version": "2.0"})
    doctor._print(diagnose(environment.registry()))
    printed = capsys.readouterr().out
    assert "checkpoint formats" in printed
    for name in (*BUILT_IN, "npz"):
        assert re.search(rf"^{name} ", printed, re.M), name
    assert "2.0" in printed
