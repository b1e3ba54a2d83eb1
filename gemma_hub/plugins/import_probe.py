"""Import one plug-in and call its hooks in this process; report what it cost.

`doctor` runs it in a child: python -m gemma_hub.plugins.import_probe NAME VALUE SECONDS
"""

import json
import os
import sys
import time
from importlib.metadata import EntryPoint

# What discovery has imported anyhow before it comes to a plug-in is no cost of the plug-in.
import gemma_hub.plugins.registry  # noqa: F401
from gemma_hub.plugins.admission import admit
from gemma_hub.plugins.discovery import GROUP, Candidate
from gemma_hub.plugins.guard import call_guarded
from gemma_hub.plugins.problems import PluginFailure

FRAMEWORKS = (
    "cupy flax jax jaxlib keras mlx numba paddle tensorflow tinygrad torch transformers".split()
)
"""Modules that a plug-in's light module must not import, nor its hooks."""


def main() -> None:
    """Write one JSON object to stdout: seconds, frameworks, error."""
    name, value, limit = sys.argv[1], sys.argv[2], float(sys.argv[3])
    entry_point = EntryPoint(name, value, GROUP)
    # Whatever the plug-in prints must not mix with the report.
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    present = {module for module in FRAMEWORKS if module in sys.modules}
    error = ""
    start = time.perf_counter()
    seconds = None
    try:
        call_guarded(entry_point.load, "import", "importing it", limit)
        seconds = time.perf_counter() - start
        admit(Candidate("", "", entry_point), limit)
    except PluginFailure as failure:
        error = failure.cause
    if seconds is None:
        seconds = time.perf_counter() - start
    loaded = [module for module in FRAMEWORKS if module in sys.modules and module not in present]
    json.dump({"seconds": seconds, "frameworks": loaded, "error": error}, report)
    report.flush()
    os._exit(0)  # a thread that the plug-in started must not keep this process


if __name__ == "__main__":
    main()
