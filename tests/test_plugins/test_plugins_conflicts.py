"""Two distributions that claim one name: neither has it, and the order decides nothing."""

import pytest

from gemma_hub.errors import BackendNotFoundError, CheckpointNotFoundError, PluginError

ORDERS = [("gemma-hub-a", "other-b"), ("other-b", "gemma-hub-a")]


@pytest.mark.parametrize("order", ORDERS)
def test_neither_wins_in_either_order(environment, order):
    # Each in a folder of its own, so that `order` is the order on sys.path.
    for number, distribution in enumerate(order):
        folder = environment.add_folder(f"path{number}")
        environment.install_backend(distribution, "mlx", folder=folder)
    environment.install_backend("gemma-hub-healthy")
    registry = environment.registry()

    rivals = [info for info in registry.backends() if info.name == "mlx"]
    assert [info.distribution for info in rivals] == ["gemma-hub-a", "other-b"]
    assert {info.state for info in rivals} == {"conflict"}
    assert [problem.phase for problem in registry.problems()] == ["names", "names"]
    choices = 'backend="gemma-hub-a:mlx" or backend="other-b:mlx"'
    with pytest.raises(BackendNotFoundError, match=f"gemma-hub-a and other-b.*{choices}"):
        registry.load("mlx")
    assert registry.load("healthy").name == "healthy"


@pytest.mark.parametrize("chosen", ["gemma-hub-a", "other-b", "Gemma_Hub.A"])
def test_qualified_name_chooses(environment, monkeypatch, chosen):
    environment.install_backend("gemma-hub-a", "mlx")
    environment.install_backend("other-b", "mlx")
    registry = environment.registry()
    loaded = registry.load(f"{chosen}:mlx")
    expected = "other-b" if chosen == "other-b" else "gemma-hub-a"
    assert (loaded.name, loaded.distribution) == ("mlx", expected)
    assert loaded.backend.distribution == expected
    monkeypatch.setenv("GEMMA_HUB_BACKEND", f"{chosen}:mlx")
    assert registry.load() is loaded


def test_qualified_name_works_without_a_conflict(environment):
    environment.install_backend("gemma-hub-a")
    registry = environment.registry()
    assert registry.load("gemma-hub-a:a") is registry.load("a")


def test_qualified_name_of_an_unknown_distribution(environment):
    environment.install_backend("gemma-hub-a", "mlx")
    with pytest.raises(
        BackendNotFoundError, match=r"'gemma-hub-z:mlx'. Did you mean 'gemma-hub-a:mlx'"
    ):
        environment.registry().load("gemma-hub-z:mlx")


def test_rival_that_is_unusable_is_a_rival_still(environment):
    environment.install_backend("gemma-hub-a", "mlx")
    environment.install_backend("other-b", "mlx", fields={"requires": ("no-such-thing",)})
    registry = environment.registry()
    with pytest.raises(BackendNotFoundError, match="all claim the backend name 'mlx'"):
        registry.load("mlx")
    assert [info.state for info in registry.backends()] == ["conflict", "unavailable"]
    assert registry.load("gemma-hub-a:mlx").distribution == "gemma-hub-a"
    with pytest.raises(PluginError, match="no-such-thing"):
        registry.load("other-b:mlx")


def test_plugin_that_failed_is_no_rival_of_one_that_works(environment):
    environment.install("broken-b", "1 / 0", entry="mlx")
    environment.install_backend("gemma-hub-a", "mlx")
    registry = environment.registry()
    assert registry.load("mlx").distribution == "gemma-hub-a"
    states = {info.distribution: info.state for info in registry.backends()}
    assert states == {"gemma-hub-a": "ready", "broken-b": "quarantined"}
    assert [problem.phase for problem in registry.problems()] == ["import"]
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        registry.load("broken-b:mlx")


@pytest.mark.parametrize("order", ORDERS)
def test_one_module_in_two_distributions_is_a_conflict(environment, order):
    """A fork that keeps the import name: both distributions name the module of the last one."""
    module = environment.install_backend(order[0], "mlx")
    environment.install(order[1], "", value=module)
    registry = environment.registry()
    with pytest.raises(BackendNotFoundError, match="gemma-hub-a and other-b all claim"):
        registry.load("mlx")
    assert {info.state for info in registry.backends()} == {"conflict"}


def test_same_entry_point_name_is_no_conflict(environment):
    environment.install_backend("gemma-hub-a", "first", entry="plugin")
    environment.install_backend("other-b", "second", entry="plugin")
    registry = environment.registry()
    assert registry.problems() == ()
    assert registry.load("first").distribution == "gemma-hub-a"
    assert registry.load("second").distribution == "other-b"


@pytest.mark.parametrize("spelling", ["gemma-hub-a", "Gemma_Hub.a"])
def test_same_distribution_twice_is_no_conflict(environment, spelling):
    """As an editable install beside a wheel."""
    module = environment.install_backend("gemma-hub-a")
    environment.install(spelling, "", entry="a", value=module, folder=environment.add_folder("dev"))
    registry = environment.registry()
    assert registry.problems() == ()
    assert [info.state for info in registry.backends()] == ["ready"]


def test_same_distribution_in_two_versions_is_reported_and_the_first_is_used(environment):
    environment.install_backend("gemma-hub-a", "old", version="1.0")
    environment.install_backend(
        "gemma-hub-a", "new", version="2.0", folder=environment.add_folder("dev")
    )
    registry = environment.registry()
    assert registry.load("new").version == "2.0"
    assert [info.name for info in registry.backends()] == ["new"]
    (problem,) = registry.problems()
    assert "as 2.0 and as 1.0; 2.0 comes first and is used" in problem.cause
    assert "pip uninstall gemma-hub-a" in problem.remedy


def test_two_entry_points_of_one_distribution(environment):
    module = environment.install_backend("gemma-hub-a")
    entry_points = next(environment.folders[0].glob("*.dist-info")) / "entry_points.txt"
    entry_points.write_text(f"[gemma_hub]\na = {module}\nb = {module}\n")
    registry = environment.registry()
    assert len(registry.plugins()) == 2
    assert registry.load("a").name == "a"


def checkpoint(name: str, path: str) -> str:
    return f"""
    @hookimpl
    def gemma_hub_checkpoints():
        return [CheckpointSpec(name={name!r}, path={path!r})]
    """


def test_checkpoints_by_name(environment):
    environment.install("gemma-hub-a", checkpoint("small", "folder/a"))
    registry = environment.registry()
    assert registry.checkpoint("small").path == "folder/a"
    assert list(registry.checkpoints()) == ["small"]
    with pytest.raises(
        CheckpointNotFoundError, match=r"'smal'. Did you mean 'small'.*Installed: small"
    ):
        registry.checkpoint("smal")
    with pytest.raises(CheckpointNotFoundError, match="pip install gemma-hub-tiny"):
        registry.checkpoint("tiny")


@pytest.mark.parametrize("order", ORDERS)
def test_checkpoint_that_two_claim(environment, order):
    for number, distribution in enumerate(order):
        folder = environment.add_folder(f"path{number}")
        environment.install(distribution, checkpoint("small", distribution), folder=folder)
    registry = environment.registry()
    assert sorted(registry.checkpoints()) == ["gemma-hub-a:small", "other-b:small"]
    assert registry.checkpoint("other-b:small").path == "other-b"
    assert [problem.phase for problem in registry.problems()] == ["names", "names"]
    with pytest.raises(CheckpointNotFoundError, match="gemma-hub-a:small, other-b:small"):
        registry.checkpoint("small")


def test_checkpoint_of_a_plugin_that_failed(environment):
    environment.install("gemma-hub-small", "1 / 0")
    with pytest.raises(
        CheckpointNotFoundError, match=r"'small' of gemma-hub-small 1.0 failed.*Zero"
    ):
        environment.registry().checkpoint("small")
