"""JUnit XML: one test case for each case, as CI systems show them."""

import re
from xml.etree import ElementTree

from gemma_hub_conformance.report import CaseResult, Report, Verdict

# What XML 1.0 cannot hold, not even escaped.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    """The document. What is unsupported or waived passes, and says so in its output."""
    counts = report.counts
    suite = ElementTree.Element(
        "testsuite",
        name=_plain(f"gemma_hub conformance of {report.tested}"),
        tests=str(len(report.results) + len(report.missing_of_run) + len(report.problems)),
        failures=str(counts[Verdict.FAIL] + len(report.missing_of_run) + len(report.problems)),
        errors=str(counts[Verdict.ERROR]),
        skipped="0",
        time=f"{sum(result.seconds for result in report.results):.3f}",
    )
    for result in report.results:
        _add(suite, result)
    for id_ in report.missing_of_run:
        case = ElementTree.SubElement(suite, "testcase", classname="manifest", name=id_)
        ElementTree.SubElement(case, "failure", message="required, and did not run")
    for number, problem in enumerate(report.problems, 1):
        case = ElementTree.SubElement(
            suite, "testcase", classname="waivers", name=f"problem {number}"
        )
        ElementTree.SubElement(case, "failure", message=_plain(problem))
    ElementTree.indent(suite)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        + ElementTree.tostring(suite, encoding="unicode")
        + "\n"
    )


def _add(suite: ElementTree.Element, result: CaseResult) -> None:
    group, _, name = result.id.rpartition(".")
    case = ElementTree.SubElement(
        suite, "testcase", classname=group, name=name, time=f"{result.seconds:.3f}"
    )
    if result.verdict in (Verdict.FAIL, Verdict.ERROR):
        kind = "failure" if result.verdict is Verdict.FAIL else "error"
        ElementTree.SubElement(case, kind, message=_plain(result.message))
    elif result.message:
        output = ElementTree.SubElement(case, "system-out")
        output.text = _plain(f"{result.verdict}: {result.message}")


def _plain(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
