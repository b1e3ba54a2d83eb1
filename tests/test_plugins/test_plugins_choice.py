"""Which backend is taken, which plug-ins are switched on, and what unknown names are told."""

import sys

import pytest

from gemma_hub.errors import BackendNotFoundError, InputError, PluginError
from gemma_hub.plugins import discovery
from gemma_hub.plugins.discovery import find_candidates
from gemma_hub.plugins.registry import PluginRegistry, plugin_registry

LACKING = {"requires": ("no-such-thing",)}


def install(environment, names):
    """Install backends by name; one with a "!" lacks a requirement, "?" fails at import."""
    for name in names.split():
        if name.endswith("?"):
            environment.install(f"gemma-hub-{name[:-1]}", "1 / 0")
        else:
            fields = LACKING if name.endswith("!") else {}
            environment.install_backend(f"gemma-hub-{name.rstrip('!')}", fields=fields)


@pytest.mark.parametrize(
    ("installed", "taken"),
    [
        ("torch", "torch"),
        ("flax", "flax"),
        ("mlx", "mlx"),
        ("torch flax numpy", "torch"),
        ("flax torch mlx", "torch"),
        ("flax numpy", "flax"),
        ("flax mlx!", "flax"),
        ("flax mlx?", "flax"),
        ("numpy", "numpy"),
    ],
)
def test_default(environment, installed, taken):
    install(environment, installed)
    assert environment.registry().load().name == taken


@pytest.mark.parametrize("installed", ["torch! flax", "torch? flax", "torch! numpy", "torch? mlx"])
def test_broken_default_is_never_replaced(environment, installed):
    install(environment, installed)
    with pytest.raises(PluginError, match="Backend 'torch' of gemma-hub-torch"):
        environment.registry().load()


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ("", "No backend is usable. Install one: 'pip install gemma-hub-torch'.*Installed: none"),
        ("flax mlx", "several are usable. Choose with backend=.*GEMMA_HUB_BACKEND.*flax, mlx"),
        ("flax! numpy", r"but 'numpy', the slow.*backend='numpy'.*flax \(unavailable\)"),
        ("flax?", r"No backend is usable.*gemma-hub-flax:flax \(quarantined\)"),
    ],
)
def test_no_default(environment, installed, message):
    install(environment, installed)
    with pytest.raises(BackendNotFoundError, match=message):
        environment.registry().load()


def test_variable_chooses_and_the_argument_wins(environment, monkeypatch):
    install(environment, "torch flax numpy")
    registry = environment.registry()
    monkeypatch.setenv("GEMMA_HUB_BACKEND", "numpy")
    assert registry.load().name == "numpy"
    assert registry.load("flax").name == "flax"
    monkeypatch.setenv("GEMMA_HUB_BACKEND", "mxl")
    with pytest.raises(BackendNotFoundError, match=r"'mxl'.*GEMMA_HUB_BACKEND asks for it"):
        registry.load()
    monkeypatch.setenv("GEMMA_HUB_BACKEND", " ")
    assert registry.load().name == "torch"


@pytest.mark.parametrize("fails", ["flax!", "flax?"])
def test_backend_that_fails_is_not_replaced(environment, monkeypatch, fails):
    install(environment, f"torch {fails}")
    registry = environment.registry()
    with pytest.raises(PluginError, match="Backend 'flax'"):
        registry.load("flax")
    monkeypatch.setenv("GEMMA_HUB_BACKEND", "flax")
    with pytest.raises(PluginError, match="Backend 'flax'"):
        registry.load()


@pytest.mark.parametrize(
    ("asked", "installed", "message"),
    [
        ("jax", "flax", r"The JAX backend is called 'flax'. Installed: flax"),
        (
            "jax",
            "torch",
            r"The JAX backend is called 'flax'. Install it with 'pip install gemma-hub-flax'",
        ),
        ("pytorch", "torch", r"The PyTorch backend is called 'torch'. Installed"),
        ("PyTorch", "", r"called 'torch'. Install it with 'pip install gemma-hub-torch'"),
        ("torch", "flax", r"Install it with 'pip install gemma-hub-torch'. Installed: flax"),
        ("flax", "torch", r"'pip install gemma-hub-flax'. Installed: torch"),
        ("numpy", "torch", r"'pip install gemma-hub-numpy'"),
        ("Torch", "torch", r"no backend 'Torch'. Did you mean 'torch'\? Installed: torch"),
        ("tourch", "flax", r"Did you mean 'torch'\?"),
        ("mlxx", "mlx flax", r"Did you mean 'mlx'\? Installed: flax, mlx"),
        ("zzz", "flax torch!", r"no backend 'zzz'. Installed: flax, gemma-hub-torch:torch \(unav"),
        ("", "flax", r"no backend ''. Installed: flax"),
    ],
)
def test_unknown_name(environment, asked, installed, message):
    install(environment, installed)
    with pytest.raises(BackendNotFoundError, match=message):
        environment.registry().load(asked)


def test_name_that_is_no_string(environment):
    with pytest.raises(InputError, match=r"backend is <module 'sys'.*expected a name such as"):
        environment.registry().load(sys)


# -- switches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "on"),
    [
        ("", {"a", "b", "c"}),
        ("none", set()),
        ("a", {"a"}),
        ("a,b", {"a", "b"}),
        (" a , gemma-hub-c ", {"a", "c"}),
        ("Gemma_Hub_b", {"b"}),
        ("-c", {"a", "b"}),
        ("-c,-gemma-hub-a", {"b"}),
        ("-gemma-hub-c:c", {"a", "b"}),
        ("a,b,-b", {"a"}),
    ],
)
def test_disabled_plugins_are_never_imported(environment, monkeypatch, switches, on):
    modules = {name: environment.install_backend(f"gemma-hub-{name}") for name in "abc"}
    monkeypatch.setenv("GEMMA_HUB_PLUGINS", switches)
    registry = environment.registry()
    assert {info.name for info in registry.backends()} == on
    assert {name for name, module in modules.items() if module in sys.modules} == on
    assert {info.entry_point for info in registry.plugins() if info.state != "disabled"} == on
    assert {candidate.name for candidate in registry.candidates()} == on
    assert registry.problems() == ()
    for name in modules.keys() - on:
        with pytest.raises(BackendNotFoundError, match=f"{name!r} of gemma-hub-{name} is switched"):
            registry.load(name)


def test_switching_the_bad_one_off_cures(environment, monkeypatch):
    environment.install("gemma-hub-bad", "raise SystemExit")
    environment.install_backend("gemma-hub-healthy")
    assert environment.registry().problems() != ()
    monkeypatch.setenv("GEMMA_HUB_PLUGINS", "-gemma-hub-bad")
    assert environment.registry().problems() == ()


@pytest.mark.parametrize("switches", ["helthy", "-helthy", "healthy,helthy"])
def test_switch_for_no_plugin_is_a_problem(environment, monkeypatch, switches):
    environment.install_backend("gemma-hub-healthy")
    monkeypatch.setenv("GEMMA_HUB_PLUGINS", switches)
    (problem,) = environment.registry().problems()
    assert "names 'helthy'; no plug-in of that name is installed" in problem.cause
    assert "Did you mean 'healthy'" in problem.remedy


# -- metadata ---------------------------------------------------------------------------------


def test_malformed_entry_points_cost_their_distribution_alone(environment):
    environment.install_backend("gemma-hub-bad")
    environment.install_backend("gemma-hub-healthy")
    info = environment.folders[0] / "gemma_hub_bad-1.0.dist-info"
    (info / "entry_points.txt").write_text("[gemma_hub]\nthis line has no equals sign\n")
    registry = environment.registry()
    assert registry.load("healthy").name == "healthy"
    (problem,) = registry.problems()
    assert (problem.distribution, problem.phase) == ("gemma-hub-bad", "metadata")
    assert "entry_points.txt of gemma-hub-bad cannot be read" in problem.cause


def test_malformed_entry_points_of_others_are_not_our_business(environment):
    environment.install_backend("unrelated")
    info = environment.folders[0] / "unrelated-1.0.dist-info"
    (info / "entry_points.txt").write_text("[console_scripts]\nno equals sign\n")
    assert environment.registry().problems() == ()
    (info / "entry_points.txt").write_bytes(b"\xff\xfe[gemma_hub]")
    assert environment.registry().problems() == ()


def test_distribution_without_a_name(environment):
    environment.install_backend("gemma-hub-nameless", "nameless")
    environment.install_backend("gemma-hub-healthy")
    (environment.folders[0] / "gemma_hub_nameless-1.0.dist-info" / "METADATA").unlink()
    registry = environment.registry()
    assert registry.load("healthy").name == "healthy"
    assert registry.load("nameless").distribution == ""


@pytest.mark.parametrize("value", ["gemma hub", "1module", "module:", "module:a b", ""])
def test_malformed_entry_point_value(environment, value):
    environment.install("gemma-hub-bad", "", value=value)
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()
    assert registry.load("healthy").name == "healthy"
    if value:  # the parser drops an entry point that names nothing
        (problem,) = registry.problems()
        assert problem.phase == "metadata"
        assert "expected 'module' or 'module:object'" in problem.cause


def test_entry_point_may_name_an_object(environment):
    code = """
    class Hooks:
        @hookimpl
        def gemma_hub_checkpoints(self):
            return [CheckpointSpec(name="small-1.1", path="x")]

    hooks = Hooks()
    """
    module = environment.install("gemma-hub-a", code)
    info = environment.folders[0] / "gemma_hub_a-1.0.dist-info"
    (info / "entry_points.txt").write_text(f"[gemma_hub]\na = {module}:hooks\n")
    registry = environment.registry()
    assert registry.problems() == ()
    assert list(registry.checkpoints()) == ["small-1.1"]


def test_registry_of_given_entry_points(environment):
    environment.install_backend("gemma-hub-a")
    environment.install_backend("gemma-hub-b")
    given = [c.entry_point for c in environment.registry().candidates() if c.name == "b"]
    assert [info.name for info in PluginRegistry(given).backends()] == ["b"]


def test_order_of_discovery_decides_nothing(environment):
    for name in "cab":
        environment.install_backend(f"gemma-hub-{name}")
    environment.registry()
    entry_points = [entry for d in discovery.distributions() for entry in d.entry_points]
    forwards, _ = find_candidates(entry_points)
    backwards, _ = find_candidates(entry_points[::-1])
    assert [c.name for c in forwards] == [c.name for c in backwards] == ["a", "b", "c"]


def test_one_registry_for_the_process():
    assert plugin_registry() is plugin_registry()
