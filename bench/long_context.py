"""What a token costs as the text grows: a decoding step at several positions, up to 8000.

    python bench/long_context.py --backends torch,flax --dtype bfloat16

One random checkpoint of the small shape. At each position the cache is as large as a generation
there would have it. Prints a Markdown table: milliseconds a token, and how many of them came since
the first position for each megabyte of keys and values that a step has more to read.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from gemma_hub import Gemma
from gemma_hub.bench.checkpoints import SHAPES, random_checkpoint
from gemma_hub.cache import cache_folder
from gemma_hub.generation.context import CachedContext
from gemma_hub.parameters import DTYPES
from gemma_hub.tasks.causal_lm import CausalLM

STEPS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="torch,flax")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--native", action="store_true", help="with the option native")
    parser.add_argument("--positions", default="100,1000,2000,4000,8000")
    parser.add_argument("--cache", type=Path, default=cache_folder("bench"))
    arguments = parser.parse_args()
    config = SHAPES["small"]
    folder = random_checkpoint(arguments.cache / "checkpoints" / "small", config)
    positions = [int(each) for each in arguments.positions.split(",")]
    bytes_each = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    ) * DTYPES[arguments.dtype].itemsize
    print("| backend | position | ms a token | ms more for each MB of the cache |")
    print("|---|---|---|---|")
    for backend in arguments.backends.split(","):
        own = {"native": True} if arguments.native else {}
        lm = Gemma.load(folder, backend=backend, dtype=arguments.dtype, backend_options=own)
        found = {position: _step_seconds(lm, position) for position in positions}
        for position, seconds in found.items():
            more = (position - positions[0]) * bytes_each / 1e6
            slope = f"{(seconds - found[positions[0]]) * 1e3 / more:.2f}" if more else ""
            print(f"| {backend} | {position} | {seconds * 1e3:.2f} | {slope} |", flush=True)


def _step_seconds(lm: CausalLM, position: int) -> float:
    """The median of some steps, after as many that are not counted."""
    ids = np.random.default_rng(position).integers(4000, 32000, (1, position + 2 * STEPS))
    context = CachedContext(lm.contract, lm.config, 1, ids.shape[1])
    context.extend(ids[:, :position], np.ones((1, position), np.bool_))
    seconds = []
    for place in range(position, ids.shape[1]):
        start = time.perf_counter()
        context.extend(ids[:, place : place + 1], np.ones((1, 1), np.bool_))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[STEPS:])


if __name__ == "__main__":
    main()
