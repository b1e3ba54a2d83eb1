"""The files of a run: what they say of passes, failures, waivers and of a partial run."""

import dataclasses
import datetime
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from gemma_hub.errors import InputError
from gemma_hub_conformance import plugin
from gemma_hub_conformance.diagnosis import Diagnosis
from gemma_hub_conformance.profiles import required_cases
from gemma_hub_conformance.report import CaseResult, Report, Verdict
from gemma_hub_conformance.reports import certificate, read_certificate, write_reports
from gemma_hub_conformance.reports.writing import FILES
from gemma_hub_conformance.waivers import Waiver

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
