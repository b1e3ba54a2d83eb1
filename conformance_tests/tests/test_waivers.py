"""Waivers: what lets a failure pass, and what does not."""

import datetime

import pytest

from gemma_hub.errors import InputError
from gemma_hub_conformance.engine import run_conformance
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.report import CaseResult, Verdict
from gemma_hub_conformance.waivers import Waiver, apply_waivers, read_waivers

CASE = "L2.forward.one_token"
TODAY = datetime.date(2026, 11, 26)
GOOD = f'[[waiver]]\ncase = "{CASE}"\nreason = "A table."\nbound = 40\nexpires = 2027-06-30\n'


def result(verdict=Verdict.FAIL, ratio=20.0, worst=30.0):
    return CaseResult(CASE, verdict, "too far", ratio, worst, 0.1)


def waiver(**changes):
    return Waiver(**({"case": CASE, "reason": "r", "bound": 40.0, "expires": TODAY} | changes))


def test_a_file_of_waivers(tmp_path):
    path = tmp_path / "waivers.toml"
    path.write_text(GOOD)
    assert read_waivers(path) == (Waiver(CASE, "A table.", 40.0, datetime.date(2027, 6, 30)),)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no waivers"),
        ("x = 1", "expected \\[\\[waiver\\]\\] tables only"),
        ("[[waiver]", "is not TOML"),
        (GOOD + GOOD, "twice"),
        (GOOD.replace(CASE, "L2.forward.one_tokens"), "Did you mean"),
        (GOOD.replace('"A table."', '" "'), "expected a sentence"),
        (GOOD.replace("40", "-1"), "expected a number above 0"),
        (GOOD.replace("40", "inf"), "expected a number above 0"),
        (GOOD.replace("40", "true"), "expected a number above 0"),
        (GOOD.replace("2027-06-30", '"2027"'), "expected a date"),
        (GOOD.replace("2027-06-30", "2027-06-30T10:00:00"), "expected a date"),
        (GOOD.replace("expires", "until"), "expected bound, case, expires, reason"),
        ('waiver = ["L2"]', "expected bound"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, content, says):
    path = tmp_path / "waivers.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        read_waivers(path)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_waivers(tmp_path / "waivers.toml")
    (tmp_path / "waivers.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8"):
        read_waivers(tmp_path / "waivers.toml")
    (tmp_path / "waivers.toml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(InputError, match="more than 1,048,576 bytes"):
        read_waivers(tmp_path / "waivers.toml")


def test_a_failure_within_the_bound_is_waived():
    (waived,), problems = apply_waivers([result()], [waiver()], TODAY)
    assert waived.verdict is Verdict.WAIVED
    assert "waived until 2026-11-26: r (too far)" in waived.message
    assert problems == ()


@pytest.mark.parametrize(
    ("found", "changes", "says"),
    [
        (result(ratio=41.0), {}, "above 40"),
        (result(worst=41.0), {}, "above 40"),
        (result(worst=float("nan")), {}, "above 40"),
        (result(), {"expires": TODAY - datetime.timedelta(days=1)}, "it expired on 2026-11-25"),
        (result(Verdict.PASS), {}, "does not fail"),
        (result(Verdict.UNSUPPORTED), {}, "does not fail"),
        (result(Verdict.ERROR), {}, "an exception cannot be waived"),
        (result(ratio=None, worst=None), {}, "compares no numbers"),
    ],
)
def test_what_no_waiver_lets_pass(found, changes, says):
    (left,), (problem,) = apply_waivers([found], [waiver(**changes)], TODAY)
    assert left == found
    assert says in problem


def test_a_run_with_waivers_exits_with_4_and_never_with_0():
    mutant = all_mutants()["mlp-gelu-erf"]
    ids = ["L2.forward.one_token", "L2.forward.single_row", "L1.contract.devices"]
    subject = mutant.subject()
    plain = run_conformance(subject, ids)
    assert plain.exit_code == 1
    until = datetime.date.today() + datetime.timedelta(days=1)
    waivers = [Waiver(id_, "r", 1e9, until) for id_ in ids[:2]]
    report = run_conformance(subject, ids, waivers=waivers)
    assert report.exit_code == 4, report.summary
    assert "but for what is waived" in report.summary
    assert [each["case"] for each in report.to_dict()["waivers"]] == ids[:2]
    narrow = [Waiver(id_, "r", 6.0, until) for id_ in ids[:2]]
    assert run_conformance(subject, ids, waivers=narrow).exit_code == 1
    useless = [*waivers, Waiver(ids[2], "r", 1e9, until)]
    assert run_conformance(subject, ids, waivers=useless).exit_code == 1
