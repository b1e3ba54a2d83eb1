"""Try the plug-ins in another process first: one that ends or blocks it must not do so to this one.

Where nobody reads an exit status the price, a third of a second, would be wasted. A command whose
status is a verdict pays it: a plug-in that calls os._exit(0) would end it as if all were well.

The other process is python -P -m gemma_hub.plugins.trial, with {"entry_points": [[name, value],
...], "limit": seconds} on its stdin.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

from gemma_hub.plugins.admission import admit
from gemma_hub.plugins.discovery import GROUP, Candidate
from gemma_hub.plugins.guard import call_guarded, timeout_from_environment
from gemma_hub.plugins.problems import PluginFailure
from gemma_hub.plugins.registry import PluginRegistry

_START_UP = 30.0  # seconds that the process may take to start Python and import the core
_STEPS = 5  # steps in it that have the time limit each, for every plug-in
_ALIVE = "alive"


def set_aside_what_kills(registry: PluginRegistry) -> None:
    """Quarantine each plug-in of `registry` that ends or blocks the process that imports it.

    One new process tries them all; only if it does not live to tell is each tried by itself. Does
    nothing where the plug-ins were imported before.
    """
    if registry.is_discovered:
        return
    candidates, limit = registry.candidates(), timeout_from_environment()[0]
    if not candidates or _are_harmless(candidates, limit):
        return
    from gemma_hub.plugins.doctor import measure_import

    for each in candidates:
        report = measure_import(each, limit)
        if report.seconds is None:
            registry.quarantine(each, PluginFailure("import", report.error))


def _are_harmless(candidates: Sequence[Candidate], limit: float) -> bool:
    """Whether a process that imports them all lives to say so."""
    entry_points = [(each.name, each.entry_point.value) for each in candidates]
    folders = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "gemma_hub.plugins.trial"],
            env=os.environ | {"PYTHONPATH": folders},
            input=json.dumps({"entry_points": entry_points, "limit": limit}).encode(),
            capture_output=True,
            timeout=_START_UP + _STEPS * limit * len(candidates),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return child.stdout.endswith(_ALIVE.encode())


def main() -> None:
    """Import the plug-ins, call their hooks, and write that this process is still there."""
    request = json.load(sys.stdin)
    for name, value in request["entry_points"]:
        entry_point = EntryPoint(name, value, GROUP)
        try:
            what = f"importing {value!r}"
            call_guarded(entry_point.load, "import", what, request["limit"])
            admit(Candidate("", "", entry_point), request["limit"])
        except PluginFailure:
            pass  # the registry finds out again, and says so
    os.write(1, _ALIVE.encode())
    os._exit(0)  # a thread that a plug-in started must not keep this process


if __name__ == "__main__":
    main()
