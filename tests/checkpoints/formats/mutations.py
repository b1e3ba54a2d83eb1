"""What the fuzz scripts for GGUF, msgpack and safetensors share: damage to bytes, and the loop.

Each run draws from a generator of its own, so that `--seed S --only RUN` repeats one run alone.
"""

import argparse
import faulthandler
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

LIMIT = 1.0  # seconds that a checkpoint may take
_HANGS = 60  # seconds until a traceback is shown, and all ends
EXTREMES = (
    0, 1, 2, 7, 8, 9, 12, 13, 31, 32, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
"""Numbers at the ends of what a length, an offset or a count can be."""


def damaged(
    content: bytes,
    draw: random.Random,
    structure: Sequence[range],
    *,
    order: Literal["little", "big"],
    words: Sequence[bytes] = (),
    bombs: Sequence[bytes] = (),
) -> bytes:
    """`content` with one to four damages to its structure, or cut short.

    Half of the results keep their length, so that the damage is seen late, by what uses a value.

    Args:
        content: of a file.
        draw: makes all choices.
        structure: where the bytes are that say what the others are. What is written over them
            stays within them, so that a file which loads must have the values that it had.
        order: of the bytes of a number.
        words: texts that the format knows, to put anywhere.
        bombs: what makes a careless reader allocate or descend without end, to put in many times.
    """
    data = bytearray(content)
    kinds = ["byte", "bit", "number", "word"]
    if draw.random() < 0.5:
        kinds += ["remove", "insert", "cut", "repeat", "bomb"]
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        part = draw.choices(structure, weights=[len(part) for part in structure])[0]
        at = min(draw.randrange(part.start, part.stop), len(data))
        kind = draw.choice(kinds)
        room = part.stop - at
        if kind == "byte":
            data[at : at + 1] = draw.randbytes(1)
        elif kind == "bit" and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "number":
            size = draw.choice((1, 2, 4, 8))
            number = (draw.choice(EXTREMES) % (1 << 8 * size)).to_bytes(size, order)[:room]
            data[at : at + len(number)] = number
        elif kind == "word" and words:
            word = draw.choice(words)[:room]
            data[at : at + len(word)] = word
        elif kind == "remove":
            del data[at : at + min(room, draw.randint(1, 40))]
        elif kind == "insert":
            data[at:at] = draw.randbytes(draw.randint(1, 16))
        elif kind == "cut":
            del data[draw.randrange(len(data) + 1) :]
        elif kind == "repeat":
            start = draw.choice(structure).start
            data[at:at] = content[start : start + draw.randint(1, 200)]
        elif kind == "bomb" and bombs:
            data[at:at] = draw.choice(bombs) * draw.choice((1, 40, 5000))
    return bytes(data)


def replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of one: what is mapped must not be cut short under its reader."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


class Fuzzer(Protocol):
    """Checkpoints of one format in a folder, to be damaged and opened."""

    def damage(self, draw: random.Random) -> str:
        """Damage a fresh checkpoint; says what was damaged."""
        ...

    def check(self) -> str:
        """Open the damaged checkpoint and read all of it; says what came of it.

        Raises:
            AssertionError: it loads with other weights.
            Exception: any other error than the two that a reader may raise.
        """
        ...


def run(make: type[Fuzzer], runs: int, seed: int, only: int | None = None) -> int:
    """Damage and check `runs` times, print the counts; 0 if nothing was wrong."""
    counts: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        fuzzer = make(root)  # type: ignore[call-arg]
        for i in range(runs) if only is None else (only,):
            what = fuzzer.damage(random.Random(f"{seed} {i}"))
            faulthandler.dump_traceback_later(_HANGS, exit=True)
            try:
                outcome, seconds = _timed(fuzzer)
                assert seconds < LIMIT, f"it took {seconds:.2f} s"
            except BaseException:
                kept = Path(tempfile.mkdtemp(prefix="fuzz-")) / "kept"
                shutil.copytree(root, kept, symlinks=True, ignore=_pipes)
                print(f"run {i} of seed {seed} ({what}) failed; its files: {kept}", flush=True)
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, seconds)
            counts[what, outcome] += 1
    for (what, outcome), count in sorted(counts.items()):
        print(f"{what:24} {outcome:24} {count:8,}")
    print(f"{sum(counts.values()):,} runs of seed {seed}; slowest {slowest * 1000:.0f} ms")
    return 0


def _timed(fuzzer: Fuzzer) -> tuple[str, float]:
    """What came of it and how long it took; once more if the machine may have been busy."""
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        outcome = fuzzer.check()
        taken.append(time.perf_counter() - start)
        if taken[-1] < LIMIT:
            break
    return outcome, taken[-1]


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_fifo()]


def main(make: type[Fuzzer], description: str | None, runs: int = 3000) -> None:
    """The command line of a fuzz script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this one run")
    arguments = parser.parse_args()
    sys.exit(run(make, arguments.runs, arguments.seed, arguments.only))
