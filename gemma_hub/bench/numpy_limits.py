"""What this machine can do at most, by NumPy: reading memory, and float32 products."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

DISTRIBUTIONS = ("numpy",)

READ_BYTES = 1 << 29  # more than caches hold
REPEATS = 7


def limits(request: dict[str, Any]) -> dict[str, list[float]]:
    """Rates, one of each repetition: bytes/s read, and flop/s where the dtype is float32."""
    columns = 2048
    weight = np.ones((READ_BYTES // (4 * columns), columns), np.float32)
    vector = np.ones(columns, np.float32)
    found = {"read_bytes_per_s": rates(weight.nbytes, lambda: weight @ vector)}
    if request["dtype"] == "float32":
        left, right = np.ones((512, columns), np.float32), weight[:4096].T
        found["matmul_flop_per_s"] = rates(2 * left.size * 4096, lambda: left @ right)
    return found


def rates(amount: float, run: Callable[[], Any]) -> list[float]:
    """`amount` / seconds of each of several runs, after one that does not count."""
    run()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        found.append(amount / (time.perf_counter() - start))
    return found
