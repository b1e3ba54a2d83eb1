"""Plug-ins with one thing wrong, as distributions in a folder: what the suite and the doctor say.

Each is the reference in a package of its own with a line added or changed. Some cannot be loaded,
and then the reason is what counts; the others run, and a case of L0 must fail.
"""

import importlib
import itertools
import textwrap
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

from gemma_hub.plugins.discovery import GROUP
from gemma_hub.plugins.registry import PluginRegistry
from gemma_hub_conformance.mutants.bank import DTYPES, FEATURES, TASKS

NAME = "wrong"
"""Name of every mutant's backend and of its entry point."""

_COUNTER = itertools.count()

_LIGHT = """
from gemma_hub.plugins.hookspecs import hookimpl
from gemma_hub.plugins.spec import BackendSpec
{at_import}

@hookimpl
def gemma_hub_backends({parameters}):
    {in_hook}
    return {returned}
"""

_HEAVY = """
from gemma_hub_conformance.mutants.bank import StandInBackend, StandInModel
from gemma_hub_numpy.model import Reference
{at_load}


class Model(StandInModel):
    def __init__(self, reference):
        {in_build}
        super().__init__(reference)

    def forward(self, inputs):
        {in_forward}
        return super().forward(inputs)


class Wrong(StandInBackend):
    def __init__(self):
        {in_factory}
        super().__init__(Reference, Model)

    def build(self, config, task, weights, options):
        {before_build}
        return super().build(config, task, weights, options)
"""


class _Code(str):
    """An expression, and no string, among the fields of a spec."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


_FIELDS: dict[str, object] = {
    "name": NAME,
    "api_version": "1.0",
    "features": FEATURES,
    "tasks": TASKS,
    "dtypes": DTYPES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginMutant:
    """One plug-in with a bug.

    Attributes:
        hint: what is right.
        case: id of the case that must fail; empty if the backend cannot be loaded.
        reason: regular expression that the reason it is refused, or the case's message, matches.
        doctor: regular expression for a problem that `gemma-hub doctor` shows; empty if it is not
            one that importing the plug-in shows.
        code: lines to put in, by their place in the templates above.
        fields: of its `BackendSpec`, other than the right ones.
        files: {name: text} of modules beside it.
        copies: how many distributions claim the name.
    """

    hint: str
    case: str = ""
    reason: str
    doctor: str = ""
    code: dict[str, str] = field(default_factory=dict)
    fields: dict[str, object] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    copies: int = 1

    def install(self, folder: Path) -> None:
        """Write its distribution, with modules of new names, to `folder`, which is on sys.path."""
        for _ in range(self.copies):
            module = f"gemma_hub_wrong_{next(_COUNTER)}"
            _write(folder, f"{module}.py", self._light(module))
            _write(folder, f"{module}_backend.py", _filled(_HEAVY, self.code))
            info = f"{module}-1.0.dist-info"
            name = module.replace("_", "-")
            _write(
                folder, f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            _write(folder, f"{info}/entry_points.txt", f"[{GROUP}]\n{NAME} = {module}\n")
            for file, text in self.files.items():
                _write(folder, file, text.replace("MODULE", module))
        importlib.invalidate_caches()

    def _light(self, module: str) -> str:
        fields = _FIELDS | {"factory": f"{module}_backend:Wrong"} | self.fields
        arguments = ", ".join(f"{key}={value!r}" for key, value in fields.items())
        code = {"returned": f"[BackendSpec({arguments})]"} | self.code
        return _filled(_LIGHT, code).replace("MODULE", module)


def registry(folder: Path) -> PluginRegistry:
    """A registry of what is installed in `folder`."""
    return PluginRegistry(
        entry_point
        for distribution in distributions(path=[str(folder)])
        for entry_point in distribution.entry_points
        if entry_point.group == GROUP
    )


def _write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _filled(template: str, code: dict[str, str]) -> str:
    """The template with `code` at its places, each at its indentation."""
    lines = []
    for line in template.splitlines():
        place = line.strip()
        if place.startswith("{") and place.endswith("}") and place.count("{") == 1:
            indent = line[: len(line) - len(place)]
            text = code.get(place[1:-1], "pass")
            lines.append(textwrap.indent(textwrap.dedent(text).strip(), indent))
        else:
            for each in ("parameters", "returned"):
                line = line.replace(f"{{{each}}}", code.get(each, ""))
            lines.append(line)
    return "\n".join(lines) + "\n"


_LOOP = "import time\ntime.sleep(60)"
_BURN = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
_HARD_EXIT = "import os\nos._exit(9)"  # with 0, tests that it ends would look well
_KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
_REFUSES_BASE = """
from gemma_hub.errors import UnsupportedFeature
if task.name == "base":
    raise UnsupportedFeature("task:base", "wrong")
"""
_WRONG_ELSEWHERE = """
import dataclasses, sys
if "gemma_hub_conformance.engine" not in sys.modules:
    inputs = dataclasses.replace(inputs, input_ids=inputs.input_ids * 0 + 7)
"""
_FRAMEWORK = {"tensorflow.py": ""}

REFUSED: dict[str, PluginMutant] = {
    "import-error": PluginMutant(
        hint="The light module imports only what its distribution requires.",
        code={"at_import": "import no_such_module"},
        reason=r"\(import\): .*ModuleNotFoundError: No module named 'no_such_module'",
        doctor="ModuleNotFoundError",
    ),
    "exit-at-import": PluginMutant(
        hint="Importing a plug-in does not end the process.",
        code={"at_import": "raise SystemExit(0)"},
        reason=r"\(import\): .*SystemExit: 0",
        doctor="SystemExit: 0",
    ),
    "hard-exit-at-import": PluginMutant(
        hint="Importing a plug-in does not end the process, in no way.",
        code={"at_import": _HARD_EXIT},
        reason=r"\(import\): importing it ended the process with status 9",
        doctor="ended the process with status 9",
    ),
    "crash-in-hook": PluginMutant(
        hint="A hook does not crash Python.",
        code={"in_hook": _KILL},
        reason=r"\(import\): importing it ended the process with SIGSEGV",
        doctor="ended the process with SIGSEGV",
    ),
    "hang-at-import": PluginMutant(
        hint="Importing a plug-in ends.",
        code={"at_import": _LOOP},
        reason=r"\(import\): .*did not finish within 0.5 s",
        doctor="did not finish within 0.5 s",
    ),
    "hang-in-hook": PluginMutant(
        hint="A hook ends.",
        code={"in_hook": _LOOP},
        reason=r"\(hooks\): calling gemma_hub_backends did not finish within 0.5 s",
        doctor="did not finish within 0.5 s",
    ),
    "hook-with-unknown-argument": PluginMutant(
        hint="A hook takes no argument that the core does not pass.",
        code={"parameters": "config"},
        reason=r"\(hooks\): .*config.*",
        doctor="config",
    ),
    "hook-returns-dictionary": PluginMutant(
        hint="The hook returns a list of `BackendSpec`.",
        code={"returned": "{'name': 'wrong'}"},
        reason=r"\(specs\): gemma_hub_backends returned .*expected a list of BackendSpec",
        doctor="expected a list of BackendSpec",
    ),
    "name-taken-twice": PluginMutant(
        hint="A backend's name is claimed by one distribution.",
        copies=2,
        reason="There is no single backend 'wrong'.*all claim the backend name",
        doctor="all claim the backend name 'wrong'",
    ),
    "future-api": PluginMutant(
        hint="The plug-in API is one that this gemma-hub speaks.",
        fields={"api_version": "1.9"},
        reason=r"\(api version\): it was written for plug-in API 1.9",
        doctor="plug-in API 1.9",
    ),
    "unknown-feature": PluginMutant(
        hint="Features are those that the contract names.",
        fields={"features": frozenset({"telepathy"})},
        reason=r"\(specs\): .*'telepathy' among its features",
        doctor="'telepathy' among its features",
    ),
    "unmet-requirement": PluginMutant(
        hint="What the backend requires is installed.",
        fields={"requires": ("no-such-distribution>=2",)},
        reason=r"\(requires\): it needs no-such-distribution>=2",
        doctor="it needs no-such-distribution>=2",
    ),
    "factory-missing": PluginMutant(
        hint="The factory's class is in the factory's module.",
        code={"at_load": "Wrong = None"},
        fields={"factory": "gemma_hub_numpy.backend:NoSuchBackend"},
        reason=r"\(factory\): .*AttributeError",
    ),
    "factory-raises": PluginMutant(
        hint="The factory makes a backend without arguments.",
        code={"in_factory": "raise RuntimeError('no device')"},
        reason=r"\(factory\): .*RuntimeError: no device",
    ),
    "factory-exits": PluginMutant(
        hint="Importing the factory's module does not end the process.",
        code={"at_load": "raise SystemExit(0)"},
        reason=r"\(factory\): .*SystemExit: 0",
    ),
    "factory-of-no-backend": PluginMutant(
        hint="The factory makes an object with devices() and build().",
        fields={"factory": "builtins:object"},
        reason=r"\(factory\): builtins:object made a object, which lacks devices\(\) or build\(\)",
    ),
    "spec-of-another-name": PluginMutant(
        hint="The backend's name is that of its spec.",
        fields={"name": "other"},
        reason="no backend 'wrong'",
    ),
}
"""Those that cannot be loaded: `gemma-hub conformance` exits with 3."""

FAILING: dict[str, PluginMutant] = {
    "heavy-import": PluginMutant(
        hint="The light module imports no array framework.",
        code={"at_import": "import tensorflow"},
        files=_FRAMEWORK,
        case="L0.package.light_module",
        reason="imports tensorflow; only the factory's module may",
        doctor="its light module imports tensorflow",
    ),
    "heavy-hook": PluginMutant(
        hint="A hook imports no array framework.",
        code={"in_hook": "import tensorflow"},
        files=_FRAMEWORK,
        case="L0.package.light_module",
        reason="imports tensorflow; only the factory's module may",
        doctor="its light module imports tensorflow",
    ),
    "slow-import": PluginMutant(
        hint="The light module takes less than 50 ms to import.",
        code={"at_import": _BURN},
        case="L0.package.import_time",
        reason=r"takes 3\d\d ms of processor time; expected 50 ms",
    ),
    "spec-by-process": PluginMutant(
        hint="A plug-in says the same in every process.",
        code={"at_import": "import os"},
        fields={"summary": _Code("str(os.getpid())")},
        case="L0.package.spec",
        reason="a new process is told",
    ),
    "imported-with-the-core": PluginMutant(
        hint="Nothing of a plug-in is imported before plug-ins are asked for.",
        files={"sitecustomize.py": "import MODULE"},
        case="L0.package.core_alone",
        reason="`import gemma_hub` alone imports gemma_hub_wrong",
    ),
    "prints-at-import": PluginMutant(
        hint="The light module prints nothing.",
        code={"at_import": "print('Welcome!')"},
        case="L0.package.quiet",
        reason=r"importing its light module printed 'Welcome!\\n'",
    ),
    "prints-in-forward": PluginMutant(
        hint="A forward prints nothing, to stderr neither.",
        code={"in_forward": "import os\nos.write(2, b'fast path')"},
        case="L0.package.quiet",
        reason="a forward printed 'fast path'",
    ),
    "changes-environment": PluginMutant(
        hint="Loading a backend leaves the environment's variables alone.",
        code={"at_load": "import os\nos.environ['OMP_NUM_THREADS'] = '99'"},
        case="L0.package.process_state",
        reason=r"loading it changed os.environ\['OMP_NUM_THREADS'\] from .* to '99'",
    ),
    "silences-numpy": PluginMutant(
        hint="Building a model leaves NumPy's error handling alone.",
        code={"in_build": "import numpy\nnumpy.seterr(all='ignore')"},
        case="L0.package.process_state",
        reason=r"building a model changed numpy.geterr\(\)",
    ),
    "seeds-random": PluginMutant(
        hint="A forward leaves the random numbers of others alone.",
        code={"in_forward": "import random\nrandom.seed(0)"},
        case="L0.package.process_state",
        reason="a forward changed random's state",
    ),
    "wrong-in-a-new-process": PluginMutant(
        hint="What a backend answers does not hang on what its process did before.",
        code={"in_forward": _WRONG_ELSEWHERE},
        case="L0.package.fresh_process",
        reason="logits: error is",
    ),
    "crash-in-forward": PluginMutant(
        hint="A forward does not crash Python.",
        code={"in_forward": _KILL},
        case="L0.package.fresh_process",
        reason="running it ended the process with SIGSEGV",
    ),
    "hard-exit-in-forward": PluginMutant(
        hint="A forward does not end the process, in no way.",
        code={"in_forward": _HARD_EXIT},
        case="L0.package.fresh_process",
        reason="running it ended the process with status 9",
    ),
    "hang-in-build": PluginMutant(
        hint="Building a model ends.",
        code={"in_build": _LOOP},
        case="L0.package.fresh_process",
        reason="running it did not finish within",
    ),
    "raises-in-build": PluginMutant(
        hint="A model of the main checkpoint is built.",
        code={"in_build": "raise RuntimeError('no kernel')"},
        case="L0.package.fresh_process",
        reason="building a model raised RuntimeError: no kernel",
    ),
    "claims-a-feature-it-lacks": PluginMutant(
        hint="A feature that is claimed is there.",
        fields={"features": FEATURES | {"qk_norm"}},
        case="L0.claims.features",
        reason="claims 'qk_norm' and refuses it",
    ),
    "has-a-feature-it-does-not-claim": PluginMutant(
        hint="A feature that is not claimed is refused.",
        fields={"features": FEATURES - {"gradients"}},
        case="L0.claims.nothing_else",
        reason="the unclaimed feature 'gradients' was accepted",
    ),
    "claims-a-task-it-lacks": PluginMutant(
        hint="A model of every task that is claimed is built.",
        code={"before_build": _REFUSES_BASE},
        case="L0.claims.tasks",
        reason="claims 'task:base' and refuses it",
    ),
    "claims-a-type-it-lacks": PluginMutant(
        hint="A model in every compute type that is claimed is built.",
        fields={"dtypes": (*DTYPES, "float64")},
        case="L0.claims.dtypes",
        reason="the logits of a model in float64 are float32; expected float64",
    ),
}
"""Those that can: `gemma-hub conformance` exits with 1, and the case fails."""


def all_plugin_mutants() -> dict[str, PluginMutant]:
    """Every one by its name."""
    return REFUSED | FAILING
