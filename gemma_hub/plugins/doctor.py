"""What is installed, what works, what does not and what to do: the data of `gemma-hub doctor`."""

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from gemma_hub.plugins.advice import with_way_out
from gemma_hub.plugins.discovery import Candidate
from gemma_hub.plugins.guard import timeout_from_environment
from gemma_hub.plugins.info import BackendInfo, FormatInfo, PluginInfo
from gemma_hub.plugins.problems import PluginFailure, Problem
from gemma_hub.plugins.registry import PluginRegistry
from gemma_hub.plugins.spec import API_VERSION

IMPORT_BUDGET = 0.05
"""Seconds that a plug-in's light module may take to import, beyond the core's own import."""

_START_UP = 10.0  # seconds that a child may take to start Python and import the core
_STEPS = 5  # steps in a child that have the plug-in's time limit each


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What importing one plug-in and calling its hooks in a process of its own showed.

    Attributes:
        seconds: how long the import took; None if the process did not live to tell.
        frameworks: array frameworks that were imported. The contract says none.
        error: what went wrong; empty if nothing.
    """

    seconds: float | None
    frameworks: tuple[str, ...]
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginDiagnosis:
    """One plug-in: what the registry says of it, and what its import showed.

    Attributes:
        measured: None where the plug-in is switched off, since then it is never imported.
    """

    plugin: PluginInfo
    measured: ImportReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDiagnosis:
    """One installed checkpoint.

    Attributes:
        is_there: whether its folder holds a config.json.
    """

    name: str
    path: str
    summary: str
    is_there: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The state of this installation.

    Attributes:
        versions: {what: version} of python, platform, plug-in API, gemma-hub, the plug-ins'
            distributions and what their backends require ("" where it is not installed).
        plugins: every plug-in.
        backends: every backend, usable or not.
        checkpoints: every installed checkpoint.
        formats: every checkpoint format. A built-in one whose reader is not installed is no
            problem: few need them all.
        problems: everything that is wrong, each with its remedy.
    """

    versions: dict[str, str]
    plugins: tuple[PluginDiagnosis, ...]
    backends: tuple[BackendInfo, ...]
    checkpoints: tuple[CheckpointDiagnosis, ...]
    formats: tuple[FormatInfo, ...]
    problems: tuple[Problem, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong and there is a backend to use."""
        return not self.problems and any(info.state == "ready" for info in self.backends)

    def to_dict(self) -> dict[str, Any]:
        """The same in what JSON has; sets become sorted lists."""
        raw = dataclasses.asdict(self) | {"is_healthy": self.is_healthy}
        result: dict[str, Any] = json.loads(json.dumps(raw, default=sorted))
        return result


def diagnose(
    registry: PluginRegistry, add_commands: Callable[[], object] = lambda: None
) -> Diagnosis:
    """Examine this installation.

    Each plug-in is tried first in a process of its own. One that kills that process, or hangs it
    beyond rescue, is not imported here, if `registry` has not done so before.

    Args:
        registry: the plug-ins to examine.
        add_commands: lets plug-ins extend the command line, for the problems that this has. Called
            when plug-ins that would do harm are set aside.
    """
    limit, _ = timeout_from_environment()
    measured: dict[tuple[str, str], ImportReport] = {}
    for candidate in registry.candidates():
        report = measure_import(candidate, limit)
        measured[candidate.distribution, candidate.name] = report
        if report.seconds is None:
            registry.quarantine(candidate, PluginFailure("import", report.error))
    add_commands()
    plugins = tuple(
        PluginDiagnosis(plugin=info, measured=measured.get((info.distribution, info.entry_point)))
        for info in registry.plugins()
    )
    checkpoints = tuple(
        CheckpointDiagnosis(
            name=name,
            path=spec.path,
            summary=spec.summary,
            is_there=(Path(spec.path) / "config.json").is_file(),
        )
        for name, spec in sorted(registry.checkpoints().items())
    )
    problems = list(registry.problems())
    for candidate in registry.candidates():
        problems += _heavy(candidate, measured[candidate.distribution, candidate.name])
    problems += [_missing(checkpoint) for checkpoint in checkpoints if not checkpoint.is_there]
    backends = registry.backends()
    return Diagnosis(
        versions=_versions(plugins, backends),
        plugins=plugins,
        backends=backends,
        checkpoints=checkpoints,
        formats=tuple(registry.formats().values()),
        problems=tuple(problems),
    )


def measure_import(candidate: Candidate, limit: float) -> ImportReport:
    """Import a plug-in and call its hooks in a new process that finds the same modules.

    Args:
        candidate: the plug-in.
        limit: seconds that each step may take.
    """
    command = [sys.executable, "-P", "-m", "gemma_hub.plugins.import_probe"]
    command += [candidate.name, candidate.entry_point.value, str(limit)]
    folders = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    try:
        child = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": folders},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_START_UP + _STEPS * limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        cause = f"importing it hung a process for {error.timeout:g} s so that it had to be killed"
        return ImportReport(seconds=None, frameworks=(), error=cause)
    try:
        report = json.loads(child.stdout)
    except ValueError:
        cause = f"importing it ended the process with {_ending(child.returncode)}"
        return ImportReport(seconds=None, frameworks=(), error=cause)
    return ImportReport(
        seconds=report["seconds"], frameworks=tuple(report["frameworks"]), error=report["error"]
    )


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _heavy(candidate: Candidate, report: ImportReport) -> list[Problem]:
    """The breach of contract, if the plug-in imported an array framework."""
    if not report.frameworks:
        return []
    remedy = (
        "Report it to its authors: only the factory's module may import an array framework, "
        "since every command pays for what a plug-in imports."
    )
    return [
        Problem(
            distribution=candidate.distribution,
            version=candidate.version,
            entry_point=candidate.name,
            phase="import",
            cause=f"its light module imports {', '.join(report.frameworks)}",
            remedy=with_way_out(remedy, candidate),
        )
    ]


def _missing(checkpoint: CheckpointDiagnosis) -> Problem:
    return Problem(
        distribution="",
        version="",
        entry_point="",
        phase="specs",
        cause=f"checkpoint {checkpoint.name!r} should be in {checkpoint.path}; there is no "
        "config.json",
        remedy="Install the distribution that ships it again.",
    )


def _versions(
    plugins: Sequence[PluginDiagnosis], backends: Sequence[BackendInfo]
) -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "plug-in API": f"{API_VERSION[0]}.{API_VERSION[1]}",
        "gemma-hub": _installed("gemma-hub"),
    }
    for diagnosis in plugins:
        versions[diagnosis.plugin.distribution] = diagnosis.plugin.version
    for info in backends:
        for text in info.spec.requires if info.spec is not None else ():
            name = Requirement(text).name if info.state != "incompatible" else ""
            if name:
                versions[name] = _installed(name)
    return versions


def _installed(name: str) -> str:
    try:
        return metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""
