"""A second process that computes truths while the first one runs the backend.

It runs the same cases on the reference, from the last to the first, and sends what its oracle
finds: the two meet in the middle, and neither waits for the other. What it does not get to, or if
it dies, the first process computes itself, to the same bits.
"""

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from gemma_hub_conformance.cases import all_cases
from gemma_hub_conformance.engine import run_case
from gemma_hub_conformance.mutants.bank import control
from gemma_hub_conformance.oracle import Oracle
from gemma_hub_conformance.seeds import seeded

FEWEST_CASES = 20
"""Fewer are done before a new process has begun."""

_COMMAND = [sys.executable, "-P", "-m", __name__]


@contextmanager
def truths_ahead(ids: Sequence[str], seed: int, oracle: Oracle) -> Iterator[None]:
    """Within it `oracle` learns from a second process, where there is a processor for one.

    Args:
        ids: the cases, in the order in which the first process runs them.
        seed: of the run.
        oracle: learns what the cases need.
    """
    if len(ids) < FEWEST_CASES or (os.cpu_count() or 1) < 2:
        yield
        return
    with subprocess.Popen(
        [*_COMMAND, json.dumps([list(ids), seed])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None  # it is a pipe
        thread = threading.Thread(target=_learn, args=(oracle, process.stdout), daemon=True)
        thread.start()
        try:
            yield
        finally:
            process.kill()
            thread.join()


def _learn(oracle: Oracle, pipe: IO[bytes]) -> None:
    """Take what comes through `pipe` until it ends."""
    try:
        while True:
            oracle.learn(pickle.load(pipe))
    except (EOFError, pickle.UnpicklingError):
        return  # it is done, or was killed in the middle of a result


def main() -> None:
    """Run the cases and seed of the first argument, in JSON, and write pickles to stdout."""
    ids, seed = json.loads(sys.argv[1])
    cases, subject, oracle, told = all_cases(), control(), Oracle(), [0, 0, 0]
    with seeded(seed):
        # What new processes do is no truth.
        for id_ in reversed([each for each in ids if not each.startswith("L0")]):
            run_case(cases[id_], subject, oracle)
            found = oracle.found_since(told)
            told = [count + len(each) for count, each in zip(told, found, strict=True)]
            pickle.dump(found, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
