"""A backend's package, as new processes see it: what importing, loading and running it does."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gemma_hub.backend import BuildOptions
from gemma_hub.plugins.guard import timeout_from_environment
from gemma_hub.plugins.info import LoadedBackend
from gemma_hub.plugins.registry import PluginRegistry
from gemma_hub.plugins.spec import BackendSpec
from gemma_hub_conformance.seeds import current_seed

LIGHT_RUNS = 3
"""New processes that the light modules are imported in; the median of their times counts."""

_START_UP = 30.0  # seconds that a new process may take to start Python and import the core
_OURS = {"gemma_hub", "gemma_hub_conformance"}

Answer = TypeVar("Answer")


class PackageFailure(Exception):
    """A new process did not do what it was asked to; the message says why.

    Attributes:
        is_harmful: whether it died or hung, so that nobody should try it in a process of theirs.
    """

    def __init__(self, message: str, *, is_harmful: bool) -> None:
        super().__init__(message)
        self.is_harmful = is_harmful


@dataclass(frozen=True, slots=True, kw_only=True)
class Light:
    """What importing the light modules showed.

    Attributes:
        core_loads: modules of the package that `import gemma_hub` alone imports.
        frameworks: array frameworks that the light modules and their hooks import.
        seconds: processor time of their import, the median.
        specs: the backends that their hooks describe, as JSON; one list for each process.
        error: what went wrong; empty if nothing.
    """

    core_loads: tuple[str, ...]
    frameworks: tuple[str, ...]
    seconds: float
    specs: tuple[list[dict[str, Any]], ...]
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What loading the backend, building a model and one forward showed.

    Attributes:
        changes: what they changed of the process, in words.
        printed: what they wrote to stdout and stderr, in words.
        logits: of the forward.
    """

    changes: tuple[str, ...]
    printed: tuple[str, ...]
    logits: np.ndarray


@dataclass(slots=True)
class Package:
    """Where a backend comes from, so that a new process can load it.

    A new process finds the modules that this one finds. What it showed is kept.

    Attributes:
        spec: what the plug-in says of the backend.
        entry_points: (name, value) of each plug-in of its distribution.
    """

    spec: BackendSpec
    entry_points: tuple[tuple[str, str], ...]
    _light: Light | PackageFailure | None = None
    _whole: dict[str, Whole | PackageFailure] = field(default_factory=dict)

    def light(self) -> Light:
        """Import the light modules, each time in a new process.

        Raises:
            PackageFailure: a process died or hung.
        """
        if self._light is None:
            try:
                self._light = self._observed_light()
            except PackageFailure as failure:
                self._light = failure
        return _or_raise(self._light)

    def whole(self, options: BuildOptions, time_limit: float) -> Whole:
        """Load the backend, build a model with the run's seed and run it once in a new process.

        Args:
            options: what the model is built with, but for the type, which is float32.
            time_limit: seconds that this may take.

        Raises:
            PackageFailure: something was raised, or the process died or hung.
        """
        asked = {"device": options.device, "extra": dict(options.extra), "seed": current_seed()}
        key = json.dumps(asked, sort_keys=True)
        if key not in self._whole:
            try:
                self._whole[key] = self._observed_whole(asked, time_limit)
            except PackageFailure as failure:
                self._whole[key] = failure
        return _or_raise(self._whole[key])

    def _found(self) -> dict[str, Any]:
        """Its plug-ins, and the names of the packages that its code is in."""
        modules = [self.spec.factory, *(value for _, value in self.entry_points)]
        packages = {module.partition(":")[0].partition(".")[0] for module in modules} - _OURS
        return {"entry_points": self.entry_points, "packages": sorted(packages)}

    def _observed_light(self) -> Light:
        steps, limit = 2 + 3 * len(self.entry_points), timeout_from_environment()[0]
        request = {"part": "light", "limit": limit, **self._found()}
        reports = [
            observed(request, _START_UP + steps * limit, "importing its light module")[0]
            for _ in range(LIGHT_RUNS)
        ]
        first = reports[0]
        return Light(
            core_loads=tuple(first["core_loads"]),
            frameworks=tuple(first["frameworks"]),
            seconds=statistics.median(report["seconds"] for report in reports),
            specs=tuple(report["specs"] for report in reports),
            error=first["error"],
        )

    def _observed_whole(self, asked: Mapping[str, Any], time_limit: float) -> Whole:
        request = {"part": "whole", "name": self.spec.name, **asked, **self._found()}
        what = "loading it, building a model and running it"
        report, logits = observed(request, time_limit, what)
        if report["error"]:
            raise PackageFailure(f"in a new process {report['error']}", is_harmful=False)
        assert logits is not None  # it is written where there is no error
        changes, printed = tuple(report["changes"]), tuple(report["printed"])
        return Whole(changes=changes, printed=printed, logits=logits)


def package_of(registry: PluginRegistry, loaded: LoadedBackend) -> Package:
    """The package of a backend that `registry` has loaded."""
    entry_points = [
        (each.name, each.entry_point.value)
        for each in registry.candidates()
        if each.distribution == loaded.distribution
    ]
    return Package(loaded.spec, tuple(entry_points))


def observed(
    request: Mapping[str, Any], time_limit: float, what: str
) -> tuple[dict[str, Any], np.ndarray | None]:
    """The answers of `gemma_hub_conformance.observer` in a new process, and logits if there are.

    Args:
        request: the questions.
        time_limit: seconds that the process may take.
        what: what it does, for the message.

    Raises:
        PackageFailure: it did not live to answer, or did not end.
    """
    with tempfile.TemporaryDirectory(prefix="gemma-hub-conformance-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        status = _run(folder, time_limit)
        answer = folder / "report.json"
        if status != 0 or not answer.is_file():
            when = " after it was done" if answer.is_file() else ""
            said = (folder / "printed").read_text("utf-8", "replace").strip()
            last = f": {said.splitlines()[-1]}" if said else ""
            message = f"{what} {_ending(status, time_limit)}{when}{last}"
            raise PackageFailure(message, is_harmful=True)
        report: dict[str, Any] = json.loads(answer.read_text("utf-8"))
        logits = folder / "logits.npy"
        return report, np.load(logits) if logits.is_file() else None


def _run(folder: Path, time_limit: float) -> int | None:
    """The status of the process; None if it had to be killed."""
    command = [sys.executable, "-P", "-m", "gemma_hub_conformance.observer", str(folder)]
    folders = os.pathsep.join(str(Path(each).absolute()) for each in sys.path)
    with (folder / "printed").open("ab") as printed:
        try:
            return subprocess.run(
                command,
                cwd=folder,  # a folder of its own, so that going to another one is seen
                env=os.environ | {"PYTHONPATH": folders},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                timeout=time_limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def _ending(status: int | None, time_limit: float) -> str:
    """How a process ended, in words."""
    if status is None:
        return f"did not finish within {time_limit:g} s"
    if status >= 0:
        return f"ended the process with status {status}"
    try:
        return f"ended the process with {signal.Signals(-status).name}"
    except ValueError:
        return f"ended the process with signal {-status}"


def _or_raise(found: Answer | PackageFailure) -> Answer:
    if isinstance(found, PackageFailure):
        raise found
    return found
