"""docs/tutorials/port-gemma.md leads where it says: every command and every edit, in order."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemma_hub.cli.app import app

if importlib.util.find_spec("gemma_hub_conformance") is None:
    pytest.skip("the conformance suite is not installed", allow_module_level=True)

from gemma_hub_conformance.diagnosis import diagnose
from gemma_hub_conformance.engine import load_subject, run_conformance
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.report import Report, Verdict

PAGE = Path(__file__).parents[2] / "docs/tutorials/port-gemma.md"

if not PAGE.exists():
    pytest.skip("the documentation is not part of this copy", allow_module_level=True)

MOST_LINES = 150

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"In `(\w+\.py)`[^:`]*:")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        kind: "text" for commands, "py" and "diff" for code.
        text: what is in it.
        file: module that the code goes to; "" for commands.
    """

    kind: str
    text: str
    file: str = ""

    @property
    def new_lines(self) -> list[str]:
        """The lines of code that a reader writes, without empty ones."""
        if self.kind == "py":
            return [line for line in self.text.splitlines() if line.strip()]
        return [line[1:] for line in self.text.splitlines() if line.startswith("+")]


def blocks() -> list[Block]:
    """Every block of the page, in order."""
    text, found = PAGE.read_text("utf-8"), []
    for match in _BLOCK.finditer(text):
        kind, content = match.groups()
        places = [] if kind == "text" else _PLACE.findall(text, 0, match.start())
        found.append(Block(kind, content, *places[-1:]))
    return found


def commands(block: Block) -> list[tuple[list[str], list[str]]]:
    """[(command, the lines that it is said to print)] of a block of text."""
    found: list[tuple[list[str], list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((shlex.split(line[2:]), []))
        else:
            found[-1][1].append(line)
    return found


def apply(block: Block, package: Path) -> None:
    """Edit the module as the page says."""
    path = package / block.file
    source = path.read_text("utf-8")
    if block.kind == "diff":
        source = _patched(source, block.text)
    for node in ast.parse(block.text).body if block.kind == "py" else ():
        code = ast.get_source_segment(block.text, node)
        if isinstance(node, ast.ClassDef):
            source = _extended(source, node.name, code)
        else:
            source = _replaced(source, node.name, code)
    path.write_text(source, encoding="utf-8")


def _patched(source: str, difference: str) -> str:
    lines = difference.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in "- ")
    after = "".join(line[1:] for line in lines if line[0] in "+ ")
    assert source.count(before) == 1, f"not once in the module:\n{before}"
    return source.replace(before, after)


def _extended(source: str, name: str, code: str) -> str:
    """The class, with what comes after the `...` that stands for the rest of it."""
    end = _definition(source, name).end_lineno
    lines = source.splitlines(keepends=True)
    added = re.split(r"^    \.\.\..*\n", code, flags=re.M)[1]
    return "".join([*lines[:end], added, "\n", *lines[end:]])


def _replaced(source: str, name: str, code: str) -> str:
    node = _definition(source, name)
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: node.lineno - 1], code, "\n", *lines[node.end_lineno :]])


def _definition(source: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    (node,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
    )
    return node


def written_lines(path: Path) -> list[str]:
    """The lines of a module that are not empty."""
    return [line for line in path.read_text("utf-8").splitlines() if line.strip()]


class Reader:
    """Does what the page says, in an empty folder."""

    def __init__(self, folder: Path, site) -> None:
        self.folder = folder
        self.site = site
        self.oracle = Oracle()
        self.reports: list[Report] = []
        self.lines_of_model = 0  # when it is certified first

    @property
    def distribution(self) -> Path:
        return self.folder / "gemma-hub-abacus"

    @property
    def package(self) -> Path:
        return self.distribution / "gemma_hub_abacus"

    def follow(self, block) -> None:
        if block.kind != "text":
            apply(block, self.package)
            self.site.restart()
            return
        for command, lines in commands(block):
            printed = self.run(command)
            for line in lines:
                expected = ".*".join(re.escape(part) for part in line.split("..."))
                assert re.search(f"^{expected}$", printed, re.M), f"{command}:\n{printed}"

    def run(self, command: list[str]) -> str:
        match command:
            case ["gemma-hub", "new-backend", name]:
                result = CliRunner().invoke(app, ["new-backend", name])
                assert result.exit_code == 0, result.output
                return result.output
            case ["pip", "install", "-e", folder]:
                self.site.install(self.folder / folder)
                return ""
            case ["gemma-hub", "conformance", "abacus", *options]:
                assert set(options[::2]) <= {"--case"}
                return self.judge(options[1::2])
            case ["gemma-hub", "generate", *arguments]:
                result = CliRunner().invoke(app, ["generate", *arguments])
                assert result.exit_code == 0, result.output
                return result.output
            case ["python", "-m", "pytest"]:
                self.lines_of_model = len(written_lines(self.package / "model.py"))
                return self.test()
        raise AssertionError(f"The test does not know the command {command}.")

    def judge(self, ids: list[str]) -> str:
        subject = load_subject("abacus")
        report = run_conformance(subject, ids or None, oracle=self.oracle)
        self.reports.append(report)
        failed = [
            f"{result.id}: {result.message}"
            for result in report.results
            if result.verdict in (Verdict.FAIL, Verdict.ERROR)
        ]
        causes = diagnose(subject, report, self.oracle) if failed else ()
        return "\n".join([*failed, report.summary, *(cause.text for cause in causes)])

    def test(self) -> str:
        """The distribution's own tests, of which a few stand for all."""
        before = filter(None, [os.environ.get("PYTHONPATH")])
        path = os.pathsep.join([str(self.site.folder), str(self.distribution), *before])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-k", "one_token or devices or gqa-"],
            cwd=self.distribution,
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_the_page_leads_to_a_certified_backend(tmp_path, monkeypatch, site, check_code):
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path, site)
    for block in blocks():
        reader.follow(block)

    full = [report for report in reader.reports if not report.selected]
    assert [report.exit_code for report in full] == [0, 0, 0]  # as rendered, ported, with a cache
    passed = [report.counts[Verdict.PASS] for report in full]
    assert passed[0] == passed[1] < passed[2]
    failed = [report for report in reader.reports if report.exit_code]
    assert len(failed) == 1  # the mistake
    assert reader.lines_of_model < MOST_LINES
    assert f"all of `model.py` has {reader.lines_of_model}." in PAGE.read_text("utf-8")
    check_code(reader.distribution)


def test_the_lines_of_the_author_are_few():
    text = PAGE.read_text("utf-8")
    until_certified = len(_BLOCK.findall(text[: text.index("## 9.")]))
    counts = [0 if block.kind == "text" else len(block.new_lines) for block in blocks()]
    assert sum(counts) < MOST_LINES
    assert f" {sum(counts[:until_certified])} lines of your own" in text
