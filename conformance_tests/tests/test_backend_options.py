"""The suite on a backend with options of its own: every model has them, every file says so."""

import dataclasses
import json
import subprocess
import sys
from typing import ClassVar
from xml.etree import ElementTree

import pytest

from gemma_hub.backend import BuildOptions
from gemma_hub.errors import InputError
from gemma_hub_conformance.diagnosis import diagnose, write_reproduction
from gemma_hub_conformance.diagnosis.matching import KnownBugs
from gemma_hub_conformance.engine import load_subject, run_conformance
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import StandInBackend, control
from gemma_hub_conformance.package import PackageFailure
from gemma_hub_conformance.profiles import required_cases
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.reports import certificate, read_certificate, write_reports
from gemma_hub_numpy.model import Reference

CHOSEN = {"options": ("native=true", "path=a\x01b"), "dtypes": ("float32", "bfloat16")}
NARROW = ("float32", "bfloat16", "float16")  # what numpy has with a witness: float64 is refused
WORDS = "torch with native=true, path=a\x01b (float32, bfloat16 only)"


def given(option, values):
    return [word for value in values for word in (option, value)]


@pytest.fixture
def certified():
    results = tuple(CaseResult(id_, Verdict.PASS, "", 1.0, 1.0, 0.5) for id_ in required_cases())
    return Report("torch", results, required_cases(), **CHOSEN)


# -- models ----------------------------------------------------------------------------------------


class Optional(StandInBackend):
    """Notes the options that it is asked for."""

    asked: ClassVar[list[dict]] = []

    def build(self, config, task, weights, options):
        self.asked.append(dict(options.extra))
        return super().build(config, task, weights, dataclasses.replace(options, extra={}))


@pytest.mark.parametrize("extra", [{}, {"depth": 3, "fast": True}], ids=str)
def test_every_model_is_built_with_the_options(extra, oracle):
    Optional.asked.clear()
    subject = dataclasses.replace(control(), backend=Optional(Reference), extra=extra)
    cases = [
        "L0.claims.nothing_else", "L1.contract.two_models", "L2.cache.capacity",
        "L3.float16.forward.gqa.left_padding", "L4.greedy_steps.ties", "L7.text.bos",
    ]  # fmt: skip
    report = run_conformance(subject, cases, oracle=oracle, seed=3)
    assert report.exit_code == 0, report.results
    assert report.options == (("depth=3", "fast=true") if extra else ())
    assert report.dtypes == ()
    assert len(Optional.asked) > 5
    assert all(each == extra for each in Optional.asked)


def test_a_new_process_builds_with_the_options_too():
    package = load_subject("numpy").package
    assert package is not None
    with pytest.raises(PackageFailure, match="witness is 'x'"):
        package.whole(BuildOptions(dtype="float32", extra={"witness": "x"}), 60.0)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"extra": {"witnes": 1}}, "numpy refuses these options: .*Did you mean 'witness'"),
        ({"extra": {"witness": -1}}, "numpy refuses these options: .*from 0 up"),
        ({"dtypes": ["float32", "int8"]}, "numpy does not claim 'int8'; it claims float64, "),
    ],
)
def test_what_the_backend_has_not_is_refused_before_a_case_runs(chosen, says):
    with pytest.raises(InputError, match=says):
        load_subject("numpy", **chosen)


def test_types_are_narrowed_in_the_order_of_the_claim():
    assert load_subject("numpy", dtypes=["float16", "float32"]).dtypes == ("float32", "float16")
    assert load_subject("numpy").dtypes == ("float64", *NARROW)


def test_types_that_python_leaves_out_are_reported_too(oracle):
    subject = dataclasses.replace(load_subject("numpy"), dtypes=("float32",))
    report = run_conformance(subject, ["L1.contract.devices"], oracle=oracle)
    assert report.summary.startswith("numpy (float32 only) passes")


def test_a_type_that_is_left_out_and_done_all_the_same_fails(oracle):
    subject = load_subject("numpy", dtypes=["float32"])
    report = run_conformance(subject, ["L3.float16.forward.gqa.left_padding"], oracle=oracle)
    (result,) = report.results
    assert result.verdict is Verdict.FAIL
    assert "the unclaimed dtype 'float16' was accepted" in result.message
    assert report.summary.startswith("numpy (float32 only) fails")


def test_a_type_that_the_options_take_away_fails_where_it_is_not_left_out(oracle):
    report = run_conformance(
        load_subject("numpy", extra={"witness": 1}), ["L0.claims.dtypes"], oracle=oracle
    )
    assert "the claimed dtype 'float64' is refused" in report.results[0].message


# -- the command -----------------------------------------------------------------------------------


def test_the_command_runs_with_options_types_and_a_seed(run, tmp_path):
    cases = ["L0.package.fresh_process", "L0.claims.dtypes", "L2.forward.one_token"]
    command = ["numpy", "--seed", 5, *given("--case", cases), "--report"]
    chosen = ["--option", "witness=900", *given("--dtype", NARROW)]
    plain = run(*command, tmp_path / "plain")
    outcome = run(*command, tmp_path / "chosen", *chosen)
    assert plain.exit_code == outcome.exit_code == 0, outcome.output
    words = "numpy with witness=900 (float32, bfloat16, float16 only)"
    assert f"{words} passes the selected cases: 3 pass" in outcome.output
    assert f"Conformance of {words}" in " ".join(outcome.output.split())
    other, content = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("plain", "chosen")
    )
    assert (content["options"], content["dtypes"]) == (["witness=900"], list(NARROW))
    assert (other["options"], other["dtypes"]) == ([], [])
    assert content["seed"] == 5
    # The witness is another one than that of no option, in this process and in the new one.
    for one, two in zip(other["cases"], content["cases"], strict=True):
        assert one["ratio"] is None or one["ratio"] != two["ratio"], one["id"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--option", "witnes=1"], "numpy refuses these options"),
        (["--option", "witness"], "is no NAME=VALUE"),
        (["--dtype", "int8"], "numpy does not claim 'int8'"),
    ],
)
def test_a_wrong_option_exits_2_before_a_case_runs(run, arguments, says):
    outcome = run("numpy", "--case", "L2.forward.one_token", *arguments)
    assert outcome.exit_code == 2
    assert says in outcome.output
    assert "Conformance of" not in outcome.output


def test_a_recheck_takes_the_options_of_the_certificate(run, tmp_path, certified, monkeypatch):
    path = tmp_path / "certificate.json"
    chosen = {"options": ("witness=900",), "dtypes": NARROW, "backend": "numpy"}
    found = certificate.content(dataclasses.replace(certified, **chosen))
    path.write_text(json.dumps(found | {"profile": "bf16"}))
    monkeypatch.setattr("secrets.randbelow", lambda _: 5)
    outcome = run("--recheck", path, "--json", tmp_path / "report.json")
    assert outcome.exit_code == 0, outcome.output
    content = json.loads((tmp_path / "report.json").read_text())
    assert (content["options"], content["dtypes"]) == (["witness=900"], list(NARROW))
    assert content["summary"].startswith("numpy with witness=900 (float32, bfloat16, float16 only)")
    for more in (["--option", "witness=900"], ["--dtype", "float32"]):
        outcome = run("--recheck", path, *more)
        assert outcome.exit_code == 2
        assert "takes options and types from the certificate" in outcome.output


# -- what a run leaves -----------------------------------------------------------------------------


def test_every_file_names_options_and_types(certified, tmp_path):
    folder = tmp_path / "report"
    write_reports(folder, certified)
    badge = json.loads((folder / "badge.json").read_text())
    assert badge["label"] == "gemma conformance (native=true, path=a\x01b, float32, bfloat16)"
    assert badge["message"] == "certified"
    assert certified.summary.startswith(f"{WORDS} is certified: ")
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    assert suite.get("name") == f"gemma_hub conformance of {WORDS}".replace("\x01", "\ufffd")
    page = (folder / "index.html").read_text("utf-8")
    assert "<dt>Options</dt><dd>native=true, path=a\x01b</dd>" in page
    assert "<dt>Types</dt><dd>float32, bfloat16 only</dd>" in page
    for name in ("report", "certificate"):
        content = json.loads((folder / f"{name}.json").read_text())
        assert {key: tuple(content[key]) for key in CHOSEN} == CHOSEN
    found = read_certificate(folder / "certificate.json")
    assert (found.options, found.dtypes) == (CHOSEN["options"], CHOSEN["dtypes"])


def test_a_run_without_options_is_called_what_it_was(certified, tmp_path):
    plain = dataclasses.replace(certified, options=(), dtypes=())
    write_reports(tmp_path / "report", plain)
    badge = json.loads((tmp_path / "report" / "badge.json").read_text())
    assert badge["label"] == "gemma conformance"
    assert plain.summary.startswith("torch is certified: ")
    assert "<dt>Options</dt>" not in (tmp_path / "report" / "index.html").read_text("utf-8")


def test_a_certificate_from_before_there_were_options(certified, tmp_path):
    path, content = tmp_path / "certificate.json", certificate.content(certified)
    older = {key: value for key, value in content.items() if key not in CHOSEN}
    path.write_text(json.dumps(older))
    assert (read_certificate(path).options, read_certificate(path).dtypes) == ((), ())
    for wrong in ("native=true", [1], {"native": True}):
        path.write_text(json.dumps(content | {"options": wrong}))
        with pytest.raises(InputError, match=r"options is .*expected a list of texts"):
            read_certificate(path)


@pytest.mark.parametrize("extra", [{}, {"native": True}], ids=str)
def test_a_reproduction_loads_with_the_options(extra, oracle, tmp_path):
    bug, case = all_mutants()["mlp-gelu-erf"], "L2.forward.gqa.no_padding"
    subject = dataclasses.replace(bug.subject(), name="numpy", backend=Wrong(bug.kind), extra=extra)
    result = CaseResult(case, Verdict.FAIL, "wrong", 9.0, 9.0, 0.0)
    report = Report("numpy", (result,), (), selected=True)
    known = KnownBugs(oracle, {bug.name: bug})
    script = write_reproduction(diagnose(subject, report, oracle, known=known)[0], tmp_path / "r")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if extra:  # which numpy has not
        assert "'native' is not an option of the backend 'numpy'" in done.stderr
        other = subprocess.run([sys.executable, script, "gemma-hub-numpy:numpy"], check=False)
        assert other.returncode == 0
    else:
        assert done.returncode == 0, done.stderr  # the real one is right


class Wrong(StandInBackend):
    def build(self, config, task, weights, options):
        return super().build(config, task, weights, dataclasses.replace(options, extra={}))


# -- pytest ----------------------------------------------------------------------------------------


def run_pytest(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs"]
    command += ["gemma_hub_conformance", "--gemma-backend", "numpy", "-k", "L0.claims.dtypes"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_pytest_runs_with_options_and_types(tmp_path):
    chosen = ["--gemma-option", "witness=9", *given("--gemma-dtype", NARROW)]
    result = run_pytest(tmp_path, *chosen)
    assert result.returncode == 0, result.stdout
    words = "conformance of numpy with witness=9 (float32, bfloat16, float16 only): 1 pass"
    assert words in result.stdout


@pytest.mark.parametrize(
    ("option", "says"),
    [("witness", "is no NAME=VALUE"), ("witnes=9", "numpy refuses these options")],
)
def test_pytest_with_a_wrong_option_is_an_error(tmp_path, option, says):
    result = run_pytest(tmp_path, "--gemma-option", option)
    assert result.returncode == 2, result.stdout
    assert says in result.stdout
    assert "Traceback" not in result.stdout
    assert "raise " not in result.stdout  # no code either
