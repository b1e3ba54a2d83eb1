"""Measure one program in this process: `python -P measuring.py SCRIPT REQUEST`.

SCRIPT defines `DISTRIBUTIONS`, whose versions are reported, and either

    start(request)                 imports the framework
    load(request) -> generate      generate(ids, new) -> (B, new) int, greedy, no token stops a row

or `limits(request) -> {name: [rate, ...]}`. REQUEST is a JSON object; the answer is another, on
standard output. Runs in any environment that has NumPy: this file imports nothing of gemma_hub.
"""

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

STATUS = Path("/proc/self/status")
SAMPLED_EVERY_S = 0.01

Generate = Callable[[np.ndarray, int], Any]


class PeakMemory:
    """The most memory of this process so far; sampled, where the system tells it (Linux)."""

    def __init__(self) -> None:
        self._private = 0
        if STATUS.is_file():
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peaks()
            time.sleep(SAMPLED_EVERY_S)

    def peaks(self) -> dict[str, int] | None:
        """Bytes of private memory, and of all resident memory with mapped files; None: unknown."""
        if not STATUS.is_file():
            return None
        lines = (line.split() for line in STATUS.read_text("utf-8").splitlines())
        kilobytes = {line[0]: int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmHWM:")}
        self._private = max(self._private, kilobytes["RssAnon:"] * 1024)
        return {"private_bytes": self._private, "resident_bytes": kilobytes["VmHWM:"] * 1024}


def prompt(rows: int, tokens: int, vocab_size: int) -> np.ndarray:
    """(rows, tokens) int32 ids, the same in every process; none of the special ones."""
    rng = np.random.default_rng([rows, tokens])
    return rng.integers(vocab_size // 8, vocab_size, (rows, tokens), np.int32)


def timed(generate: Generate, ids: np.ndarray, new: int) -> float:
    """Seconds that `generate` takes; an error unless it gives every token that it was asked for."""
    start = time.perf_counter()
    tokens = np.asarray(generate(ids, new))
    seconds = time.perf_counter() - start
    if tokens.shape != (len(ids), new):
        raise ValueError(f"{tokens.shape} new tokens, expected {(len(ids), new)}")
    return seconds


def measure(script: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds and bytes of one program; the names say what of."""
    memory = PeakMemory()
    vocab_size, short, new = request["vocab_size"], request["short_prompt"], request["new"]
    start = time.perf_counter()
    script.start(request)
    result: dict[str, Any] = {"import_s": time.perf_counter() - start, "memory": {}}
    result["memory"]["start"] = memory.peaks()
    start = time.perf_counter()
    generate = script.load(request)
    result["load_s"] = time.perf_counter() - start
    result["memory"]["load"] = memory.peaks()
    result["first_token_s"] = timed(generate, prompt(1, short, vocab_size), 1)
    result["memory"]["first_token"] = memory.peaks()
    ids = prompt(1, request["prompt"], vocab_size)
    timed(generate, ids, 1)
    result["prefill_s"] = [timed(generate, ids, 1) for _ in range(request["repeats"])]
    result["decode"] = {}
    for rows in request["batches"]:
        ids = prompt(rows, short, vocab_size)
        for tokens in (1, 1 + new):  # what is compiled for these shapes is not counted
            timed(generate, ids, tokens)
        pairs = [
            (timed(generate, ids, 1), timed(generate, ids, 1 + new))
            for _ in range(request["repeats"])
        ]
        one, full = map(list, zip(*pairs, strict=True))
        result["decode"][str(rows)] = {"one_s": one, "full_s": full}
    result["memory"]["end"] = memory.peaks()
    return result


def main() -> None:
    """Write the answer; what the script prints goes to standard error."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    path, request = sys.argv[1], json.loads(sys.argv[2])
    spec = importlib.util.spec_from_file_location("measured", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    result = script.limits(request) if hasattr(script, "limits") else measure(script, request)
    json.dump({"versions": _versions(script.DISTRIBUTIONS), **result}, answer)
    answer.flush()
    os._exit(0)  # a thread that a framework started must not keep this process


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
