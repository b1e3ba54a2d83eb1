"""Plug-ins with one thing wrong: the exit code, the reason and the doctor's words for each."""

import dataclasses
import re
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from gemma_hub.plugins.doctor import diagnose
from gemma_hub_conformance import engine, package, plugin
from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.mutants.plugins import (
    FAILING,
    NAME,
    REFUSED,
    PluginMutant,
    all_plugin_mutants,
    registry,
)

KILLERS = ("hard-exit-at-import", "crash-in-hook")
DOCTORED = [name for name, mutant in all_plugin_mutants().items() if mutant.doctor]


class Site:
    """A folder on sys.path, and `gemma-hub conformance` with what is installed there alone."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self._monkeypatch = monkeypatch

    def conformance(self, *arguments, time_limit=600.0):
        """The result of the command."""
        load, here = engine.load_subject, registry(self.folder)

        def load_here(name, **_):
            return dataclasses.replace(load(name, here), time_limit=time_limit)

        self._monkeypatch.setattr(engine, "load_subject", load_here)
        app = typer.Typer()
        app.command("other")(lambda: None)
        plugin.gemma_hub_cli(app)
        return CliRunner().invoke(app, ["conformance", NAME, "--no-diagnose", *arguments])


@pytest.fixture
def site(tmp_path, monkeypatch):
    for variable in ("GEMMA_HUB_PLUGINS", "GEMMA_HUB_BACKEND", "GEMMA_HUB_PLUGIN_TIMEOUT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Site(tmp_path, monkeypatch)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def install(mutant: PluginMutant, name: str, site: Site, monkeypatch) -> None:
    mutant.install(site.folder)
    if name.startswith("hang"):
        monkeypatch.setenv("GEMMA_HUB_PLUGIN_TIMEOUT", "0.5")
    # Each new process costs a third of a second: none is started that has nothing to show.
    if name not in KILLERS:
        monkeypatch.setattr(engine, "set_aside_what_kills", lambda _: None)
    if name != "slow-import":
        monkeypatch.setattr(package, "LIGHT_RUNS", 1)


@pytest.mark.parametrize("name", REFUSED)
def test_a_plugin_that_cannot_be_loaded_exits_3_and_says_why(site, monkeypatch, name):
    install(REFUSED[name], name, site, monkeypatch)
    start = time.monotonic()
    result = site.conformance("--case", "L0.package.spec")
    assert result.exit_code == 3, result.output
    assert re.search(REFUSED[name].reason, result.output), result.output
    assert time.monotonic() - start < 30  # a hang is 60 s


@pytest.mark.parametrize("name", FAILING)
def test_a_plugin_with_a_fault_exits_1_and_its_case_says_why(site, monkeypatch, name):
    mutant = FAILING[name]
    install(mutant, name, site, monkeypatch)
    limit = 4.0 if name.startswith("hang") else 600.0
    result = site.conformance("--case", mutant.case, time_limit=limit)
    assert result.exit_code == 1, result.output
    assert re.search(rf"{mutant.case}: .*{mutant.reason}", result.output), result.output


@pytest.mark.parametrize("name", DOCTORED)
def test_the_doctor_sees_what_importing_shows(site, monkeypatch, name):
    mutant = all_plugin_mutants()[name]
    install(mutant, name, site, monkeypatch)
    diagnosis = diagnose(registry(site.folder))
    causes = [problem.cause for problem in diagnosis.problems]
    assert any(re.search(mutant.doctor, cause) for cause in causes), causes
    assert not diagnosis.is_healthy


def test_the_same_plugin_without_a_fault_passes_every_case_of_level_0(site):
    PluginMutant(hint="Nothing is wrong.", reason="").install(site.folder)
    ids = [id_ for id_ in all_cases() if id_.startswith("L0")]
    result = site.conformance(*(word for id_ in ids for word in ("--case", id_)))
    assert result.exit_code == 0, result.output
    assert f"{len(ids)} pass" in result.output


def test_what_a_framework_does_when_it_is_imported_is_not_the_backends_fault(site):
    noisy = "import os, random\nprint('hello')\nrandom.seed(0)\nos.environ['NOISY'] = '1'\n"
    code = {"in_forward": "import noisy_framework"}
    files = {"noisy_framework.py": noisy}
    PluginMutant(hint=".", reason="", code=code, files=files).install(site.folder)
    result = site.conformance("--case", "L0.package.quiet", "--case", "L0.package.process_state")
    assert result.exit_code == 0, result.output


def test_what_the_backend_did_before_such_an_import_is_its_fault(site):
    code = {"in_forward": "import random\nrandom.seed(1)\nimport noisy_framework"}
    files = {"noisy_framework.py": "import random\nrandom.seed(2)\n"}
    PluginMutant(hint=".", reason="", code=code, files=files).install(site.folder)
    result = site.conformance("--case", "L0.package.process_state")
    assert result.exit_code == 1, result.output
    assert "a forward changed random's state" in result.output


def test_a_backend_that_kills_a_process_is_not_run_in_this_one(site, monkeypatch):
    mutant = FAILING["hard-exit-in-forward"]
    install(mutant, "", site, monkeypatch)
    result = site.conformance("--case", mutant.case, "--case", "L2.forward.one_token")
    assert result.exit_code == 1, result.output
    assert re.search("L2.forward.one_token: not run: .* status 9", result.output)


def test_every_case_of_level_0_has_a_plugin_that_fails_it():
    level_0 = {id_ for id_ in all_cases() if id_.startswith("L0")}
    assert {mutant.case for mutant in FAILING.values()} == level_0


def test_every_plugin_mutant_says_what_is_right():
    mutants = all_plugin_mutants()
    assert len(mutants) == len(REFUSED) + len(FAILING) >= 36
    assert all(mutant.hint.endswith(".") and mutant.reason for mutant in mutants.values())
    assert not any(mutant.case for mutant in REFUSED.values())
