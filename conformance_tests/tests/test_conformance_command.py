"""`gemma-hub conformance` and the suite under pytest: exit codes and what they print."""

import json
import subprocess
import sys

import pytest

from gemma_hub_conformance.pytest_plugin import ENVIRONMENT_VARIABLE

CASE = "L2.forward.one_token"


@pytest.fixture
def run_pytest(tmp_path, monkeypatch):
    """Runs pytest in an empty folder, as someone who installed the suite does."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_a_case_that_passes_exits_0_and_writes_json(run, tmp_path):
    result = run("numpy", "--case", CASE, "--json", str(tmp_path / "report.json"))
    assert result.exit_code == 0, result.output
    assert "numpy passes the selected cases: 1 pass" in result.output
    content = json.loads((tmp_path / "report.json").read_text())
    assert [case["id"] for case in content["cases"]] == [CASE]


def test_an_unknown_backend_exits_3(run):
    result = run("abacus", "--case", CASE)
    assert result.exit_code == 3
    assert "abacus" in result.output


def test_an_unknown_case_exits_2(run):
    result = run("numpy", "--case", "L9.nothing")
    assert result.exit_code == 2
    assert "There is no case 'L9.nothing'" in result.output


def test_pytest_runs_a_case(run_pytest):
    result = run_pytest("--pyargs", "gemma_hub_conformance", "--gemma-backend", "numpy", "-k", CASE)
    assert result.returncode == 0, result.stdout
    assert "conformance of numpy: 1 pass" in result.stdout


def test_pytest_without_a_backend_is_an_error(run_pytest):
    result = run_pytest("--pyargs", "gemma_hub_conformance")
    assert result.returncode == 2, result.stdout
    assert "The conformance suite needs a backend: pass --gemma-backend NAME" in result.stdout


def test_pytest_with_an_unknown_backend_is_an_error(run_pytest):
    result = run_pytest("--pyargs", "gemma_hub_conformance", "--gemma-backend", "abacus")
    assert result.returncode == 2, result.stdout
    assert "abacus" in result.stdout
    assert "skipped" not in result.stdout


def test_pytest_that_selects_no_case_is_an_error(run_pytest, tmp_path):
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    result = run_pytest("--gemma-backend", "numpy", "test_other.py")
    assert result.returncode == 5, result.stdout
    assert "conformance: no case ran" in result.stdout
    assert run_pytest("test_other.py").returncode == 0


def test_the_plugins_are_light():
    code = (
        "import sys, gemma_hub_conformance.pytest_plugin, gemma_hub_conformance.plugin;"
        "sys.exit(' '.join({'numpy', 'torch', 'jax', 'typer'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stderr.strip() == "", result.stderr
