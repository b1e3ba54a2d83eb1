"""Importing is cheap: no array framework comes with the core or with a plug-in's light module.

Measured in new interpreters, since this one has imported much already.
"""

import json
import statistics
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from gemma_hub.plugins.import_probe import FRAMEWORKS

FORBIDDEN = ("torch", "jax", "jaxlib", "flax", "transformers")

EVERY_MODULE = """
import importlib, json, pkgutil, sys
import gemma_hub
names = [m.name for m in pkgutil.walk_packages(gemma_hub.__path__, "gemma_hub.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(json.dumps([names, sorted(sys.modules)]))
"""

TIMED = """
import json, sys, time
{before}
loaded = set(sys.modules)
start = time.process_time()
import {module}
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - loaded)]))
"""


def in_new_interpreter(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_module_of_the_core_imports_a_framework():
    names, loaded = in_new_interpreter(EVERY_MODULE)
    assert {"gemma_hub.config", "gemma_hub.plugins.registry", "gemma_hub.backend"} <= set(names)
    assert not set(FORBIDDEN) & set(loaded)
    assert set(FORBIDDEN) <= set(FRAMEWORKS)


def test_import_gemma_hub_takes_under_300_ms():
    code = TIMED.format(before="", module="gemma_hub")
    seconds = [in_new_interpreter(code)[0] for _ in range(5)]
    assert statistics.median(seconds) < 0.3


@pytest.mark.parametrize("plugin", entry_points(group="gemma_hub"), ids=lambda entry: entry.name)
def test_light_module_of_each_installed_plugin(plugin):
    module = plugin.value.partition(":")[0]
    # What discovery needs is loaded before any plug-in is; the rest is the plug-in's own cost.
    code = TIMED.format(before="import gemma_hub.plugins.registry", module=module)
    runs = [in_new_interpreter(code) for _ in range(5)]
    assert not set(FRAMEWORKS) & set(runs[0][1])
    # The least of several: the machine may be busy, and cannot make an import faster.
    assert min(seconds for seconds, _ in runs) < 0.05
