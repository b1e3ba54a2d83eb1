"""The folder that a diagnosis writes, run as a user runs it: in a process of its own."""

import os
import subprocess
import sys

import pytest

from gemma_hub.error_model import RATIO_LIMIT
from gemma_hub.errors import InputError
from gemma_hub_conformance.diagnosis import diagnose, write_reproduction
from gemma_hub_conformance.diagnosis import reproduction as module
from gemma_hub_conformance.diagnosis.matching import KnownBugs
from gemma_hub_conformance.diagnosis.subjects import noisy
from gemma_hub_conformance.mutants import all_mutants
from gemma_hub_conformance.report import CaseResult, Report, Verdict

PLUGIN = """
from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec
from gemma_hub_conformance.diagnosis.matching import KnownBugs
from gemma_hub_conformance.diagnosis.subjects import noisy
from gemma_hub_conformance.mutants import all_mutants


@hookimpl
def gemma_hub_backends():
    tasks = ("causal_lm", "sequence_classification")
    return [
        BackendSpec(name="broken", api_version="1.0", factory="broken_plugin:Broken",
                    features=frozenset({"cache"}), tasks=tasks)
    ]


class Broken:
    backend = noisy(all_mutants()["NAME"]).backend

    def devices(self):
        return self.backend.devices()

    def build(self, *args):
        return self.backend.build(*args)
"""


def diagnosis(bug, case, oracle):
    result = CaseResult(case, Verdict.FAIL, "wrong", 9.0, 9.0, 0.0)
    mutant = all_mutants()[bug]
    subject, known = noisy(mutant), KnownBugs(oracle, {bug: mutant})
    subject.name = "broken"
    report = Report("broken", (result,), (), selected=True)
    return diagnose(subject, report, oracle, known=known)[0]


def installed(folder, bug):
    """A site folder with a distribution whose backend has the bug."""
    info = folder / "gemma_hub_broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gemma-hub-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gemma_hub]\nbroken = broken_plugin\n")
    (folder / "broken_plugin.py").write_text(PLUGIN.replace("NAME", bug))
    return folder


def run(script, site, *arguments):
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        ("mlp-gelu-erf", "L2.forward.gqa.no_padding"),
        ("cache-k-unrotated", "L2.cache.chunks_of_7_9_7"),
        ("pool-first-token", "L5.sequence.logits.no_padding"),
    ],
)
def test_the_script_fails_on_the_broken_backend_only(bug, case, oracle, tmp_path):
    script = write_reproduction(diagnosis(bug, case, oracle), tmp_path / "reproduction")
    site = installed(tmp_path / "site", bug)
    broken, right = run(script, site), run(script, site, "numpy")
    assert broken.returncode == 1, broken.stderr
    assert "ratio" in broken.stdout
    assert float(broken.stdout.split()[1].rstrip(":")) > RATIO_LIMIT
    assert right.returncode == 0, right.stderr
    assert float(right.stdout.split()[1].rstrip(":")) < RATIO_LIMIT


@pytest.fixture(scope="module")
def gelu(oracle):
    return diagnosis("mlp-gelu-erf", "L2.forward.gqa.no_padding", oracle)


def test_the_folder_holds_what_it_takes_and_the_script_is_short(gelu, tmp_path):
    script = write_reproduction(gelu, tmp_path / "made" / "here")
    there = sorted(str(p.relative_to(script.parent)) for p in script.parent.rglob("*.*"))
    assert there[-2:] == ["numbers.npz", "reproduce.py"]
    assert "checkpoint/model.safetensors" in there
    lines = script.read_text("utf-8").splitlines()
    assert len(lines) <= 30
    imports = [line for line in lines if line.startswith(("import", "from"))]
    allowed = ("gemma_hub ", "gemma_hub.", "numpy", "sys", "pathlib")
    assert all(line.split(maxsplit=1)[1].startswith(allowed) for line in imports)
    assert str(tmp_path) not in script.read_text("utf-8")


def test_a_folder_with_something_in_it_is_left_alone(gelu, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="Choose a new folder"):
        write_reproduction(gelu, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_write_leaves_nothing(gelu, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "savez", lambda *_, **__: full())
    with pytest.raises(InputError, match="No space left"):
        write_reproduction(gelu, tmp_path / "reproduction")
    assert list(tmp_path.iterdir()) == []


def test_a_diagnosis_without_an_input_says_so(oracle, tmp_path):
    found = diagnosis("grad-rope-sign", "L5.gradients.causal.gqa", oracle)
    with pytest.raises(InputError, match="there is nothing to write"):
        write_reproduction(found, tmp_path / "reproduction")
