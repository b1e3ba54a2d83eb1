"""`gemma-hub new-backend`: what it writes, and what it refuses."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gemma_hub
from gemma_hub.cli.app import app
from gemma_hub.errors import InputError
from gemma_hub.new_backend import render, rendered_files, rendering
from gemma_hub.new_backend.rendering import LONGEST_NAME
from gemma_hub.plugins.registry import plugin_registry

FILES = [
    "README.md",
    "gemma_hub_abacus/__init__.py",
    "gemma_hub_abacus/backend.py",
    "gemma_hub_abacus/model.py",
    "gemma_hub_abacus/plugin.py",
    "pyproject.toml",
    "tests/test_conformance.py",
]


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["new-backend", *arguments])


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_command_makes_the_folder_and_says_what_next(cli, tmp_path):
    result = cli("abacus")
    assert result.exit_code == 0, result.output
    assert everything(tmp_path) == [f"gemma-hub-abacus/{path}" for path in FILES]
    assert 'pip install -e "gemma-hub-abacus[test]"' in result.output
    assert "gemma-hub conformance abacus" in result.output


def test_the_command_takes_a_folder(cli, tmp_path):
    assert cli("abacus", "--dir", "mine").exit_code == 0
    assert everything(tmp_path / "mine") == FILES


def test_the_command_refuses(cli, tmp_path):
    result = cli("Abacus")
    assert result.exit_code == 1
    assert "such as 'abacus'" in result.output
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_plugin_that_imports_no_framework_to_be_listed(tmp_path, site):
    registry = site.install(render("my_abacus2", tmp_path / "made"))
    (info,) = (each for each in registry.backends() if each.name == "my_abacus2")
    assert (info.state, info.distribution) == ("ready", "gemma-hub-my-abacus2")
    assert [p for p in registry.problems() if p.distribution == info.distribution] == []
    assert "gemma_hub_my_abacus2.backend" not in sys.modules
    assert type(registry.load("my_abacus2").backend).__name__ == "MyAbacus2Backend"


@pytest.mark.parametrize(("name", "tools"), [("ab", 3), ("m" * LONGEST_NAME, 2)])
def test_tools_are_content_with_short_and_long_names(name, tools, tmp_path, check_code):
    check_code(render(name, tmp_path / "made"), tools)  # types do not depend on names


def test_nothing_is_left_to_fill_in():
    for path, content in rendered_files("abacus").items():
        assert "$" not in path + content
        assert "package/" not in path


def test_nothing_in_it_is_a_copy_of_what_could_be_imported():
    root = Path(gemma_hub.__file__).parent
    ours = {body for path in root.rglob("*.py") for body in bodies(path.read_text("utf-8"))}
    assert len(ours) > 200
    for path, content in rendered_files("abacus").items():
        if path.endswith(".py"):
            assert not ours & bodies(content), path


def bodies(source: str) -> set[str]:
    """What the functions of a module do, if it is more than one statement."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    statements = [[s for s in each.body if not _is_text(s)] for each in functions]
    return {" ".join(map(ast.dump, each)) for each in statements if len(each) > 1}


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Abacus", "such as 'abacus'"),
        ("my-abacus", "such as 'my_abacus'"),
        ("2fast", "such as 'fast'"),
        ("_hidden", "such as 'hidden'"),
        ("ends_", "such as 'ends'"),
        ("two__lines", "such as 'two_lines'"),
        ("", "such as 'abacus'"),
        ("../up", "such as 'up'"),
        ("a\nb", "such as 'a_b'"),
        ("ábaco", "such as 'baco'"),
        (None, "The name is None"),
        ("class", "keyword of Python"),
        ("match", "keyword of Python"),
        ("x" * (LONGEST_NAME + 1), f"at most {LONGEST_NAME}"),
        ("tiny", "taken by a plug-in of gemma-hub-tiny"),
        ("numpy", "taken by a backend of gemma-hub-numpy"),
    ],
)
def test_a_name_that_cannot_be_used(name, reason, tmp_path):
    installed = {plugin.entry_point for plugin in plugin_registry().plugins()}
    if "taken" in reason and name not in installed:
        pytest.skip(f"{name} is not installed")
    with pytest.raises(InputError) as caught:
        render(name, tmp_path / "made")
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_package_or_a_distribution_that_is_there(tmp_path, site, monkeypatch):
    made = render("abacus", tmp_path / "made")
    registry = site.install(made)
    with pytest.raises(InputError, match="taken by a backend of gemma-hub-abacus"):
        render("abacus", tmp_path / "again", registry)
    other = tmp_path / "other"
    (other / "gemma_hub_slide_rule").mkdir(parents=True)
    (other / "gemma_hub_slide_rule/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(other))
    with pytest.raises(InputError, match="package gemma_hub_slide_rule, which is installed"):
        render("slide_rule", tmp_path / "again")


@pytest.mark.parametrize("what", ["folder", "file", "broken link"])
def test_what_is_there_is_left_alone(what, tmp_path):
    target = tmp_path / "made"
    if what == "folder":
        target.mkdir()
    elif what == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"exists already\. Choose another folder"):
        render("abacus", target)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert what != "file" or target.read_text() == "mine"


def test_the_folder_around_must_exist(tmp_path):
    with pytest.raises(InputError, match=r"There is no folder .*nowhere"):
        render("abacus", tmp_path / "nowhere" / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    write, written = rendering._write, []

    def failing(path: Path, content: str) -> None:
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        write(path, content)
        written.append(path)

    monkeypatch.setattr(rendering, "_write", failing)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        render("abacus", tmp_path / "made")
    assert all(path.name and not path.exists() for path in written)
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_has_the_templates():
    project = Path(gemma_hub.__file__).parents[1] / "pyproject.toml"
    if not project.exists():
        pytest.skip("gemma_hub is not installed from its source")
    wheel = tomllib.loads(project.read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["gemma_hub"]}  # all that is under it, unless something excludes
