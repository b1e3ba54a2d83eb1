"""What a new process sees of a backend's package.

`gemma_hub_conformance.package` runs it: python -P -m gemma_hub_conformance.observer FOLDER, with
the questions in FOLDER/request.json, and stdout and stderr in FOLDER/printed. The answers go to
FOLDER/report.json. Nothing is imported up here that could hide what the package imports.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def main() -> None:
    """Answer the questions of FOLDER/request.json."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text("utf-8"))
    parts = {"light": light, "whole": whole}
    report = parts[request["part"]](request, folder)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    sys.stdout.flush()
    others = [each for each in threading.enumerate() if each is not threading.main_thread()]
    if not all(each.daemon for each in others):
        os._exit(0)  # the report says that they are there; nobody has to wait for them


def light(request: Json, _: Path) -> Json:
    """The light modules: what they cost and import, and what their hooks return."""
    import gemma_hub  # noqa: F401 - what comes with it is the question

    core_loads = [name for name in sys.modules if name.partition(".")[0] in request["packages"]]
    import gemma_hub.plugins.registry  # noqa: F401 - every command has it before a plug-in
    from gemma_hub.plugins.admission import admit
    from gemma_hub.plugins.discovery import Candidate
    from gemma_hub.plugins.guard import call_guarded
    from gemma_hub.plugins.import_probe import FRAMEWORKS
    from gemma_hub.plugins.problems import PluginFailure

    present = {name for name in FRAMEWORKS if name in sys.modules}
    seconds, specs, error = 0.0, [], ""
    for entry_point in _entry_points(request):
        start = time.process_time()
        try:
            what = f"importing {entry_point.value!r}"
            call_guarded(entry_point.load, "import", what, request["limit"])
            seconds += time.process_time() - start
            admitted = admit(Candidate("", "", entry_point), request["limit"])
            specs += [plain_spec(spec) for spec in admitted.backends]
        except PluginFailure as failure:
            error = failure.cause
    return {
        "core_loads": core_loads,
        "frameworks": [n for n in FRAMEWORKS if n in sys.modules and n not in present],
        "seconds": seconds,
        "specs": specs,
        "error": error,
    }


def whole(request: Json, folder: Path) -> Json:
    """Load the backend, build a model and run it: what it changes, prints and answers."""
    import numpy as np

    from gemma_hub_conformance.cases.package import MODEL, batch
    from gemma_hub_conformance.seeds import seeded
    from gemma_hub_conformance.spec import prepare
    from gemma_hub_conformance.watch import Watch

    registry = _registry(request)
    with seeded(request["seed"]):
        inputs, arguments = prepare(MODEL, batch()), _build_arguments(request)
        watch = Watch(request["packages"], Printed(folder))
        stage = "importing its light module"
        try:
            registry.plugins()
            watch.after(stage)
            stage = "loading it"
            backend = registry.load(request["name"]).backend
            watch.after(stage)
            stage = "building a model"
            model = backend.build(*arguments)
            watch.after(stage)
            stage = "a forward"
            outputs = model.forward(inputs)
            watch.after(stage)
            logits = np.asarray(outputs.to_numpy().logits)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
            return {"error": f"{stage} raised {type(error).__name__}: {error}"}
    np.save(folder / "logits.npy", logits)
    return {"error": "", "changes": watch.changes, "printed": watch.printed}


def plain_spec(spec: Any) -> Json:
    """A `BackendSpec` as JSON has it."""
    values = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return {
        name: sorted(value)
        if isinstance(value, (set, frozenset))
        else list(value)
        if isinstance(value, (tuple, list))
        else value
        for name, value in values.items()
    }


class Printed:
    """What went to stdout and stderr, part by part."""

    def __init__(self, folder: Path) -> None:
        """Listen from now on to the file that the parent made of both."""
        self._path = folder / "printed"
        self._start = 0
        self.since_last()

    def since_last(self) -> str:
        """What was printed since the last call, or since this was made."""
        sys.stdout.flush()
        sys.stderr.flush()
        text = self._path.read_bytes()[self._start :]
        self._start += len(text)
        return text.decode("utf-8", "replace")


def _build_arguments(request: Json) -> tuple[Any, ...]:
    from gemma_hub.backend import BuildOptions, TaskSpec
    from gemma_hub_conformance.cases.package import MODEL

    options = BuildOptions(dtype="float32", device=request["device"], extra=request["extra"])
    return MODEL.config, TaskSpec(MODEL.task), MODEL.weights(), options


def _entry_points(request: Json) -> list[Any]:
    from importlib.metadata import EntryPoint

    from gemma_hub.plugins.discovery import GROUP

    return [EntryPoint(name, value, GROUP) for name, value in request["entry_points"]]


def _registry(request: Json) -> Any:
    from gemma_hub.plugins.registry import PluginRegistry

    return PluginRegistry(_entry_points(request))


if __name__ == "__main__":
    main()
