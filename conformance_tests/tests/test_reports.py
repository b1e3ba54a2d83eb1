"""The files of a run: what they say of passes, failures, waivers and of a partial run."""

import copy
import dataclasses
import datetime
import json
import math
from html.parser import HTMLParser
from importlib import resources
from xml.etree import ElementTree

import pytest
import typer
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from gemma_hub.errors import InputError
from gemma_hub_conformance import plugin
from gemma_hub_conformance.diagnosis import Diagnosis, diagnose
from gemma_hub_conformance.diagnosis.matching import KnownBugs
from gemma_hub_conformance.engine import device_of, run_conformance
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.mutants.bank import StandInBackend, StandInModel, control
from gemma_hub_conformance.profiles import required_cases
from gemma_hub_conformance.report import SCHEMA, CaseResult, Distance, Report, Verdict
from gemma_hub_conformance.reports import certificate, read_certificate, write_reports
from gemma_hub_conformance.reports.writing import FILES
from gemma_hub_conformance.waivers import Waiver
from gemma_hub_numpy.model import Reference

NASTY = "<script>alert(1)</script> & \x1b[31m \ud800"


def result(id_, verdict=Verdict.PASS, message="", ratio=1.1):
    return CaseResult(id_, verdict, message, ratio, ratio, 0.5)


@pytest.fixture
def certified():
    results = tuple(result(id_) for id_ in required_cases())
    return Report("numpy", results, required_cases(), distribution="gemma-hub-numpy", version="0.1")


@pytest.fixture
def failed(certified):
    first, second, *others = certified.results
    return dataclasses.replace(
        certified,
        results=(
            dataclasses.replace(first, verdict=Verdict.FAIL, message=NASTY, ratio=float("inf")),
            dataclasses.replace(
                second, verdict=Verdict.ERROR, message="ValueError: no", ratio=None
            ),
            *others,
        ),
    )


CAUSE = Diagnosis("L2.x", "gelu-erf", 0.98, "Use tanh.", 1, "head", (1, 2), "98 %\nlayer <1>")


class Page(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_certified_run_has_all_files(certified, tmp_path):
    write_reports(tmp_path / "deep" / "report", certified)
    folder = tmp_path / "deep" / "report"
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(FILES)
    badge = json.loads((folder / "badge.json").read_text())
    assert (badge["message"], badge["color"], badge["isError"]) == (
        "certified",
        "brightgreen",
        False,
    )
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    assert suite.get("tests") == str(len(required_cases())) == str(len(suite.findall("testcase")))
    assert suite.get("failures") == suite.get("errors") == suite.get("skipped") == "0"
    content = json.loads((folder / "report.json").read_text())
    assert (content["exit_code"], content["causes"]) == (0, [])
    assert read_certificate(folder / "certificate.json").profile == "full"
    write_reports(folder, certified)  # a report replaces a report


def test_a_failed_run(failed, tmp_path):
    write_reports(tmp_path / "report", failed, [CAUSE])
    folder = tmp_path / "report"
    assert not (folder / "certificate.json").exists()
    assert json.loads((folder / "badge.json").read_text())["message"] == "failed"
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    (failure,) = suite.iter("failure")
    assert failure.get("message") == "<script>alert(1)</script> & \ufffd[31m \ufffd"
    content = json.loads((folder / "report.json").read_text())
    assert content["cases"][0]["ratio"] == "inf"
    assert content["causes"][0]["mutant"] == "gelu-erf"


def test_the_page_shows_everything_and_loads_nothing(failed, tmp_path):
    write_reports(tmp_path / "report", failed, [CAUSE])
    page = Page((tmp_path / "report" / "index.html").read_text("utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    for text in (
        failed.summary,
        "ValueError: no",
        "<script>alert(1)</script>",
        "gelu-erf",
        "layer <1>",
    ):
        assert text in page.text
    cells = [a for tag, a in page.tags if tag == "li" and "cell" in (a.get("class") or "")]
    assert len(cells) == len(failed.results)
    assert [a["class"] for a in cells[:3]] == ["cell fail", "cell error", "cell pass"]


def test_waivers_and_their_problems_are_in_every_file(certified, tmp_path):
    first, *others = certified.results
    until = datetime.date(2027, 1, 1)
    waived = dataclasses.replace(
        certified,
        results=(dataclasses.replace(first, verdict=Verdict.WAIVED, message="waived: r"), *others),
        waivers=(Waiver(first.id, "r", 9.0, until),),
    )
    write_reports(tmp_path / "a", waived)
    assert json.loads((tmp_path / "a" / "badge.json").read_text())["message"] == (
        "certified with waivers"
    )
    assert json.loads((tmp_path / "a" / "certificate.json").read_text())["waived"] == [first.id]
    assert json.loads((tmp_path / "a" / "report.json").read_text())["exit_code"] == 4
    assert "waived: r" in (tmp_path / "a" / "junit.xml").read_text()
    assert "waived: r" in (tmp_path / "a" / "index.html").read_text()
    spoilt = dataclasses.replace(waived, problems=("The waiver expired.",))
    write_reports(tmp_path / "b", spoilt)
    assert ElementTree.parse(tmp_path / "b" / "junit.xml").getroot().get("failures") == "1"
    assert "The waiver expired." in (tmp_path / "b" / "index.html").read_text()
    assert not (tmp_path / "b" / "certificate.json").exists()


def test_a_run_with_too_few_cases_is_vacuous_everywhere(certified, tmp_path):
    fewer = dataclasses.replace(certified, results=certified.results[:-1])
    write_reports(tmp_path / "report", fewer)
    assert json.loads((tmp_path / "report" / "badge.json").read_text())["message"] == "vacuous"
    assert ElementTree.parse(tmp_path / "report" / "junit.xml").getroot().get("failures") == "1"
    assert required_cases()[-1] in (tmp_path / "report" / "index.html").read_text()
    assert not (tmp_path / "report" / "certificate.json").exists()


def test_selected_cases_certify_nothing(certified, tmp_path):
    chosen = dataclasses.replace(certified, results=certified.results[:2], selected=True)
    write_reports(tmp_path / "report", chosen)
    assert json.loads((tmp_path / "report" / "badge.json").read_text())["message"] == "partial"
    assert not (tmp_path / "report" / "certificate.json").exists()


def test_a_folder_with_something_else_is_left_alone(certified, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis\.txt, which is no report"):
        write_reports(tmp_path, certified)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="cannot be the report's folder"):
        write_reports(tmp_path / "thesis.txt", certified)


def test_a_folder_that_cannot_be_written(certified, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_reports(tmp_path / "file" / "report", certified)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is no certificate"),
        ('{"schema": 2}', "is no certificate"),
        ('{"schema": 1}', "backend is None; expected a text"),
    ],
)
def test_a_certificate_that_is_none(tmp_path, text, says):
    (tmp_path / "certificate.json").write_text(text)
    with pytest.raises(InputError, match=says):
        read_certificate(tmp_path / "certificate.json")


def test_a_certificate_that_is_not_there(tmp_path):
    path = tmp_path / "certificate.json"
    with pytest.raises(InputError, match=r"certificate\.json cannot be read"):
        read_certificate(path)


def test_a_certificate_says_what_has_changed(certified, tmp_path):
    path = tmp_path / "certificate.json"
    content = certificate.content(certified)
    path.write_text(json.dumps(content | {"manifest": "0" * 64}))
    first, second = read_certificate(path).changes
    assert "required cases are others" in first
    assert "gemma-hub-numpy is 0.1.0 and was 0.1" in second
    for change in ({"profile": "none"}, {"seed": True}, {"backend": 3}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(InputError):
            read_certificate(path)


def test_the_command_rechecks_a_certificate_with_a_fresh_seed(tmp_path, certified, monkeypatch):
    app = typer.Typer()
    app.command("other")(lambda: None)
    plugin.gemma_hub_cli(app)
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(certificate.content(certified) | {"profile": "bf16", "seed": 7}))
    drawn = iter([5])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(drawn))
    report = tmp_path / "report"
    command = ["conformance", "--recheck", str(path), "--report", str(report)]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    content = json.loads((report / "report.json").read_text())
    assert (content["seed"], content["profile"], content["backend"]) == (5, "bf16", "numpy")
    other = CliRunner().invoke(app, ["conformance", "torch", "--recheck", str(path)])
    assert other.exit_code == 2
    assert "is about 'numpy', not 'torch'" in other.output


def test_a_certificate_names_what_failed_and_was_waived_only(certified):
    # The waiver of a case that is not in the profile is of no use, and excuses nothing.
    unused = Waiver("L3.float16.of.another_profile", "r", 9.0, datetime.date(2027, 1, 1))
    assert certificate.content(dataclasses.replace(certified, waivers=(unused,)))["waived"] == []


# -- schemas ---------------------------------------------------------------------------------------

SCHEMAS = ("report", "certificate", "badge")


def schema(name):
    folder = resources.files("gemma_hub_conformance.reports").joinpath("schema")
    return json.loads(folder.joinpath(f"{name}.json").read_text("utf-8"))


def fits(name, document):
    return Draft202012Validator(schema(name)).is_valid(document)


def objects(node):
    """Every schema of an object in a schema."""
    if isinstance(node, dict):
        if "properties" in node and node.get("type") == "object":
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from objects(each)


def paths(document, path=()):
    """The path of everything in a document."""
    yield path
    if isinstance(document, dict | list):
        keys = document if isinstance(document, dict) else range(len(document))
        for key in keys:
            yield from paths(document[key], (*path, key))


def at(document, path):
    for key in path:
        document = document[key]
    return document


def replaced(document, path, value):
    if not path:
        return value
    changed = copy.deepcopy(document)
    at(changed, path[:-1])[path[-1]] = value
    return changed


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_leaves_nothing_open(name):
    Draft202012Validator.check_schema(schema(name))
    assert "$id" not in schema(name)
    assert schema(name)["description"]
    for each in objects(schema(name)):
        assert each["additionalProperties"] is False
        assert sorted(each["required"]) == sorted(each["properties"])


class Raises(StandInModel):
    def forward(self, inputs):
        raise ZeroDivisionError("on purpose")


@pytest.fixture(scope="module")
def run_files(oracle, tmp_path_factory):
    """What real runs write: {run: {file: JSON}}."""
    cases = ["L1.contract.devices", "L2.hidden_states.gqa", "L2.forward.one_token"]
    raising = dataclasses.replace(
        control(), name="raising", backend=StandInBackend(Reference, Raises)
    )
    bugs = {name: all_mutants()[name] for name in ("mlp-gelu-erf", "mlp-silu")}
    until = datetime.date(2099, 1, 1)
    found = {}
    for name, subject, waivers in (
        ("pass", control(), ()),
        ("fail", bugs["mlp-gelu-erf"].subject(), ()),
        ("error", raising, ()),
        ("waived", bugs["mlp-gelu-erf"].subject(), [Waiver(i, "r", 1e9, until) for i in cases[1:]]),
        ("spoilt", control(), [Waiver(cases[1], "r", 1e9, until)]),
    ):
        report = run_conformance(subject, cases, oracle=oracle, waivers=waivers)
        causes = diagnose(subject, report, oracle, known=KnownBugs(oracle, bugs))
        folder = tmp_path_factory.mktemp("reports") / name
        write_reports(folder, report, causes)
        found[name] = {each.stem: json.loads(each.read_text()) for each in folder.glob("*.json")}
    return found


def test_what_real_runs_write_fits_the_schemas(run_files):
    codes = {name: files["report"]["exit_code"] for name, files in run_files.items()}
    assert codes == {"pass": 0, "fail": 1, "error": 1, "waived": 4, "spoilt": 1}
    assert run_files["fail"]["report"]["causes"][0]["mutant"] == "mlp-gelu-erf"
    assert "ZeroDivisionError" in run_files["error"]["report"]["causes"][0]["exception"]
    assert len(run_files["fail"]["report"]["cases"][1]["layers"]) == 4
    assert run_files["spoilt"]["report"]["problems"]
    for files in run_files.values():
        assert sorted(files) == ["badge", "report"]
        for name, document in files.items():
            Draft202012Validator(schema(name)).validate(document)


DISTANCES = (
    Distance("the truth", "numpy", "gqa", "forward", 1.1),
    Distance("the truth", "torch", "gqa", "forward", math.inf),
    Distance("numpy", "torch", "gqa", "cache", None, "torch: does not claim 'cache'"),
)


CHOSEN = {"options": ("native=true", "path=a=b"), "dtypes": ("float32",)}


@pytest.fixture
def documents(failed, certified, tmp_path):
    """Each file with something in each of its lists, by the name of its schema."""
    waiver = Waiver(required_cases()[0], "r", 9.0, datetime.date(2027, 1, 1))
    layers = dataclasses.replace(failed.results[2], layers=(0.0, 1.5, math.inf))
    cause = dataclasses.replace(CAUSE, alignment=math.nan, takes=("`a=b`",), exception="E")
    full = dataclasses.replace(
        failed,
        results=(*failed.results[:2], layers),
        distances=DISTANCES,
        waivers=(waiver,),
        problems=("The waiver does not count.",),
        **CHOSEN,
    )
    first, *others = certified.results
    waived = dataclasses.replace(first, verdict=Verdict.WAIVED, message="w")
    write_reports(tmp_path / "a", full, [CAUSE, cause])
    results = (waived, *others)
    write_reports(tmp_path / "b", dataclasses.replace(certified, results=results, **CHOSEN))
    read = {
        name: json.loads((tmp_path / folder / f"{name}.json").read_text())
        for folder, name in (("a", "report"), ("b", "certificate"), ("b", "badge"))
    }
    read["report"]["missing"] = read["report"]["missing"][:1]
    return read


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_changed_field_fits_no_longer(documents, name):
    document = documents[name]
    Draft202012Validator(schema(name)).validate(document)
    assert [] not in document.values()
    for path in paths(document):
        value = at(document, path)
        # No field may be an object with such a key, and every object is closed.
        assert not fits(name, replaced(document, path, {"other": 1})), path
        if not isinstance(value, dict):
            continue
        assert not fits(name, replaced(document, path, value | {"other": 1})), path
        for key in value:
            fewer = {k: v for k, v in value.items() if k != key}
            assert not fits(name, replaced(document, path, fewer)), (*path, key)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("report", ("schema",), 2),
        ("report", ("exit_code",), 2),
        ("report", ("seed",), -1),
        ("report", ("counts", "pass"), -1),
        ("report", ("cases", 0, "verdict"), "skipped"),
        ("report", ("cases", 0, "id"), "forward"),
        ("report", ("cases", 0, "ratio"), -1.0),
        ("report", ("cases", 0, "ratio"), "big"),
        ("report", ("cases", 2, "message"), "a pass says nothing"),
        ("report", ("cases", 2, "layers", 0), None),
        ("report", ("waivers", 0, "expires"), "soon"),
        ("report", ("distances", 0, "way"), "backward"),
        ("report", ("distances", 0, "ratio"), None),
        ("report", ("distances", 2, "reason"), ""),
        ("report", ("causes", 0, "shortest_input"), [-1]),
        ("report", ("options", 0), "native"),
        ("report", ("dtypes", 0), ""),
        ("certificate", ("options", 0), "=true"),
        ("certificate", ("dtypes",), ["float32", "float32"]),
        ("certificate", ("schema",), 2),
        ("certificate", ("manifest",), "abc"),
        ("certificate", ("seed",), 0.5),
        ("badge", ("message",), "perfect"),
        ("badge", ("color",), "blue"),
        ("badge", ("schemaVersion",), 2),
    ],
)
def test_a_value_that_cannot_be_does_not_fit(documents, name, path, value):
    assert fits(name, documents[name])
    assert not fits(name, replaced(documents[name], path, value))


def test_the_number_in_the_files_is_that_of_the_schemas():
    assert schema("report")["properties"]["schema"]["const"] == SCHEMA == 1
    assert schema("certificate")["properties"]["schema"]["const"] == 1


def devices_of(value):
    class Named(StandInBackend):
        def devices(self):
            if isinstance(value, BaseException):
                raise value
            return value

    return dataclasses.replace(control(), backend=Named(Reference))


@pytest.mark.parametrize(
    ("found", "device"),
    [
        *((("cuda:0", "cpu"), "cuda:0"), ((), ""), ((1,), ""), (None, "")),
        *((OSError("no"), ""), (SystemExit(0), "")),
    ],
)
def test_the_device_is_the_default_one(found, device):
    assert device_of(devices_of(found)) == device
    assert device_of(dataclasses.replace(devices_of(found), harm="hung")) == ""


@pytest.fixture
def run_wrong(monkeypatch):
    """Runs the command on a wrong backend."""
    app = typer.Typer()
    app.command("other")(lambda: None)
    plugin.gemma_hub_cli(app)
    bug = all_mutants()["mlp-gelu-erf"]
    monkeypatch.setattr("gemma_hub_conformance.engine.load_subject", lambda _, **__: bug.subject())
    command = ["conformance", "x", "--case", "L2.forward.one_token"]
    return lambda *arguments: CliRunner().invoke(app, [*command, *map(str, arguments)])


def test_the_json_option_writes_the_same_as_the_folder(run_wrong, tmp_path):
    folder, file = tmp_path / "report", tmp_path / "report.json"
    outcome = run_wrong("--report", folder, "--json", file)
    assert outcome.exit_code == 1, outcome.output
    content = json.loads(file.read_text())
    assert content == json.loads((folder / "report.json").read_text())
    assert fits("report", content)
    assert [cause["case"] for cause in content["causes"]] == ["L2.forward.one_token"]
    assert content["device"] == "cpu"


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(0)])
def test_a_diagnosis_that_breaks_off_leaves_verdict_and_files(
    run_wrong, monkeypatch, tmp_path, error
):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("gemma_hub_conformance.running.diagnose", broken)
    outcome = run_wrong("--json", tmp_path / "report.json")
    assert outcome.exit_code == 1
    assert f"The diagnosis broke off: {type(error).__name__}" in outcome.output
    assert json.loads((tmp_path / "report.json").read_text())["causes"] == []
